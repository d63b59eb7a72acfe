//! What every machine runs by: the threads of its vCPUs, the gate that each `KVM_RUN` lies behind, the
//! roster of who runs, kicks, the bus behind ports and device memory, what is counted, and the outcome.
//!
//! Guarantee: a stop gets every vCPU out within one exit, a pause finds all of them outside, and a
//! machine ends once, with one [`Outcome`](outcome::Outcome). Nothing here knows how memory is paged or
//! what the guest is: what a vCPU begins with is the roster's type parameter, and what its accesses
//! reach that are not memory is a [`Bus`](bus::Bus).

pub(super) mod brief_wait;
pub(super) mod bus;
pub(super) mod gate;
pub(super) mod kick;
pub(super) mod outcome;
pub(super) mod roster;
pub(super) mod stats;
pub(super) mod threads;
