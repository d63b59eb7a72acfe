//! Guest memory through an IOTLB.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::{Bytes, VolatileMemory, VolatileSlice};

use crate::addr::{Gfn, Gpa, PAGE_SIZE, Pfn};
use crate::export_rmap::client::TOLD;
use crate::export_rmap::{
    ClientId, ExportNotifier, FlushReason, Harvest, Invalidation, LockedPage, Membership,
    RevokeError,
};
use crate::host_mm::{GuestView, HostMm, MemoryObject, MmError};
use crate::iotlb::hooks::{DEVICE_ACCESS, DEVICE_NOTED, SKIP_IOTLB_WAIT, SLOW_DEVICE};
use crate::sys::signal;

use crate::export_rmap::in_flight::IotlbStats;
use crate::export_rmap::in_flight::{DeviceAccess, InFlight, Slots};

/// A device's way to guest memory. Dropping it gives up its mappings and unregisters; no access may
/// be in flight any more.
pub struct Iotlb {
    unit: Arc<Unit>,
    // Last: every entry is given up by then.
    membership: Membership,
}

/// A page that an access is in flight to: see [`Iotlb::begin`].
pub struct PageAccess<'a> {
    unit: &'a Unit,
    in_flight: InFlight<'a>,
    gfn: Gfn,
    page: VolatileSlice<'a>,
}

impl std::fmt::Debug for PageAccess<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PageAccess").field("gfn", &self.gfn).finish_non_exhaustive()
    }
}

impl<'a> PageAccess<'a> {
    /// The page's bytes. They are the page's only as long as this is.
    pub(super) fn page(&self) -> VolatileSlice<'a> {
        self.page
    }

    /// For sabotage: an access takes its time.
    pub(super) fn dawdle(&self) {
        self.unit.dawdle(self.gfn);
    }
}

/// What the notifier list and the device share.
struct Unit {
    mm: Arc<HostMm>,
    object: Arc<MemoryObject>,
    /// The device's own mapping of the frames. Never zapped: what an access may touch is decided
    /// before each.
    view: GuestView,
    slots: Slots,
}

impl std::fmt::Debug for Iotlb {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Iotlb").field("stats", &self.stats()).finish_non_exhaustive()
    }
}

impl Iotlb {
    /// An IOTLB of so many entries, registered as an export client of the object's host memory.
    ///
    /// # Errors
    /// If the host refuses the mapping of the frames, or no client number is left.
    pub fn new(object: Arc<MemoryObject>, entries: usize) -> Result<Self, MmError> {
        let view = object.host_mm().map_guest_view()?;
        Self::with_view(object, entries, view)
    }

    /// As [`new`](Self::new), through a mapping of the frames that is there already.
    ///
    /// # Errors
    /// If no client number is left.
    pub fn with_view(
        object: Arc<MemoryObject>,
        entries: usize,
        view: GuestView,
    ) -> Result<Self, MmError> {
        let mm = object.host_mm().clone();
        let reservation = mm.reserve_client()?;
        let slots = Slots::new(reservation.id(), object.number(), entries);
        let unit = Arc::new(Unit { mm: mm.clone(), object, view, slots });
        let membership = mm.register_client(reservation, unit.clone());
        Ok(Self { unit, membership })
    }

    /// Its number among the export clients.
    #[must_use]
    pub fn client_id(&self) -> ClientId {
        self.membership.id()
    }

    /// Bytes of guest memory.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.unit.object.bytes()
    }

    /// The bytes as (guest frame, offset in it, length); checked to be guest memory.
    pub(super) fn split(
        &self,
        gpa: Gpa,
        len: usize,
    ) -> Result<impl Iterator<Item = (Gfn, usize, usize)> + use<>, MmError> {
        self.unit.object.split(gpa, len)
    }

    /// Copies guest memory out. A page at a time: not atomic against writes of others.
    ///
    /// # Errors
    /// If not all of it is guest memory, or the host cannot bring a page in.
    pub fn read(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), MmError> {
        let mut done = 0;
        for (gfn, offset, len) in self.unit.object.split(gpa, buf.len())? {
            let part = &mut buf[done..done + len];
            self.unit.access(gfn, DeviceAccess::Read, |page| {
                let (first, second) = part.split_at_mut(len / 2);
                page.read_slice(first, offset)?;
                self.unit.dawdle(gfn);
                page.read_slice(second, offset + len / 2)
            })?;
            done += len;
        }
        Ok(())
    }

    /// Copies bytes into guest memory. A page at a time, as [`read`](Self::read).
    ///
    /// # Errors
    /// As [`read`](Self::read); pages before the failing one have been written.
    pub fn write(&self, gpa: Gpa, buf: &[u8]) -> Result<(), MmError> {
        let mut done = 0;
        for (gfn, offset, len) in self.unit.object.split(gpa, buf.len())? {
            let (first, second) = buf[done..done + len].split_at(len / 2);
            self.unit.access(gfn, DeviceAccess::Write, |page| {
                page.write_slice(first, offset)?;
                self.unit.dawdle(gfn);
                page.write_slice(second, offset + len / 2)
            })?;
            done += len;
        }
        Ok(())
    }

    /// Stores an aligned word in one step; whoever loads it sees what was written before.
    ///
    /// # Errors
    /// As [`read`](Self::read), and [`MmError::View`] if the address is not a multiple of 4.
    pub fn store(&self, gpa: Gpa, word: u32) -> Result<(), MmError> {
        for (gfn, offset, _) in self.unit.object.split(gpa, size_of::<u32>())? {
            // Release pairs with the guest's own load.
            self.unit.access(gfn, DeviceAccess::Write, |page| {
                page.store(word, offset, Ordering::Release)
            })?;
        }
        Ok(())
    }

    /// Begins an access to a page, which is in flight until the result is dropped: a flush of the page
    /// waits for that. So be quick, wait for nothing meanwhile that somebody with a page lock may have,
    /// and begin no other access on the same thread.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn begin(&self, gfn: Gfn, access: DeviceAccess) -> Result<PageAccess<'_>, MmError> {
        self.unit.begin(gfn, access)
    }

    /// What has happened so far.
    #[must_use]
    pub fn stats(&self) -> IotlbStats {
        self.unit.slots.stats()
    }

    /// Compares the reverse map with the entries (invariant I3): a sentence for each difference. The
    /// host may invalidate meanwhile.
    #[must_use]
    pub fn check_reverse_map(&self) -> Vec<String> {
        self.unit.slots.differences(self.unit.mm.frame_table(), signal::is_stop_asked)
    }
}

impl Drop for Iotlb {
    fn drop(&mut self) {
        self.unit.slots.forget_everything(self.unit.mm.frame_table());
    }
}

impl Unit {
    /// Has `touch` access the page's frame while nothing can take it away.
    fn access(
        &self,
        gfn: Gfn,
        access: DeviceAccess,
        touch: impl FnOnce(&VolatileSlice<'_>) -> Result<(), vm_memory::VolatileMemoryError>,
    ) -> Result<(), MmError> {
        let page = self.begin(gfn, access)?;
        let pfn = page.in_flight.pfn();
        touch(&page.page()).map_err(|error| MmError::View { pfn, why: error.to_string() })
    }

    fn begin(&self, gfn: Gfn, access: DeviceAccess) -> Result<PageAccess<'_>, MmError> {
        let in_flight = self.translate(gfn, access)?;
        let pfn = in_flight.pfn();
        // Nobody can take the page away before the access is over: a flush waits for that.
        self.mm.check_mapping(&self.object, gfn, pfn, access == DeviceAccess::Write);
        let page = self.view.region().get_slice(pfn.index() * PAGE_SIZE, PAGE_SIZE);
        let page = page.map_err(|error| MmError::View { pfn, why: error.to_string() })?;
        Ok(PageAccess { unit: self, in_flight, gfn, page })
    }

    fn translate(&self, gfn: Gfn, access: DeviceAccess) -> Result<InFlight<'_>, MmError> {
        if let Some(in_flight) = self.slots.begin(gfn, access) {
            return Ok(in_flight);
        }
        loop {
            let page = match access {
                DeviceAccess::Read => self.object.lock_page(gfn)?,
                DeviceAccess::Write => self.object.lock_page_for_write(gfn)?,
            };
            let (token, writable) = (page.sequence(), !page.is_read_only());
            drop(page);
            self.mm.lab().pause(DEVICE_NOTED);
            let table = self.mm.frame_table();
            if let Some(in_flight) = self.slots.install(table, gfn, token, writable, access) {
                return Ok(in_flight);
            }
        }
    }

    /// Sabotage: does not wait for what is in flight to a page under the oracle. But no write may go
    /// on in a frame after that is another page's, which may be one that no oracle watches: the
    /// guest's page tables, and the guest would fall over before anything is found.
    fn wait_for_few(&self, frames: &[Pfn]) {
        let (skipped, spared): (Vec<_>, Vec<_>) = frames.iter().partition(|pfn| {
            let owner = self.mm.last_owner(**pfn);
            owner.is_some_and(|owner| self.mm.lab().breaks(SKIP_IOTLB_WAIT, || owner.gfn))
        });
        self.slots.wait_for_stale(&spared);
        self.slots.wait_for_strays(&skipped);
    }

    /// Widens the window in which an access is in flight: harmless while flushes wait for it.
    fn dawdle(&self, gfn: Gfn) {
        if let Some(time) = self.mm.lab().slowness(SLOW_DEVICE) {
            std::thread::sleep(time);
        }
        self.mm.lab().pause_for(DEVICE_ACCESS, SKIP_IOTLB_WAIT, || gfn);
    }
}

impl ExportNotifier for Unit {
    fn invalidate_page(&self, page: &LockedPage<'_>, kind: Invalidation) -> Harvest {
        let harvest = self.slots.invalidate(page, kind);
        self.mm.lab().pause(TOLD);
        harvest
    }

    fn still_allows(&self, page: &LockedPage<'_>, kind: Invalidation) -> bool {
        self.slots.still_allows(page, kind)
    }

    fn age_page(&self, page: &LockedPage<'_>) -> bool {
        self.slots.age(page)
    }

    fn flush(&self, frames: &[Pfn], reason: FlushReason) -> Result<(), RevokeError> {
        // Each access sets the accessed state anew: nothing is cached that aging would have to drop.
        // And entries are no copies.
        if matches!(reason, FlushReason::Aged | FlushReason::Recalled) {
            return Ok(());
        }
        if self.mm.lab().is_broken(SKIP_IOTLB_WAIT) {
            self.wait_for_few(frames);
        } else {
            self.slots.wait_for_stale(frames);
        }
        Ok(())
    }
}
