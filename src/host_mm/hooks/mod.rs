//! What of this layer can be broken on purpose, where its threads can be made to pause, and what the host
//! may do to it: the names by which the rooms ask the [laboratory](gnomon_export_rmap::lab), each where it
//! keeps the rule.
//!
//! Guarantee: without the feature `lab` these are names of nothing.

mod interrupt;
#[cfg(feature = "lab")]
mod slow_notifier;

use gnomon_export_rmap::lab::{Fault, Point, Rule};

pub(crate) use interrupt::interrupted_or;
#[cfg(feature = "lab")]
pub(crate) use slow_notifier::slowed;

/// Rule: frames that lost their mappings are flushed. (Broken, translations that processors cache live on.)
pub const SKIP_FLUSH: Rule = Rule::new("skip-flush");
/// Rule: the dirty state that an invalidation harvests is noted.
pub const DROP_DIRTY: Rule = Rule::new("drop-dirty");
/// Rule: old mappings are cleared before the copy of a shared page is given out. (Broken, it is the order
/// that the mail left do_wp_page with.)
pub const SET_FIRST: Rule = Rule::new("set-first");
/// Rule: frames are given to new pages after the flush.
pub const EARLY_REUSE: Rule = Rule::new("early-reuse");
/// Rule: pages that a clone shares are made read-only first.
pub const SKIP_CLONE_PROTECT: Rule = Rule::new("skip-clone-protect");
/// Rule: what is in swap stays as it was written. (Broken, every so many pages one bit flips; no page in
/// particular.)
pub const SWAP_CORRUPT: Rule = Rule::new("swap-corrupt");
/// Rule: copies of a page are taken back before it is written.
pub const SKIP_RECALL: Rule = Rule::new("skip-recall");
/// Rule: a frame with a place of its own that loses its page loses its memory.
pub const KEEP_MEMORY: Rule = Rule::new("keep-memory");

/// A frame's count has gone up; clients are about to be told.
pub const COUNTED: Point = Point::new("counted");
/// The clients know; the flush is about to begin.
pub const DETACHED: Point = Point::new("detached");
/// The flush is over; the content is about to be looked at.
pub const FLUSHED: Point = Point::new("flushed");
/// The content is where it will be; the page's entry is about to say so.
pub const SAVED: Point = Point::new("saved");
/// A frame is its page's, and has no content yet.
pub const FILLING: Point = Point::new("filling");
/// A page can be written by nobody and is about to be shared.
pub const SHARING: Point = Point::new("sharing");
/// A writer's copy of a shared page is made; its entry is about to say so.
pub const COPIED: Point = Point::new("copied");
/// A page can be written by nobody and is about to be lent.
pub const LENDING: Point = Point::new("lending");
/// Copies of a page have been taken back; it is about to be written.
pub const RECALLED: Point = Point::new("recalled");
/// Two pages have been found to be the same.
pub const COMPARED: Point = Point::new("compared");
/// A page has been copied to another frame; its entry is about to say so.
pub const MOVED: Point = Point::new("moved");
/// One of two pages that change places has its new place.
pub const EXCHANGING: Point = Point::new("exchanging");
/// A page that the guest gave back is about to lose its place.
pub const FREEING: Point = Point::new("freeing");
/// The dirty log has harvested pages; it is about to take the bits.
pub const HARVESTED: Point = Point::new("harvested");
/// A slot of swap has been taken and not been written.
pub const SLOT_TAKEN: Point = Point::new("slot-taken");
/// A slot of swap is free again; who freed it is about to go on.
pub const SLOT_FREED: Point = Point::new("slot-freed");

/// A write to swap fails, with half a page written.
pub const SWAP_WRITE: Fault = Fault::new("swap-write", "writes to swap");
/// A read from swap fails.
pub const SWAP_READ: Fault = Fault::new("swap-read", "reads from swap");
/// Swap says that no slot is free.
pub const SWAP_FULL: Fault = Fault::new("swap-full", "allocations of swap slots");
/// The system call of a write to swap writes a part only.
pub const SHORT_WRITE: Fault = Fault::new("short-write", "system calls that write to swap");
/// A call of an export notifier takes longer.
pub const SLOW_NOTIFIER: Fault = Fault::new("slow-notifier", "calls of export notifiers");
/// No free frame is found where there may be some.
pub const FRAME_ENOMEM: Fault = Fault::by_chance("frame-enomem", "allocations of frames");
/// Signals come during a system call of swap or of a flush, and it returns `EINTR`.
pub const EINTR: Fault = Fault::by_chance("eintr", "system calls of swap and flushes");
