//! KVM as it is: the device and the VMs that it makes, what it offers, a vCPU's leaves, registers and
//! exits in its own terms, and the host's memory behind its slots.
//!
//! Guarantee: nothing is taken to be there that was not asked for: what is missing or refused is an
//! error that names it. Nothing here knows what a guest is run for, and no other room of the VMM is
//! imported.

pub(super) mod cpuid;
pub(super) mod cpuid_offered;
pub(super) mod device;
pub(super) mod exit_data;
pub(super) mod features;
pub(super) mod offer;
pub(super) mod pinned;
pub(super) mod registers;
