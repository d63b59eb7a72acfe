//! The sources of invalidation beside reclaim: what takes pages, or the right to write them, away from
//! clients for a reason of its own.
//!
//! Guarantee: each keeps the order that [`revoke`](crate::host_mm::revoke) has in types (clients told,
//! flushed, and only then a new place), and none imports another: there is no order between them but
//! page locks.

pub(in crate::host_mm) mod clean;
pub(in crate::host_mm) mod clone;
pub(in crate::host_mm) mod dirty_log;
pub(in crate::host_mm) mod give_back;
pub(in crate::host_mm) mod lend;
pub(in crate::host_mm) mod merge;
pub(in crate::host_mm) mod migrate;
pub(in crate::host_mm) mod remap;
pub(in crate::host_mm) mod withdraw;
