//! A reference for the shadow MMU, without KVM: software processors run on the shadow tables, and a
//! naive model of the guest's paging says what they must find. The unit tests and the fuzzer share
//! it; it is in no other build.

#![cfg_attr(not(test), allow(dead_code, reason = "the directed tests use more of it"))]

pub(crate) mod cpu;
mod host;
pub(crate) mod machine;
pub(crate) mod memory;
pub(crate) mod model;
mod other;
pub(crate) mod rig;
pub(crate) mod step;
mod tlb;
