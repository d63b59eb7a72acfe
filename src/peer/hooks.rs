//! What of lending to peers can be broken on purpose, and how a peer may go wrong at an invalidation.

use crate::export_rmap::lab::{Fault, Rule};

/// Rule: a peer's copies are taken from it when it has given them up.
pub const SKIP_PUNCH: Rule = Rule::new("skip-punch");

/// A peer does not answer an invalidation, or any after it.
pub const PEER_HANG: Fault = Fault::new("peer-hang", "invalidations sent to peers");
/// A peer goes away instead of answering an invalidation.
pub const PEER_KILL: Fault = Fault::new("peer-kill", "invalidations sent to peers");
