//! Where the host side and the export clients meet: page flags and the page lock, the notifier
//! list, the reverse map and the invalidation sequence.
//!
//! What this layer guarantees, given that its callers keep the lock order (page lock -> a client's
//! MMU lock -> rmap entry):
//!
//! - a frame's [`EXPORTED`](flags::PageFlags::EXPORTED) flag is set exactly while its reverse map
//!   holds an entry (invariant I4);
//! - a client that [exports](FrameTable::export) a frame before it maps it either sees the invalidation that overlapped it, or that invalidation sees the flag
//!   and calls the client;
//! - no call reaches a notifier whose [`Membership`] was dropped (I7).
//!
//! The model is Robin Holt's export notifier of January 2008; `docs/protocol.md` maps each element
//! of the mail to a file here.

// For what `counters!` refers to by this name, here as in other crates.
#[cfg(feature = "serde")]
extern crate self as gnomon_export_rmap;

pub mod addr;
mod check;
pub mod client;
pub mod counters;
pub mod flags;
pub mod frame_table;
pub mod in_flight;
#[cfg(feature = "lab")]
#[doc(hidden)]
pub mod lab;
pub mod lock_rank;
#[cfg(all(test, any(loom, shuttle)))]
mod models;
pub mod notifier;
mod numbers;
pub mod page_lock;
#[cfg(all(feature = "testing", not(any(loom, shuttle))))]
#[doc(hidden)]
pub mod pausing_client;
pub mod rmap;
pub mod sequence;
pub mod sync;

pub use check::Differences;
pub use client::{ClientGuard, ClientLock, Exported, Gone};
pub use flags::PageFlags;
pub use frame_table::{Frame, FrameTable, Owner};
pub use notifier::{
    ExportNotifier, FlushReason, Harvest, Invalidation, Membership, NotifierList, Reservation,
    RevokeError,
};
pub use numbers::Numbers;
pub use page_lock::LockedPage;
pub use rmap::{ClientId, Retain, RmapEntry};
pub use sequence::SequenceToken;
