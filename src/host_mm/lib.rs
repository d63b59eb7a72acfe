//! Host memory management: the frames, the pages in them, and the ration.
//!
//! What this layer guarantees, given export clients that keep their side of the protocol:
//!
//! - a page's content is in exactly one place: nowhere (all zero), in a frame, or in a swap slot
//!   with a checksum; an operation that fails leaves it where it was;
//! - no frame changes hands before every client has given up its mappings of it *and* one flush
//!   has revoked what processors still cache (the flush is what turns a detached page
//!   into one that may be written out and freed, in types);
//! - never more frames are in use than were given (invariant I5).
//!
//! Faults come from above through [`MemoryObject`]; invalidations go up only through the
//! [notifier list](gnomon_export_rmap::NotifierList).
//!
//! # One fault and one invalidation
//!
//! Eight MiB of host memory for a guest that sees 32. Whoever maps the guest's pages (an export client: a
//! shadow MMU, an IOTLB, another process) asks for one, maps its frame as `gnomon-export-rmap` shows, and is
//! told before the frame goes to another page. `examples/tiny_client.rs` of the repository is a client to begin with.
//!
//! ```
//! use gnomon_export_rmap::PageFlags;
//! use gnomon_export_rmap::addr::{Gfn, PAGE_SIZE_U64};
//! use gnomon_host_mm::{HostMemory, HostMmConfig};
//!
//! # fn main() -> Result<(), gnomon_host_mm::MmError> {
//! let mut mm = HostMemory::new(HostMmConfig::new(8 << 20))?;
//! mm.start_reclaim()?;
//! let object = mm.create_object(32 << 20)?;
//!
//! // A fault: the page is brought into a frame (zeros the first time), and is locked, so that it stays there.
//! let page = object.lock_page_for_write(Gfn::new(3))?;
//! assert!(page.flags().contains(PageFlags::IN_USE) && !page.is_read_only());
//! // Here a client takes `page.sequence()`, unlocks, takes its own lock, and exports the frame.
//! drop(page);
//!
//! // What the host itself writes and reads needs no mapping. More than the ration goes to swap and back.
//! for page in 0..object.bytes() / PAGE_SIZE_U64 {
//!     object.write(Gfn::new(page).base(), &page.to_le_bytes())?;
//! }
//! assert!(mm.stats().swap_outs > 0 && mm.resident_bytes()? <= 8 << 20);
//!
//! // An invalidation: asked for here, made all the time by reclaim. No client has the frame after it.
//! let page = object.lock_page(Gfn::new(3))?;
//! let frame = page.pfn();
//! drop(page);
//! mm.evict_frames(&[frame])?;
//! let mut number = [0; 8];
//! object.read(Gfn::new(3).base(), &mut number)?;
//! assert_eq!(u64::from_le_bytes(number), 3);
//! # Ok(())
//! # }
//! ```

// Under a model checker the tests stay out, and with them the users of what is there for tests.
#![cfg_attr(any(loom, shuttle), allow(dead_code))]

mod audit;
mod books;
mod config;
mod error;
mod fault;
mod frames;
#[doc(hidden)]
pub mod hooks;
mod memory;
mod object;
mod reclaim;
mod revoke;
mod sources;
mod stats;
pub mod swap;
mod violations;

pub use audit::Audit;
pub use audit::tripwire::{TripReport, TripwireWatch};
pub use books::Books;
pub use config::{HostMmConfig, ReclaimPolicy};
pub use error::MmError;
pub use frames::alarm::Quiet;
#[cfg(all(feature = "testing", feature = "export-notifier"))]
pub use frames::frame_memory::FrameMemory;
pub use frames::free_list::{MAX_HOST_MEMORY_BYTES, MIN_HOST_MEMORY_BYTES};
pub use frames::guest_view::GuestView;
pub use frames::guest_view::page_runs;
pub use frames::placement::Placement;
#[cfg(feature = "lab")]
#[doc(hidden)]
pub use gnomon_export_rmap::lab::{
    HostFault, Injection, InjectionCount, InjectionPlan, PauseCount, When,
};
pub use memory::HostMm;
pub use memory::object::MemoryObject;
pub use memory::owner::HostMemory;
pub use reclaim::BackgroundReclaim;
pub use revoke::Revoker;
pub use revoke::free_frame::{FreeFrame, Mover};
pub use revoke::vacate::Vacator;
pub use revoke::write_out::Saver;
pub use sources::dirty_log::DirtyLog;
pub use sources::merge::Merged;
pub use sources::remap::MAX_REMAP_PAGES;
pub use stats::MmStats;
pub use swap::SwapConfig;
pub use violations::{MmViolation, ViolationKind};

#[cfg(all(test, any(loom, shuttle)))]
mod models;
#[cfg(all(test, not(any(loom, shuttle))))]
mod tests;
