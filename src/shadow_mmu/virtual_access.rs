//! Guest memory by guest virtual address, for instruction fetch, exception frames and operands.

use crate::addr::{Gpa, Gva, PAGE_SIZE};
use crate::host_mm::MmError;
use crate::shadow_mmu::walk::{Access, PagingContext, Walk};
use crate::shadow_mmu::{Mmu, ShadowMmu};

/// An access on the guest's behalf that could not be made.
#[derive(Debug, thiserror::Error)]
pub enum GuestAccessError {
    /// The guest's own tables do not allow it.
    #[error("page fault at guest-virtual {gva}, error code {error_code:#x}")]
    PageFault {
        /// The address that faulted.
        gva: Gva,
        /// The `#PF` error code.
        error_code: u32,
    },
    /// The guest maps the address to something that is not RAM.
    #[error("guest-physical {gpa} is not RAM")]
    OutsideRam {
        /// Where it maps it to.
        gpa: Gpa,
    },
    /// The host failed.
    #[error(transparent)]
    Host(#[from] MmError),
}

/// The part of an access that lies in one page.
struct Part {
    gpa: Gpa,
    start: usize,
    len: usize,
}

impl ShadowMmu {
    /// Copies guest memory out, with the access' rights checked.
    ///
    /// # Errors
    /// [`GuestAccessError`]; `buf` may have been filled in part.
    pub fn read_virtual(
        &self,
        context: &PagingContext,
        gva: Gva,
        buf: &mut [u8],
        access: Access,
    ) -> Result<(), GuestAccessError> {
        for part in self.mmu.translate(context, gva, buf.len(), access)? {
            self.mmu.object.read(part.gpa, &mut buf[part.start..part.start + part.len])?;
        }
        Ok(())
    }

    /// Copies bytes into guest memory and sets its accessed and dirty bits as a processor's store
    /// would. Every page is translated before the first byte is written.
    ///
    /// # Errors
    /// [`GuestAccessError`]; on a page fault nothing was written.
    pub fn write_virtual(
        &self,
        context: &PagingContext,
        gva: Gva,
        buf: &[u8],
    ) -> Result<(), GuestAccessError> {
        for part in self.mmu.translate(context, gva, buf.len(), Access::Write)? {
            self.mmu.object.write(part.gpa, &buf[part.start..part.start + part.len])?;
        }
        Ok(())
    }
}

impl Mmu {
    fn translate(
        &self,
        context: &PagingContext,
        gva: Gva,
        len: usize,
        access: Access,
    ) -> Result<Vec<Part>, GuestAccessError> {
        let mut parts = Vec::new();
        let mut start = 0;
        while start < len {
            // Past the end of the address space nothing is mapped: a page fault like any other.
            let at = Gva::new(gva.as_u64().wrapping_add(start as u64));
            let offset = at.page_offset();
            let chunk = (len - start).min(PAGE_SIZE - offset);
            match self.walk(context, at, access)? {
                Walk::Mapped(translation) => {
                    let gpa = Gpa::new(translation.gfn.base().as_u64() | offset as u64);
                    if !self.object.contains(translation.gfn) {
                        return Err(GuestAccessError::OutsideRam { gpa });
                    }
                    parts.push(Part { gpa, start, len: chunk });
                }
                Walk::Fault(error_code) | Walk::Contended(error_code) => {
                    return Err(GuestAccessError::PageFault { gva: at, error_code });
                }
            }
            start += chunk;
        }
        Ok(parts)
    }
}
