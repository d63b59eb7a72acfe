//! Why a Linux guest cannot be booted.

use std::io;

use crate::host_mm::MmError;

use super::BootError;

/// What a host that cannot run stock kernels lacks.
pub const NEEDS_VIRTUALISATION: &str =
    "use a host with VMX or SVM, or one that passes them on to this virtual machine";

/// Why a Linux guest cannot be booted: a sentence that says what to change.
#[derive(Debug, thiserror::Error)]
pub enum LinuxError {
    /// More memory than fits below the devices.
    #[error(
        "a Linux guest of {bytes} bytes: at most {max} bytes ({} GiB) are supported; choose less memory",
        max >> 30
    )]
    MemorySize {
        /// What was asked for.
        bytes: u64,
        /// Most that works.
        max: u64,
    },
    /// A host whose KVM runs no kernel but those that keep to the guest ABI.
    #[error("this host cannot run stock Linux kernels: {why}; {NEEDS_VIRTUALISATION}")]
    Host {
        /// Why, as half a sentence.
        why: &'static str,
    },
    /// Neither a bzImage nor a vmlinux.
    #[error(
        "the kernel image is neither a bzImage nor an ELF file (vmlinux): name the kernel that a distribution installs as /boot/vmlinuz-…"
    )]
    NotAKernel,
    /// The ELF file cannot be a kernel.
    #[error(transparent)]
    Elf(#[from] BootError),
    /// The file ends before its header says.
    #[error(
        "the bzImage is truncated: it has {found} bytes, and its header says that it has {expected}; copy it again"
    )]
    TruncatedKernel {
        /// Bytes of the file.
        found: u64,
        /// Bytes by the header.
        expected: u64,
    },
    /// An old kernel, or one for another processor.
    #[error(
        "the bzImage has boot protocol {}.{:02}{}: a 64-bit kernel of Linux 3.8 or later is needed; name one", .version >> 8, .version & 0xff,
        if *.is_64_bit { "" } else { " and no 64-bit entry" }
    )]
    Protocol {
        /// As in the header: the major number in the upper byte.
        version: u16,
        /// Whether it says that it has the 64-bit entry.
        is_64_bit: bool,
    },
    /// The setup header contradicts itself.
    #[error("the bzImage has a damaged header: {field} is {value:#x}; copy it again")]
    Header {
        /// Which field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// The kernel needs more memory than there is.
    #[error(
        "the kernel needs guest memory up to {end} bytes, and there are {memory_bytes}: choose more memory, {} MiB at least",
        end.div_ceil(1 << 20)
    )]
    KernelTooLarge {
        /// First byte after what it needs.
        end: u64,
        /// Memory of the guest.
        memory_bytes: u64,
    },
    /// The kernel needs memory where no guest's kernel can be.
    #[error(
        "the kernel is built to lie at {start:#x} and needs guest memory from there up to {end} bytes ({} MiB), and here a kernel has to lie in the first {} MiB, whatever the guest's memory: use one that is built for a lower address (CONFIG_PHYSICAL_START) or is smaller",
        end.div_ceil(1 << 20), max >> 20
    )]
    KernelTooHigh {
        /// Where it begins.
        start: u64,
        /// First byte after what it needs.
        end: u64,
        /// First byte that no guest's kernel can have.
        max: u64,
    },
    /// The library that loads kernels found something that our checks did not.
    #[error("the kernel image cannot be loaded: {reason}; copy it again, or name another")]
    Loader {
        /// Its reason.
        reason: String,
    },
    /// A command line that is too long for this kernel.
    #[error(
        "the command line has {bytes} bytes, more than the {max} that this kernel takes; shorten it"
    )]
    CmdlineTooLong {
        /// Its length.
        bytes: usize,
        /// The most.
        max: u64,
    },
    /// A RAM disk without anything in it.
    #[error("the initial RAM disk is empty: name another file, or leave --initrd out")]
    InitrdEmpty,
    /// A RAM disk that does not fit.
    #[error(
        "the initial RAM disk has {bytes} bytes, and {room} are free beside the kernel: choose more memory"
    )]
    InitrdTooLarge {
        /// Its size.
        bytes: u64,
        /// Bytes that it may have.
        room: u64,
    },
    /// A cpio archive that ends too early.
    #[error(
        "the initial RAM disk is truncated: it has {bytes} bytes and ends {what}; copy it again"
    )]
    InitrdTruncated {
        /// Its size.
        bytes: u64,
        /// In the middle of what.
        what: String,
    },
    /// More devices than there are places.
    #[error("{devices} devices: a Linux guest has at most {max}; leave some out")]
    TooManyDevices {
        /// What was asked for.
        devices: usize,
        /// Most that work.
        max: usize,
    },
    /// More vCPUs than the ACPI tables can name.
    #[error("{vcpus} vCPUs: a Linux guest has at most {max}; choose fewer")]
    TooManyVcpus {
        /// What was asked for.
        vcpus: usize,
        /// Most that work.
        max: usize,
    },
    /// The host could not write to guest memory.
    #[error("cannot write to guest memory: {0}")]
    Memory(#[from] MmError),
    /// The host has no memory to load the image with.
    #[error(
        "cannot map {bytes} bytes to load the kernel with: {source}; free memory, or raise this process's limits (`gnomon doctor` tells them)"
    )]
    Staging {
        /// How much.
        bytes: u64,
        /// The operating system's reason.
        source: io::Error,
    },
}
