//! Peers: other processes that hold copies of a guest's pages, as export clients.
//!
//! What this layer guarantees:
//!
//! - a peer's copy of a page is what the page is, from when the peer is told that it has it until it
//!   acknowledges that it has given it up: nobody writes the page meanwhile ([`crate::host_mm`] lends
//!   and recalls it);
//! - when an invalidation returns, what the peer had is gone from its page tables, whether it
//!   acknowledged or was cut off for not doing so in time;
//! - a peer never has a frame: it gets copies in a file of its own, so it can neither write a guest's
//!   memory nor see what comes into a frame later;
//! - whatever a peer sends or leaves unread, the server's time and memory for it are bounded.
//!
//! docs/peer-protocol.md has the messages and their order.

pub mod book;
pub mod client;
mod lent;
pub mod protocol;
pub mod server;
mod session;
mod tally;

pub use server::{PeerServer, ServeError, ServerConfig};
pub use tally::PeerStats;

#[cfg(all(test, feature = "export-notifier"))]
mod tests;
