//! What a guest did, or had done to it, that ends its VM.

use std::io;

use crate::addr::{Gpa, Gva};

/// What a guest did, or had done to it, that ends its VM.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// An exception while delivering a double fault.
    #[error(
        "triple fault (while delivering exception {first}, error code {code:#x}, CR2 {cr2:#x})"
    )]
    TripleFault {
        /// Vector of the exception that began it.
        first: u8,
        /// Its error code, or 0.
        code: u32,
        /// The guest's CR2.
        cr2: u64,
    },
    /// The real processor shut down, which no guest should be able to cause.
    #[error("triple fault (the processor shut down)")]
    Shutdown,
    /// A privileged instruction that is not emulated.
    #[error("unsupported instruction `{instruction}`")]
    UnsupportedInstruction {
        /// Disassembly.
        instruction: String,
    },
    /// The guest's page tables lead outside its memory.
    #[error("access to guest-physical {gpa}, which is neither RAM nor the pinned window")]
    OutsideRam {
        /// The address.
        gpa: Gpa,
    },
    /// The same fault came again and again although it was fixed each time.
    #[error("no progress: the fault at {gva} was fixed {times} times in a row and came again")]
    Stuck {
        /// The faulting address.
        gva: Gva,
        /// How often.
        times: u32,
    },
    /// Recycling the shadow pages did not help.
    #[error("no progress: shadow pages ran out {times} times in a row; raise their bound")]
    ShadowPagesExhausted {
        /// How often.
        times: u32,
    },
    /// An exception hit the monitor itself.
    #[error("exception {vector} inside the monitor (stack pointer {rsp:#x})")]
    MonitorFault {
        /// Its vector.
        vector: u8,
        /// The real RSP at the exit.
        rsp: u64,
    },
    /// A page fault said that reserved bits are set in Gnomon's own tables.
    #[error("reserved bits in the shadow tables: page fault at {gva}, error code {error_code:#x}")]
    ReservedBits {
        /// The faulting address.
        gva: Gva,
        /// The real error code.
        error_code: u64,
    },
    /// KVM stopped the vCPU for a reason that Gnomon has no use for.
    #[error("KVM stopped the vCPU: {exit}")]
    UnexpectedExit {
        /// The exit, with its details.
        exit: String,
    },
    /// `KVM_RUN` failed.
    #[error("KVM_RUN failed: {0}")]
    Run(#[source] io::Error),
}
