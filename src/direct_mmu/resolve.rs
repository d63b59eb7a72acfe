//! From a fault to a mapping, by either thread: the reader, which must not wait, and the worker, which
//! may.

use crate::addr::Gfn;
use crate::direct_mmu::install::{Installed, Wanted};
use crate::direct_mmu::shard::{Fault, Shard};
use crate::direct_mmu::{DirectError, Mmu};
use crate::export_rmap::{LockedPage, trace};
use crate::host_mm::MmError;
use crate::sys::uffd_window::InstallError;

impl Mmu {
    /// One attempt at a fault whose page is locked.
    pub(super) fn attempt(&self, shard: &Shard, fault: Fault, page: LockedPage<'_>) -> Installed {
        trace::point!(
            "direct fault",
            client = self.client.as_u16(),
            pfn = page.pfn().index(),
            gfn = fault.page,
            write = fault.write,
            protected = fault.protected,
        );
        let wanted = Wanted::of(&page, fault.write);
        drop(page);
        self.dawdle(fault.page);
        if fault.protected {
            return self.install(shard, wanted, &[], true);
        }
        let neighbours = self.neighbours(shard, fault);
        let installed = self.install(shard, wanted, &neighbours, false);
        if installed == Installed::Done && self.config.fault_around > 1 {
            let ahead = shard.lock().streams.advance(fault.page);
            self.read_ahead(shard, fault, ahead);
        }
        if installed == Installed::Refused(InstallError::NoPage) {
            // Somebody punched the frame: whoever locks the page next makes it a page of zeros.
            self.mm.expect_holes();
            return Installed::Retry;
        }
        installed
    }

    /// The page, if that takes no waiting.
    pub(super) fn try_page(&self, fault: Fault) -> Result<Option<LockedPage<'_>>, MmError> {
        self.object.try_lock_page(Gfn::new(fault.page))
    }

    /// The page, by whatever it takes.
    pub(super) fn page(&self, fault: Fault) -> Result<LockedPage<'_>, MmError> {
        let gfn = Gfn::new(fault.page);
        if fault.write { self.object.lock_page_for_write(gfn) } else { self.object.lock_page(gfn) }
    }

    pub(super) fn fail_install(&self, fault: Fault, source: InstallError) {
        self.fail(DirectError::Install { gfn: Gfn::new(fault.page), source });
    }
}
