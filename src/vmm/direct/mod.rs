//! Machines with direct paging: a plain KVM machine, whose guest has the processor's privileged mode to
//! itself. Its physical addresses are KVM's, and its memory is a window that direct paging fills
//! ([`DirectMmu`](crate::direct_mmu::DirectMmu)).
//!
//! Guarantee: a machine that was started ends exactly once, with one
//! [`Outcome`](crate::vmm::Outcome), by its guest, by whoever ends it, or because a page of it cannot
//! be had; and when that was waited for, or the value is dropped, none of its threads runs any more.
//!
//! A [`PlainMachine`] runs any guest: what its accesses reach that are not memory is the [`Bus`]'s
//! matter. [`DirectVm`] is one with the services of the contract. What runs it is the same as with
//! shadow paging: here are its processors and what maps its memory.

mod machine;
mod processor;
mod space;
mod vm;

pub use machine::{PlainConfig, PlainMachine, Slot};
pub use processor::DirectProcessor;
pub use vm::{DirectVm, Removal};

pub use super::kvm::registers::Registers;
pub use super::run::bus::{Action, Bus, HypercallResult, StartVcpu};
pub use super::run::core::Ender;
