//! Where the host side and the export clients meet: page flags and the page lock, the notifier
//! list, the reverse map and the invalidation sequence.
//!
//! What this layer guarantees, given that its callers keep the lock order (page lock -> a client's
//! MMU lock -> rmap entry):
//!
//! - a frame's [`EXPORTED`](flags::PageFlags::EXPORTED) flag is set exactly while its reverse map
//!   holds an entry (invariant I4);
//! - a client that [exports](FrameTable::export) a frame before it maps it either sees the invalidation
//!   that overlapped it, or that invalidation sees the flag and calls the client;
//! - no call reaches a notifier whose [`Membership`] was dropped (I7).
//!
//! The model is Robin Holt's export notifier of January 2008; `docs/protocol.md` of the repository maps each
//! element of the mail to a file here, and names the models, mutants and tests that keep the guarantees.
//!
//! # One fault and one invalidation
//!
//! A client maps the frames of somebody else: the host side, which owns the [`FrameTable`] and takes frames
//! away when it wants them. Here both are a few lines; what maps a page is one entry of a list.
//!
//! ```
//! use std::sync::Arc;
//!
//! use gnomon_export_rmap::addr::{Gfn, Pfn};
//! use gnomon_export_rmap::*;
//!
//! /// A client: the frame behind each of its slots, under its lock.
//! struct Client {
//!     id: ClientId,
//!     slots: ClientLock<Vec<Option<Pfn>>>,
//! }
//!
//! impl ExportNotifier for Client {
//!     fn invalidate_page(&self, page: &LockedPage<'_>, kind: Invalidation) -> Harvest {
//!         assert_eq!(kind, Invalidation::Unmap, "the example does nothing else");
//!         let mut slots = self.slots.lock();
//!         // The reverse map says where the page is mapped: nothing is searched.
//!         page.table().rmap_visit(page.pfn(), self.id, |slot| {
//!             slots[slot as usize] = None;
//!             Retain::Drop
//!         });
//!         Harvest { dirty: true, accessed: true }
//!     }
//!
//!     fn age_page(&self, _page: &LockedPage<'_>) -> bool {
//!         false
//!     }
//!
//!     fn flush(&self, _frames: &[Pfn], _reason: FlushReason) -> Result<(), RevokeError> {
//!         Ok(()) // Nothing is cached outside the slots.
//!     }
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let (table, notifiers) = (FrameTable::new(16), NotifierList::default());
//! let reservation = notifiers.reserve()?;
//! let slots = ClientLock::new(vec![None; 4]);
//! let client = Arc::new(Client { id: reservation.id(), slots });
//! let membership = reservation.register(client.clone());
//!
//! // The host side puts a page into frame 3.
//! let frame = Pfn::new(3);
//! let page = table.lock(frame);
//! page.set_flags(PageFlags::IN_USE);
//! page.set_owner(Owner { object: 1, gfn: Gfn::new(7) });
//!
//! // A fault: the count is noted while the page is locked. Then the client's own lock is taken, the entry
//! // is added, and only then is the count looked at.
//! let token = page.sequence();
//! drop(page);
//! let mut slots = client.slots.lock();
//! let entry = RmapEntry::new(client.id, 2);
//! let exported = table.export(&slots, token, entry).expect("nobody has invalidated it meanwhile");
//! slots[2] = Some(frame);
//! exported.keep();
//! drop(slots);
//! assert!(table.get(frame).is_some_and(Frame::is_exported));
//!
//! // An invalidation: the count is raised first, so that a fault under way starts over. Whoever maps the
//! // page is told if it is exported; then all that was taken away is flushed at once.
//! let page = table.lock(frame);
//! page.begin_invalidation();
//! if page.frame().is_exported() {
//!     let harvest = notifiers.invalidate_page(&page, Invalidation::Unmap);
//!     assert!(harvest.dirty, "its content has to be kept");
//!     notifiers.revoke(&[&page], FlushReason::Invalidated)?;
//! }
//! assert!(!page.frame().is_exported() && client.slots.lock()[2].is_none());
//! drop(page);
//!
//! // What was noted before is worth nothing now.
//! assert!(table.export(&client.slots.lock(), token, entry).is_none());
//! drop(membership);
//! # Ok(())
//! # }
//! ```

// For what `counters!` refers to by this name, here as in other crates.
#[cfg(feature = "serde")]
extern crate self as gnomon_export_rmap;

pub mod addr;
#[cfg(feature = "testing")]
#[doc(hidden)]
pub mod bare_entries;
mod check;
pub mod client;
pub mod counters;
#[cfg(any(loom, shuttle))]
#[doc(hidden)]
pub mod explore;
pub mod flags;
pub mod frame_table;
pub mod in_flight;
#[doc(hidden)]
pub mod lab;
pub mod lock_rank;
pub mod marks;
#[cfg(all(test, loom))]
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
pub mod trace;

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
