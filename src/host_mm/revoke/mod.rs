//! The core of the protocol: from a page that clients map to a frame that is free.
//!
//! Guarantee, in types: clients are told ([`batch`]), one flush revokes what processors cache, and only
//! then is a page written out ([`write_out`]) or its frame free ([`vacate`], [`free_frame`]). Every
//! source of invalidation, reclaim and faults are made of these steps; nothing here decides which page
//! goes, or waits for one to come.

pub(in crate::host_mm) mod batch;
pub(in crate::host_mm) mod copies;
pub(in crate::host_mm) mod duplicates;
pub(in crate::host_mm) mod free_frame;
pub(in crate::host_mm) mod unexported;
pub(in crate::host_mm) mod vacate;
pub(in crate::host_mm) mod write_out;
