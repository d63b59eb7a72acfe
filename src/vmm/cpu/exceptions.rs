//! Exceptions as values: vectors, error codes and the reasons that end an emulation step early.

use crate::host_mm::MmError;
use crate::vmm::error::GuestError;

use super::memory::AccessError;

/// Exception vectors (Intel SDM Vol. 3, table 7-1).
pub mod vector {
    /// #DE, divide error.
    pub const DE: u8 = 0;
    /// #DB, debug.
    pub const DB: u8 = 1;
    /// #BP, breakpoint.
    pub const BP: u8 = 3;
    /// #OF, overflow.
    pub const OF: u8 = 4;
    /// #UD, invalid opcode.
    pub const UD: u8 = 6;
    /// #DF, double fault.
    pub const DF: u8 = 8;
    /// #TS, invalid TSS.
    pub const TS: u8 = 10;
    /// #NP, segment not present.
    pub const NP: u8 = 11;
    /// #SS, stack fault.
    pub const SS: u8 = 12;
    /// #GP, general protection.
    pub const GP: u8 = 13;
    /// #PF, page fault.
    pub const PF: u8 = 14;
    /// #AC, alignment check.
    pub const AC: u8 = 17;
    /// #VE, virtualisation exception.
    pub const VE: u8 = 20;
    /// #CP, control protection.
    pub const CP: u8 = 21;
    /// #VC, VMM communication (AMD).
    pub const VC: u8 = 29;
    /// #SX, security (AMD).
    pub const SX: u8 = 30;
}

/// Number of vectors that processors use for exceptions.
pub const EXCEPTION_VECTORS: u8 = 32;

/// Whether the processor pushes an error code for `vector`.
#[must_use]
pub const fn has_error_code(vector: u8) -> bool {
    use vector::{AC, CP, DF, GP, NP, PF, SS, SX, TS, VC};
    matches!(vector, DF | TS | NP | SS | GP | PF | AC | CP | VC | SX)
}

/// An exception to be delivered to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// Vector: 0 to 31, or any that was asked for.
    pub vector: u8,
    /// Error code that goes on the stack; `None` for vectors without one.
    pub error_code: Option<u32>,
    /// For #PF: the value for CR2.
    pub cr2: Option<u64>,
    /// For what an instruction asked for by number (`int n`, `int3`): the instruction's address, which
    /// is where the guest is if that cannot be delivered.
    pub asked_at: Option<u64>,
}

impl Exception {
    /// An exception without an error code.
    #[must_use]
    pub const fn plain(vector: u8) -> Self {
        Self { vector, error_code: None, cr2: None, asked_at: None }
    }

    /// An exception with an error code.
    #[must_use]
    pub const fn with_code(vector: u8, error_code: u32) -> Self {
        Self { vector, error_code: Some(error_code), cr2: None, asked_at: None }
    }

    /// #GP with `error_code`.
    #[must_use]
    pub const fn general_protection(error_code: u32) -> Self {
        Self::with_code(vector::GP, error_code)
    }

    /// #PF at `gva`.
    #[must_use]
    pub const fn page_fault(gva: u64, error_code: u32) -> Self {
        Self { cr2: Some(gva), ..Self::with_code(vector::PF, error_code) }
    }

    /// `int vector` or `int3` at `rip`: no error code, whatever the vector.
    #[must_use]
    pub const fn asked(vector: u8, rip: u64) -> Self {
        Self { asked_at: Some(rip), ..Self::plain(vector) }
    }

    /// The bit EXT of the error code of a fault that keeps it from being delivered: clear only if the
    /// program asked for it (Intel SDM Vol. 3, 7.13).
    #[must_use]
    pub const fn external(&self) -> u32 {
        if self.asked_at.is_some() { 0 } else { 1 }
    }

    /// Whether it is a fault, and not a trap or an abort: RF is then set in the saved flags (Intel SDM
    /// Vol. 3, 19.3.1.1). #DB is always a trap here, as there are no breakpoints.
    #[must_use]
    pub const fn is_fault(&self) -> bool {
        use vector::{BP, DB, DF, OF};
        self.asked_at.is_none() && !matches!(self.vector, DB | BP | OF | DF)
    }
}

/// Why an instruction was not completed.
#[derive(Debug)]
pub enum Stop {
    /// The guest gets this exception; its state is as before the instruction.
    Inject(Exception),
    /// The guest did something that Gnomon does not support: its VM ends.
    Guest(GuestError),
    /// The host failed under the guest: its VM ends.
    Host(MmError),
}

impl From<AccessError> for Stop {
    fn from(error: AccessError) -> Self {
        match error {
            AccessError::PageFault { gva, error_code } => {
                Self::Inject(Exception::page_fault(gva.as_u64(), error_code))
            }
            AccessError::BeyondLimit => Self::Inject(Exception::general_protection(0)),
            AccessError::OutsideRam { gpa } => Self::Guest(GuestError::OutsideRam { gpa }),
            AccessError::Host(error) => Self::Host(error),
        }
    }
}

impl From<GuestError> for Stop {
    fn from(error: GuestError) -> Self {
        Self::Guest(error)
    }
}
