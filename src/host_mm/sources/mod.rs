//! The sources of invalidation beside reclaim: what takes pages, or the right to write them, away from
//! clients for a reason of its own.
//!
//! Guarantee: each keeps the order that [`revoke`](crate::revoke) has in types (clients told,
//! flushed, and only then a new place), and none imports another: there is no order between them but
//! page locks.

pub(crate) mod clean;
pub(crate) mod clone;
pub(crate) mod dirty_log;
pub(crate) mod give_back;
pub(crate) mod lend;
pub(crate) mod merge;
pub(crate) mod migrate;
pub(crate) mod remap;
pub(crate) mod withdraw;
