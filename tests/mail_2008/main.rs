//! The export notifier as the mail of 2008-01-23 has it, and as it is completed here, side by side.
//!
//! Each file has one rule that the mail leaves out: a few actors with named steps, once as the mail
//! is written and once completed by that rule alone. A search goes through every order of their
//! steps, breadth first: what it finds first is the shortest way to lose something, and the tests
//! say which way that is, step by step. The completed form goes through the same search, and in
//! `whole.rs` all rules do together.
//!
//! These are models of a text, not of the code: that is the business of `src/host_mm/models`.
//! `docs/protocol.md` tells the losses ("What the mail would have lost").

mod search;

mod copy_on_write;
mod dirty_state;
mod exported_flag;
mod fault;
mod unregister;
mod whole;
mod zero_page;
