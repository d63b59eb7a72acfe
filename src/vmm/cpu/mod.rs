//! The guest's processor in software: its state, the instructions that are carried out for it, and the
//! delivery of its exceptions.
//!
//! Guarantee: pure. A step reads and changes the state and the guest's memory, which it is given, and
//! nothing else: no request to KVM, no thread, no lock. So what the fuzzer runs is what the vCPUs run.
//! It takes a bounded time, and what it cannot do is an exception for the guest or the end of its VM.

pub(in crate::vmm) mod cpuid;
pub mod deliver;
pub mod emulate;
pub mod exceptions;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fake_memory;
pub mod memory;
pub mod state;

pub use state::{
    DescriptorTable, Features, GUEST_CS, GUEST_SS, GuestCpu, TaskRegister, cr0, cr4, efer, gpr,
    is_canonical, rflags,
};
