//! The guarantees of this layer, against an export client made of plain memory.

#[cfg(feature = "export-notifier")]
mod background;
#[cfg_attr(not(feature = "export-notifier"), allow(dead_code))]
mod client;
#[cfg(feature = "export-notifier")]
mod clock;
#[cfg_attr(not(feature = "export-notifier"), allow(dead_code))]
mod rig;

#[cfg(feature = "export-notifier")]
mod concurrent;
mod content;
#[cfg(feature = "export-notifier")]
mod dirty_log;
#[cfg(feature = "export-notifier")]
mod history;
mod injected;
#[cfg(feature = "export-notifier")]
mod last_moment;
#[cfg(feature = "export-notifier")]
mod left;
#[cfg(feature = "export-notifier")]
mod lending;
#[cfg(feature = "export-notifier")]
mod model;
#[cfg(feature = "export-notifier")]
mod protocol;
#[cfg(feature = "export-notifier")]
mod quality;
#[cfg(feature = "export-notifier")]
mod removed;
#[cfg(feature = "export-notifier")]
mod sharing;
#[cfg(feature = "export-notifier")]
mod sources;
mod swap_trouble;
#[cfg(not(feature = "export-notifier"))]
mod without_notifier;
