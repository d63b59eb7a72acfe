//! Guest-virtual memory as the emulator and the injection see it.
//!
//! Guarantee: no access reaches an address at or above [`abi::GVA_LIMIT`], where the monitor
//! lives, however the guest composes it; ranges that wrap around are refused the same way.

use crate::abi;
use crate::addr::{Gpa, Gva};
use crate::host_mm::MmError;
use crate::shadow_mmu::{Access, GuestAccessError, PagingContext, ShadowMmu};

/// Why a guest-virtual access did not happen.
#[derive(Debug)]
pub enum AccessError {
    /// The guest's own tables forbid it: the guest gets #PF.
    PageFault {
        /// Faulting address.
        gva: Gva,
        /// Error code as the architecture defines it, U clear.
        error_code: u32,
    },
    /// The range leaves the usable address space.
    BeyondLimit,
    /// The guest's tables lead to a guest-physical address that is no memory.
    OutsideRam {
        /// The address.
        gpa: Gpa,
    },
    /// The host could not bring the page in.
    Host(MmError),
}

impl From<GuestAccessError> for AccessError {
    fn from(error: GuestAccessError) -> Self {
        match error {
            GuestAccessError::PageFault { gva, error_code } => Self::PageFault { gva, error_code },
            GuestAccessError::OutsideRam { gpa } => Self::OutsideRam { gpa },
            GuestAccessError::Host(error) => Self::Host(error),
        }
    }
}

/// Reads and writes of guest-virtual memory with the guest's own rights.
pub trait VirtualMemory {
    /// Fills `buf` from `gva`.
    ///
    /// # Errors
    /// [`AccessError`]; `buf` then holds nothing of use.
    fn read(
        &self,
        paging: &PagingContext,
        gva: u64,
        buf: &mut [u8],
        access: Access,
    ) -> Result<(), AccessError>;

    /// Writes `buf` to `gva`, all of it or nothing.
    ///
    /// # Errors
    /// [`AccessError`]; memory is then unchanged.
    fn write(&self, paging: &PagingContext, gva: u64, buf: &[u8]) -> Result<(), AccessError>;

    /// Whether `len` bytes could be written to `gva`, as far as the guest's own tables go.
    ///
    /// # Errors
    /// What [`Self::write`] would give.
    fn check_write(&self, paging: &PagingContext, gva: u64, len: usize) -> Result<(), AccessError>;
}

/// Whether `len` bytes from `gva` all lie below [`abi::GVA_LIMIT`].
#[must_use]
pub fn is_usable(gva: u64, len: usize) -> bool {
    gva.checked_add(len as u64).is_some_and(|end| end <= abi::GVA_LIMIT)
}

impl VirtualMemory for ShadowMmu {
    fn read(
        &self,
        paging: &PagingContext,
        gva: u64,
        buf: &mut [u8],
        access: Access,
    ) -> Result<(), AccessError> {
        if !is_usable(gva, buf.len()) {
            return Err(AccessError::BeyondLimit);
        }
        Ok(self.read_virtual(paging, Gva::new(gva), buf, access)?)
    }

    fn write(&self, paging: &PagingContext, gva: u64, buf: &[u8]) -> Result<(), AccessError> {
        if !is_usable(gva, buf.len()) {
            return Err(AccessError::BeyondLimit);
        }
        Ok(self.write_virtual(paging, Gva::new(gva), buf)?)
    }

    fn check_write(&self, paging: &PagingContext, gva: u64, len: usize) -> Result<(), AccessError> {
        if !is_usable(gva, len) {
            return Err(AccessError::BeyondLimit);
        }
        Ok(self.check_write_virtual(paging, Gva::new(gva), len)?)
    }
}
