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

// Under a model checker the tests stay out, and with them the users of what is there for tests.
#![cfg_attr(any(loom, shuttle), allow(dead_code))]

mod audit;
mod books;
mod config;
mod error;
mod fault;
mod frames;
mod inject;
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
pub use inject::{
    HostFault, Injection, InjectionCount, InjectionPlan, PauseCount, PausePoint, PeerFault,
    Sabotage, When,
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
