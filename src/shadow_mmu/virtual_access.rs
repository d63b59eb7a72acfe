//! Guest memory by guest virtual address, for instruction fetch, exception frames and operands.

use vm_memory::{Bytes, VolatileMemory};

use crate::addr::{Gpa, Gva, PAGE_SIZE, PAGE_SIZE_U64};
use crate::export_rmap::RevokeError;
use crate::host_mm::{MmError, page_runs};
use crate::shadow_mmu::walk::{Access, PagingContext, Walk};
use crate::shadow_mmu::{Mmu, ShadowMmu};
use crate::sys::memory;

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
    place: Place,
    start: usize,
    len: usize,
}

/// Where a guest-physical address lies.
enum Place {
    Ram(Gpa),
    /// Offset in the pinned window.
    Window(usize),
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
            let bytes = &mut buf[part.start..part.start + part.len];
            match part.place {
                Place::Ram(gpa) => self.mmu.object.read(gpa, bytes)?,
                Place::Window(offset) => self.mmu.read_window(offset, bytes)?,
            }
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
            let bytes = &buf[part.start..part.start + part.len];
            match part.place {
                Place::Ram(gpa) => self.mmu.object.write(gpa, bytes)?,
                Place::Window(offset) => self.mmu.write_window(offset, bytes)?,
            }
        }
        Ok(())
    }

    /// Whether a [`Self::write_virtual`] of `len` bytes would be let through. Its accessed and dirty
    /// bits are set.
    ///
    /// # Errors
    /// [`GuestAccessError`].
    pub fn check_write_virtual(
        &self,
        context: &PagingContext,
        gva: Gva,
        len: usize,
    ) -> Result<(), GuestAccessError> {
        self.mmu.translate(context, gva, len, Access::Write).map(|_| ())
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
                    let place = self.place(gpa).ok_or(GuestAccessError::OutsideRam { gpa })?;
                    parts.push(Part { place, start, len: chunk });
                }
                Walk::Fault(error_code) | Walk::Contended(error_code) => {
                    return Err(GuestAccessError::PageFault { gva: at, error_code });
                }
            }
            start += chunk;
        }
        Ok(parts)
    }

    /// `None` if there is no memory.
    fn place(&self, gpa: Gpa) -> Option<Place> {
        if self.object.contains(gpa.gfn()) {
            return Some(Place::Ram(gpa));
        }
        let page = self.config.machine.window_address(gpa.gfn())?;
        let offset = page - self.config.machine.window_base + gpa.as_u64() % PAGE_SIZE_U64;
        Some(Place::Window(usize::try_from(offset).ok()?))
    }

    /// Makes every processor drop its translations of the window's pages at these machine
    /// addresses, as [`GuestView::revoke`](crate::host_mm::GuestView::revoke) does for frames.
    pub(super) fn revoke_window(&self, addresses: &[u64]) -> Result<(), RevokeError> {
        if addresses.is_empty() {
            return Ok(());
        }
        let numbers = addresses.iter().filter_map(|&address| {
            let offset = address.checked_sub(self.config.machine.window_base)?;
            usize::try_from(offset / PAGE_SIZE_U64).ok()
        });
        let revoked = match self.window.get() {
            Some(window) => page_runs(numbers)
                .into_iter()
                .try_for_each(|(offset, len)| memory::discard(window, offset, len)),
            None => Err(std::io::Error::other(NO_WINDOW)),
        };
        revoked.map_err(|source| RevokeError { frames: addresses.len(), source })
    }

    fn read_window(&self, offset: usize, bytes: &mut [u8]) -> Result<(), MmError> {
        let window = self.window.get().ok_or_else(no_window)?;
        window.as_volatile_slice().read_slice(bytes, offset).map_err(window_error)
    }

    fn write_window(&self, offset: usize, bytes: &[u8]) -> Result<(), MmError> {
        let window = self.window.get().ok_or_else(no_window)?;
        window.as_volatile_slice().write_slice(bytes, offset).map_err(window_error)
    }
}

const NO_WINDOW: &str = "the shadow MMU was not given the pinned window";

fn no_window() -> MmError {
    window_error(NO_WINDOW)
}

fn window_error(error: impl std::fmt::Display) -> MmError {
    let source = std::io::Error::other(error.to_string());
    MmError::Host { what: "access to the pinned window", source }
}
