//! What can go wrong in the VMM layer, by who is at fault: the host, the configuration, the guest.
//!
//! Guarantee: every value is one sentence with the numbers in it, and carries them as data; it names
//! nothing of the machine that failed, so that every room above can say it.

mod boot;
mod guest;
mod linux;
mod stale_access;

use std::io;

use crate::direct_mmu::DirectError;
use crate::host_mm::MmError;

use super::kvm::device::KvmError;
use super::kvm::pinned::MapError;

pub use boot::BootError;
pub use guest::GuestError;
pub use linux::{LinuxError, NEEDS_VIRTUALISATION};
pub use stale_access::StaleAccess;

/// Why a VM could not be made, or was ended.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// KVM is missing, too old, or refused a request.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The kernel image or its command line cannot be booted.
    #[error("cannot boot the guest: {0}")]
    Boot(#[from] BootError),
    /// A Linux kernel, or what goes with it, cannot be booted.
    #[error("cannot boot Linux: {0}")]
    Linux(#[from] LinuxError),
    /// Guest RAM has a size that no VM can have.
    #[error(
        "guest memory of {bytes} bytes: it must be a multiple of 4096 from {min} to {max} bytes"
    )]
    MemorySize {
        /// What was asked for.
        bytes: u64,
        /// Least that works.
        min: u64,
        /// Most that works.
        max: u64,
    },
    /// A number of vCPUs that this host or the contract with the guest does not allow.
    #[error("{vcpus} vCPUs: this host runs 1 to {max}; choose a number of these")]
    VcpuCount {
        /// What was asked for.
        vcpus: usize,
        /// Most that works.
        max: usize,
    },
    /// The bound on shadow pages is too low to make progress.
    #[error("a bound of {pages} shadow pages: {vcpus} vCPUs need at least {min}; raise it")]
    ShadowPages {
        /// What was asked for.
        pages: u32,
        /// Number of vCPUs.
        vcpus: usize,
        /// Least that works.
        min: u32,
    },
    /// The machine space does not fit this processor's physical addresses.
    #[error(
        "the machine space ends at {end:#x}, but this host's guests have {phys_bits}-bit physical addresses; choose less host memory"
    )]
    MachineSpace {
        /// First byte after the last slot.
        end: u64,
        /// Width of a physical address.
        phys_bits: u32,
    },
    /// Host memory for one of the pinned slots could not be mapped.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The probe of the host's KVM did not get its tiny VM to run as it should.
    #[error("cannot find out what kind of KVM this is: {found}")]
    Probe {
        /// What happened instead.
        found: String,
    },
    /// The ground on which all revocation stands is missing.
    #[error(
        "this host's KVM keeps using translations of memory that was dropped by madvise(MADV_DONTNEED): its MMU notifier does not work, and no guest can be run safely"
    )]
    ZapWithoutEffect,
    /// There is nothing to clone.
    #[error(
        "cannot clone the VM: none of its vCPUs is running; clone one that was started and is not over"
    )]
    NotRunning,
    /// A vCPU or the DMA device did not stand still for a clone.
    #[error(
        "cannot clone the VM now: one of its vCPUs, or its DMA device, is busy with the host, as with a disk or a peer that does not answer; try again"
    )]
    NotInTime,
    /// A window shows one memory object, and each of its pages in one frame.
    #[error("a guest with direct paging cannot be cloned: run it with --paging shadow")]
    CloneOfWindow,
    /// A part of a VM could not be copied.
    #[error("cannot copy the {what} of the VM: {source}")]
    Copy {
        /// Which part.
        what: &'static str,
        /// The reason.
        source: io::Error,
    },
    /// A thread could not be started.
    #[error(
        "cannot start the thread of vCPU {vcpu}: {source}; give less --vcpus, or see what `gnomon doctor` says of threads and address space"
    )]
    Thread {
        /// Index of the vCPU.
        vcpu: usize,
        /// The operating system's reason.
        source: io::Error,
    },
    /// The DMA device's thread could not be started.
    #[error(
        "cannot start the thread of the DMA device: {source}; see what `gnomon doctor` says of threads and address space"
    )]
    DeviceThread {
        /// The operating system's reason.
        source: io::Error,
    },
    /// The host's memory management failed under the guest.
    #[error("host memory: {0}")]
    Host(#[from] MmError),
    /// A page of a guest with direct paging cannot be had.
    #[error("direct paging: {0}")]
    Paging(#[source] Box<DirectError>),
    /// The guest did something that ends it.
    #[error("vCPU {vcpu} at RIP {rip:#x}: {source}")]
    Guest {
        /// Index of the vCPU.
        vcpu: usize,
        /// Where it was.
        rip: u64,
        /// What it did.
        source: GuestError,
    },
    /// The tripwire caught an access that should not have been possible: a bug in Gnomon, stopped.
    #[error("I1 violated: {0}")]
    Stale(StaleAccess),
    /// A vCPU thread panicked: a bug in Gnomon, contained.
    #[error("the thread of vCPU {vcpu} panicked: {message}; this is a bug in Gnomon")]
    Panicked {
        /// Index of the vCPU.
        vcpu: usize,
        /// The panic's message.
        message: String,
    },
    /// The DMA device's thread panicked: a bug in Gnomon, contained.
    #[error("the thread of the DMA device panicked: {message}; this is a bug in Gnomon")]
    DevicePanicked {
        /// The panic's message.
        message: String,
    },
}
