//! The frames as the kernel has them: their memory, the views of it, which are free, and who is told
//! when few are.
//!
//! Guarantee: never more frames are handed out than were given, and what a frame holds is reached under
//! its page lock alone. Nothing here knows which page is in which frame.

pub(in crate::host_mm) mod alarm;
#[cfg(all(any(test, feature = "fuzzing"), feature = "export-notifier"))]
pub(in crate::host_mm) mod frame_memory;
pub(in crate::host_mm) mod free_list;
pub(in crate::host_mm) mod guest_view;
pub(in crate::host_mm) mod host_view;
pub(in crate::host_mm) mod placement;
