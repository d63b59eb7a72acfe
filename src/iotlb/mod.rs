//! An IOTLB: a device's translations of guest-physical addresses, as an export client of its own.
//!
//! What this layer guarantees:
//!
//! - a device reads and writes guest memory through entries that are in the reverse map, without a
//!   page lock, and never once an invalidation of the page has returned (invariant I1);
//! - a device's write is in the dirty state that an invalidation hands over, also when it is in
//!   flight at that moment (I2);
//! - its `flush` *sleeps* until the accesses in flight through the old entries are over. That is
//!   what the mail of 2008 could not have: a receiver that blocks. It sleeps for the length of an
//!   access, which is at most a page, and the access waits for nothing that the sleeper holds.
//!
//! It is no device's: whatever serves a guest from a thread of the host can have one. The entries
//! are bounded, and pin nothing: reclaim takes the pages behind them like any other.

mod guest_memory;
#[doc(hidden)]
pub mod hooks;
mod memory;

pub use crate::export_rmap::in_flight::{DeviceAccess, IotlbStats};
pub use memory::{Iotlb, PageAccess};

#[cfg(all(test, feature = "export-notifier"))]
mod tests;
