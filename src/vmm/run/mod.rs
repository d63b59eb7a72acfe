//! The one runtime: a [`Machine`](machine::Machine) with the threads of its vCPUs, the gate that all guest
//! code lies behind, the roster of who runs, kicks, the bus behind ports and device memory, what is counted,
//! and the outcome.
//!
//! Guarantee: a stop gets every vCPU out within one exit, a pause finds all of them outside, and a
//! machine ends once, with one [`Outcome`](outcome::Outcome). Nothing here knows how guest code is run, how
//! memory is mapped or what the guest is: the first two are a [`Processor`](processor::Processor) and its
//! [`Space`](processor::Space), all that a new kind of machine brings, and what accesses reach that are not
//! memory is a [`Bus`](bus::Bus).

pub(super) mod brief_wait;
pub(super) mod bus;
pub(super) mod core;
#[cfg(test)]
pub(super) mod fakes;
pub(super) mod gate;
pub(super) mod kick;
pub(super) mod machine;
pub(super) mod outcome;
pub(super) mod processor;
pub(super) mod roster;
pub(super) mod stats;
pub(super) mod threads;
