//! The fault path: from a touch of an address without a sufficient SPTE to an SPTE.
//!
//! No lock is held from the walk to the install, so both may have been overtaken by then:
//!
//! - by the host, which took the page's frame: the frame's
//!   [invalidation sequence](crate::export_rmap::sequence) tells;
//! - by the guest, which changed its tables and flushed: the root's flush count tells.
//!
//! Either way the fault starts over. It never installs what it read before.

use std::sync::atomic::Ordering;

use crate::addr::{Gpa, Gva};
use crate::export_rmap::client::{FAULT_CHECKED, FAULT_NOTED, LATE_INSTALL};
use crate::export_rmap::{ClientGuard, LockedPage, SequenceToken, marks, trace};
use crate::host_mm::MmError;
use crate::shadow_mmu::hooks::UPGRADE_CHECKED;
use crate::shadow_mmu::roots::{FlushCount, Root, SptePlace, State};
use crate::shadow_mmu::spte::Pte;
use crate::shadow_mmu::walk::{Access, PagingContext, Translation, Walk};
use crate::shadow_mmu::{Mmu, ShadowMmu};

/// Attempts before the vCPU re-enters the guest to fault again: its thread has other duties.
const ATTEMPTS: u32 = 64;

/// What came of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultOutcome {
    /// The SPTE is there, or the fault is to be repeated: resume the guest.
    Fixed,
    /// The guest's own page fault: inject `#PF` with this error code.
    GuestFault {
        /// The error code, U bit clear: the guest runs as a kernel.
        error_code: u32,
    },
    /// The guest maps the address to neither RAM nor the pinned window.
    OutsideRam {
        /// Where it maps it to.
        gpa: Gpa,
    },
    /// No shadow page is left: pause all vCPUs and [`recycle`](ShadowMmu::recycle).
    NeedsRecycle,
}

/// What an SPTE is to point to.
#[derive(Clone, Copy)]
pub(super) enum Target {
    /// A frame. Its page must not be written while several guest pages share it, or while copies
    /// of it are out.
    Frame {
        token: SequenceToken,
        read_only: bool,
    },
    Window(u64),
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Installed {
    Done,
    Retry,
    Full,
}

/// What one fault wants installed.
#[derive(Clone, Copy)]
pub(super) struct Install<'a> {
    pub(super) root: Root,
    pub(super) gva: Gva,
    pub(super) access: Access,
    pub(super) translation: &'a Translation,
    pub(super) target: Target,
    pub(super) flushes: FlushCount,
}

impl Target {
    /// The frame of a locked page.
    pub(super) fn of(page: &LockedPage<'_>) -> Self {
        Self::Frame { token: page.sequence(), read_only: page.is_read_only() }
    }
}

impl ShadowMmu {
    /// Resolves a guest's fault at `gva`.
    ///
    /// # Errors
    /// If the host has no frame for the page or cannot read it back; the guest cannot go on.
    pub fn fault(
        &self,
        context: &PagingContext,
        root: Root,
        gva: Gva,
        access: Access,
    ) -> Result<FaultOutcome, MmError> {
        self.mmu.fault(context, root, gva, access)
    }

    /// What has happened so far.
    #[must_use]
    pub fn stats(&self) -> super::ShadowStats {
        self.mmu.counters.snapshot()
    }
}

impl Mmu {
    fn fault(
        &self,
        context: &PagingContext,
        root: Root,
        gva: Gva,
        access: Access,
    ) -> Result<FaultOutcome, MmError> {
        for _ in 0..ATTEMPTS {
            // Before the walk: a flush after this point makes what the walk read worthless.
            let Some(flushes) = self.lock().flush_count(root) else {
                // Recycled meanwhile: the vCPU gets its new root before it runs again.
                return Ok(FaultOutcome::Fixed);
            };
            let translation = match self.walk(context, gva, access)? {
                Walk::Mapped(translation) => translation,
                Walk::Fault(error_code) => {
                    self.counters.guest_faults.add(1);
                    return Ok(FaultOutcome::GuestFault { error_code });
                }
                Walk::Contended(_) => return Ok(FaultOutcome::Fixed),
            };
            trace::point!(
                "shadow fault",
                client = self.client.as_u16(),
                root = root.number(),
                gva = gva.as_u64(),
                gfn = translation.gfn.as_u64(),
                access = access.name(),
            );
            let Some(target) = self.target(&translation, access)? else {
                let offset = gva.page_offset() as u64;
                let gpa = Gpa::new(translation.gfn.base().as_u64() | offset);
                return Ok(FaultOutcome::OutsideRam { gpa });
            };
            // Widens the time between reading a page and installing it: harmless with the retry.
            self.mm.lab().pause_for(FAULT_NOTED, LATE_INSTALL, || translation.gfn);
            let install = Install { root, gva, access, translation: &translation, target, flushes };
            match self.install(&install)? {
                Installed::Done => {
                    // Nobody asked for the neighbours: an error of theirs that matters comes back
                    // when somebody does.
                    let _ = self.fault_around(context, &install);
                    return Ok(FaultOutcome::Fixed);
                }
                Installed::Full => return Ok(FaultOutcome::NeedsRecycle),
                Installed::Retry => self.counters.retries.add(1),
            }
        }
        Ok(FaultOutcome::Fixed)
    }

    /// Brings the page in; its frame can be taken away again at once, and the token will tell.
    fn target(&self, translation: &Translation, access: Access) -> Result<Option<Target>, MmError> {
        let gfn = translation.gfn;
        if let Some(address) = self.config.machine.window_address(gfn) {
            return Ok(Some(Target::Window(address)));
        }
        if !self.object.contains(gfn) {
            return Ok(None);
        }
        let page = match access {
            Access::Write => self.object.lock_page_for_write(gfn)?,
            Access::Read | Access::Execute => self.object.lock_page(gfn)?,
        };
        Ok(Some(Target::of(&page)))
    }

    pub(super) fn install(&self, install: &Install<'_>) -> Result<Installed, MmError> {
        let mut state = self.lock();
        match state.flush_count(install.root) {
            Some(flushes) if flushes == install.flushes => {}
            // Recycled or flushed since the walk.
            _ => return Ok(Installed::Retry),
        }
        let origin = install.translation.origin;
        let Some(place) = self.spte_place(&mut state, install.root, install.gva, origin) else {
            return Ok(Installed::Full);
        };
        let new = self.new_spte(install);
        let entry = self.tables.entry(place.page, place.index);
        let old = Pte::of(entry.load(Ordering::Acquire));
        if old.is_present() && old.address() == new.address() {
            return Ok(self.upgrade(&state, place, new, install));
        }
        if old.is_present() {
            // A fault that was overtaken would zap what the one that overtook it has installed.
            if let Target::Frame { token, .. } = install.target
                && !self.mm.frame_table().is_current(&state, token)
            {
                return Ok(Installed::Retry);
            }
            // The guest mapped another page here and faulted before it flushed: a processor drops
            // the old translation on a fault.
            self.zap(&mut state, std::iter::once(place))?;
        }
        Ok(self.install_new(&state, place, new, install))
    }

    pub(super) fn new_spte(&self, install: &Install<'_>) -> Pte {
        let Translation { writable, executable, dirty, origin, .. } = *install.translation;
        let (address, read_only) = match install.target {
            Target::Frame { token, read_only } => {
                (self.config.machine.frame_address(token.pfn()), read_only)
            }
            Target::Window(address) => (address, false),
        };
        let mut spte = (Pte::PRESENT | Pte::USER | Pte::ACCESSED | origin).at(address);
        // Read-only while the guest's own entry is clean, so that its first write is seen.
        spte.set(Pte::WRITABLE, writable && dirty && !read_only);
        spte.set(Pte::DIRTY, install.access == Access::Write);
        spte.set(Pte::NO_EXECUTE, !executable);
        spte
    }

    /// Installs where nothing is; the MMU lock is held.
    pub(super) fn install_new(
        &self,
        locked: &ClientGuard<'_, State>,
        place: SptePlace,
        mut new: Pte,
        install: &Install<'_>,
    ) -> Installed {
        let mut exported = None;
        if let Target::Frame { token, .. } = install.target {
            let (table, entry) = (self.mm.frame_table(), self.rmap_entry(place));
            exported = table.export(locked, token, entry);
            if exported.is_none() {
                return Installed::Retry;
            }
            if self.mm.lab().is_broken(LATE_INSTALL) && !table.is_current(locked, token) {
                // The frame may be one of a page that no oracle watches by now.
                new.remove(Pte::WRITABLE);
            }
        }
        self.mm.lab().pause(FAULT_CHECKED);
        self.check_install(locked, new, install);
        // Release: what hardware finds through the entry was written before.
        self.tables.entry(place.page, place.index).store(new.bits(), Ordering::Release);
        if let Some(exported) = exported {
            exported.keep();
        }
        self.counters.installs.add(1);
        Installed::Done
    }

    /// Adds rights to an SPTE that points where it should; the MMU lock is held. Needs no flush:
    /// a processor walks again before it raises a fault for a right that is missing.
    fn upgrade(
        &self,
        locked: &ClientGuard<'_, State>,
        place: SptePlace,
        new: Pte,
        install: &Install<'_>,
    ) -> Installed {
        // The entry is in the reverse map, so an invalidation either is seen here or finds it.
        if let Target::Frame { token, .. } = install.target
            && !self.mm.frame_table().is_current(locked, token)
        {
            return Installed::Retry;
        }
        self.mm.lab().pause(UPGRADE_CHECKED);
        self.check_install(locked, new, install);
        let entry = self.tables.entry(place.page, place.index);
        let gained = new & !Pte::NO_EXECUTE;
        marks::grant(entry, gained.bits());
        if !new.contains(Pte::NO_EXECUTE) {
            // To take away what forbids is to add a right.
            marks::restrict(entry, Pte::NO_EXECUTE.bits());
        }
        self.counters.upgrades.add(1);
        Installed::Done
    }
}
