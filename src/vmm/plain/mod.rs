//! A plain KVM machine: the guest has the processor's privileged mode to itself, its physical
//! addresses are KVM's, and its memory is a window that direct paging fills
//! ([`DirectMmu`](crate::direct_mmu::DirectMmu)).
//!
//! Guarantee: a machine that was started ends exactly once, with one
//! [`Outcome`](super::outcome::Outcome), by its guest, by whoever ends it, or because a page of it cannot
//! be had; and when that was waited for, or the value is dropped, none of its threads runs any more.
//!
//! What a vCPU's accesses reach that are not memory is the [`Bus`]'s matter. Who runs (the roster),
//! what keeps a vCPU out of `KVM_RUN` (the gate) and what gets it out (the kicker) are those of VMs
//! with shadow paging.

mod bus;
mod machine;
mod vcpu;

pub use super::registers::Registers;
pub use bus::{Action, Bus, HypercallResult, StartVcpu};
pub use machine::{Ender, PlainConfig, PlainMachine, Slot};
