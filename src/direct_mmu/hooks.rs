//! What of direct paging can be broken on purpose.

use crate::export_rmap::lab::Rule;

/// Rule: a page that is cleaned or evicted is writable no longer.
pub const SKIP_WRITE_PROTECT: Rule = Rule::new("skip-wp");
/// Rule: that somebody removed a range of the window is heeded.
pub const DROP_EVENT: Rule = Rule::new("drop-event");
