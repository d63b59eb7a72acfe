//! The contract with guests that keep to the guest ABI (`docs/guest-abi.md`), beside memory and
//! processors: what a VM may be asked to be, boot, control block, ports and devices, hypercalls.
//!
//! Guarantee: shadow and direct paging offer the same, because both offer this. Every access and every
//! hypercall is answered, and what the guest says is a claim that moves nothing outside its own VM.

pub mod boot;
pub(super) mod bus;
pub(super) mod clone;
pub(super) mod config;
pub(super) mod control_block;
pub(super) mod devices;
pub(super) mod hypercall;
pub(super) mod observer;
pub(super) mod services;
pub(super) mod vm;
