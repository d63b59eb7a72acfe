//! Why a guest that keeps to the contract cannot be booted.

use crate::host_mm::MmError;

/// Why a guest cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The image is too big to be a guest kernel.
    #[error(
        "the kernel image has {bytes} bytes, more than the {max} that are allowed: name another"
    )]
    TooBig {
        /// Its size.
        bytes: u64,
        /// The bound.
        max: u64,
    },
    /// Not an ELF file, or a damaged one; nor is it a bzImage, or it would not have come here.
    #[error(
        "the kernel image is neither a bzImage nor an ELF file ({found}): name a Linux kernel, such as /boot/vmlinuz-…, or an ELF file that keeps to the guest ABI"
    )]
    NotElf {
        /// What it is instead, as far as can be seen.
        found: String,
    },
    /// An ELF file whose headers cannot be.
    #[error(
        "the kernel image is an ELF file with a damaged header: {what}; copy it again, or name another"
    )]
    DamagedElf {
        /// What is wrong with it.
        what: &'static str,
    },
    /// The file ends before the tables that its header names.
    #[error(
        "the kernel image is truncated: it has {found} bytes, and its ELF header says that it has {expected} at least; copy it again"
    )]
    CutOff {
        /// Bytes of the file.
        found: u64,
        /// Bytes by the header.
        expected: u64,
    },
    /// An ELF file for something else.
    #[error(
        "the kernel image is an ELF file with {field} {found}, but {wanted} is needed: link it so, or name another"
    )]
    WrongKind {
        /// Which header field.
        field: &'static str,
        /// Its value.
        found: String,
        /// The value that works.
        wanted: &'static str,
    },
    /// Nothing to load.
    #[error("the kernel image has no segment to load: link it anew, or name another")]
    NoSegments,
    /// The file ends before a segment's bytes do.
    #[error(
        "segment {index} of the kernel image has {file_bytes} bytes at file offset {offset:#x}, but the file ends at {file_end:#x}; copy it again"
    )]
    Truncated {
        /// Program header index.
        index: usize,
        /// Its file offset.
        offset: u64,
        /// Its size in the file.
        file_bytes: u64,
        /// Size of the file.
        file_end: u64,
    },
    /// A segment that is larger in the file than in memory.
    #[error(
        "segment {index} of the kernel image has {file_bytes} bytes in the file but only {memory_bytes} in memory: copy or link it again"
    )]
    Inverted {
        /// Program header index.
        index: usize,
        /// Its size in the file.
        file_bytes: u64,
        /// Its size in memory.
        memory_bytes: u64,
    },
    /// A segment outside the memory that a kernel may use.
    #[error(
        "segment {index} of the kernel image lies at {start:#x} with {bytes} bytes, outside guest RAM for kernels, {min:#x} to {end:#x}: link it to lie there, or choose more memory"
    )]
    OutsideRam {
        /// Program header index.
        index: usize,
        /// Guest-physical start.
        start: u64,
        /// Size in memory.
        bytes: u64,
        /// First address for kernels.
        min: u64,
        /// End of RAM.
        end: u64,
    },
    /// Two segments want the same memory.
    #[error("segments {first} and {second} of the kernel image overlap at {at:#x}: link it anew")]
    Overlap {
        /// One program header index.
        first: usize,
        /// The other.
        second: usize,
        /// First common address.
        at: u64,
    },
    /// The entry point is not code.
    #[error(
        "the entry point {entry:#x} of the kernel image is in none of its executable segments: link it anew"
    )]
    Entry {
        /// The entry point.
        entry: u64,
    },
    /// A command line that does not fit its place.
    #[error("the command line has {bytes} bytes, more than the {max} that fit: shorten it")]
    CmdlineTooLong {
        /// Its length.
        bytes: usize,
        /// The most that fits, without the final NUL.
        max: u64,
    },
    /// A command line that would end early.
    #[error("the command line has a NUL at byte {at}: leave it out")]
    CmdlineNul {
        /// Its offset.
        at: usize,
    },
    /// The host could not write to guest memory.
    #[error("cannot write to guest memory: {0}")]
    Memory(#[from] MmError),
}
