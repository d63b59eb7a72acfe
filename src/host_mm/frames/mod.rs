//! The frames as the kernel has them: their memory, the views of it, which are free, and who is told
//! when few are.
//!
//! Guarantee: never more frames are handed out than were given, and what a frame holds is reached under
//! its page lock alone. Nothing here knows which page is in which frame.

pub(crate) mod alarm;
pub(crate) mod backing;
#[cfg(all(feature = "testing", feature = "export-notifier"))]
pub(crate) mod frame_memory;
pub(crate) mod free_list;
pub(crate) mod guest_view;
pub(crate) mod host_view;
pub(crate) mod placement;
