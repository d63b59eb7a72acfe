//! How a VM ends, whatever kind it is.
//!
//! Guarantee: every way to end is one value, and has one exit code of the process.

use crate::vmm::error::VmError;

/// How a VM ended.
#[derive(Debug)]
pub enum Outcome {
    /// The guest powered off.
    PoweredOff,
    /// The guest reset its machine; it is not started again.
    Rebooted,
    /// The guest wrote to the exit port; the exit code is already that of the convention.
    GuestExit(u8),
    /// Every vCPU has halted, and nothing could have woken one.
    Halted,
    /// Ended from outside, by whoever has the VM.
    Killed,
    /// Something went wrong.
    Failed(VmError),
}

impl Outcome {
    /// The process exit code that stands for this outcome: 0 for an orderly end, the guest's own
    /// code, 130 for a kill (as by an interrupt), 1 for a failure.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::PoweredOff | Self::Rebooted | Self::Halted => 0,
            Self::GuestExit(code) => *code,
            Self::Killed => 130,
            Self::Failed(_) => 1,
        }
    }
}
