//! An export client, whole: maps pages of a memory object that is four times as large as
//! the host memory behind it, and gives them up when they are taken away. No KVM, no TLB: what maps a
//! page is an entry in a table, and an access goes through the entry under the client's lock.
//!
//! `cargo run --release --example tiny_client`

use std::collections::HashMap;
use std::sync::Arc;

use anyhow::Result;
use gnomon_export_rmap::addr::{Gfn, PAGE_SIZE, PAGE_SIZE_U64, Pfn};
use gnomon_export_rmap::{
    ClientId, ClientLock, ExportNotifier, FlushReason, Harvest, Invalidation, LockedPage,
    Membership, Retain, RevokeError, RmapEntry,
};
use gnomon_host_mm::{GuestView, HostMm, HostMmConfig, MemoryObject};
use vm_memory::{Bytes, VolatileMemory};

/// What maps one page.
#[derive(Clone, Copy)]
struct Mapping {
    pfn: Pfn,
    writable: bool,
    accessed: bool,
    dirty: bool,
}

struct Client {
    object: Arc<MemoryObject>,
    /// The frames, as this client sees them.
    view: GuestView,
    id: ClientId,
    /// By the number of the page in the object.
    mappings: ClientLock<HashMap<u64, Mapping>>,
}

impl Client {
    /// The client, and what keeps it in the list of those that are told of invalidations.
    fn new(object: &Arc<MemoryObject>) -> Result<(Arc<Self>, Membership)> {
        let mm = object.host_mm();
        let reservation = mm.notifiers().reserve()?;
        let client = Arc::new(Self {
            object: object.clone(),
            view: mm.map_guest_view()?,
            id: reservation.id(),
            mappings: ClientLock::default(),
        });
        let membership = reservation.register(client.clone());
        Ok((client, membership))
    }

    /// Adds to the first word of a page; what it was.
    fn add(&self, gfn: Gfn, number: u64) -> Result<u64> {
        loop {
            let mut mappings = self.mappings.lock();
            let found = mappings.get_mut(&gfn.as_u64());
            if let Some(mapping) = found.filter(|mapping| mapping.writable) {
                (mapping.accessed, mapping.dirty) = (true, true);
                // The lock is held, so nobody takes the frame away meanwhile.
                let frame =
                    self.view.region().get_slice(mapping.pfn.index() * PAGE_SIZE, PAGE_SIZE)?;
                let word: u64 = frame.read_obj(0)?;
                frame.write_obj(word + number, 0)?;
                return Ok(word);
            }
            drop(mappings);
            self.fault(gfn)?;
        }
    }

    /// Brings the page into a frame and maps it, unless it was taken away again meanwhile.
    fn fault(&self, gfn: Gfn) -> Result<()> {
        let locked = self.object.lock_page_for_write(gfn)?;
        let token = locked.sequence();
        drop(locked);
        let mut mappings = self.mappings.lock();
        let table = self.object.host_mm().frame_table();
        if mappings.contains_key(&gfn.as_u64()) {
            // Its entry stands; only the right to write is missing.
            let is_current = table.is_current(&mappings, token);
            let found = mappings.get_mut(&gfn.as_u64());
            if let Some(mapping) = found.filter(|_| is_current) {
                mapping.writable = true;
            }
            return Ok(());
        }
        let entry = RmapEntry::new(self.id, gfn.as_u64());
        if let Some(exported) = table.export(&mappings, token, entry) {
            let mapping =
                Mapping { pfn: token.pfn(), writable: true, accessed: true, dirty: false };
            mappings.insert(gfn.as_u64(), mapping);
            exported.keep();
        }
        Ok(())
    }

    /// Visits this client's mappings of a locked page; those that `visit` does not keep are gone.
    fn visit(&self, page: &LockedPage<'_>, mut visit: impl FnMut(&mut Mapping) -> Retain) {
        let mut mappings = self.mappings.lock();
        page.table().rmap_visit(page.pfn(), self.id, |gfn| {
            let retain = mappings.get_mut(&gfn).map_or(Retain::Drop, &mut visit);
            if retain == Retain::Drop {
                mappings.remove(&gfn);
            }
            retain
        });
    }
}

impl ExportNotifier for Client {
    fn invalidate_page(&self, page: &LockedPage<'_>, kind: Invalidation) -> Harvest {
        let mut harvest = Harvest::default();
        self.visit(page, |mapping| {
            if kind == Invalidation::Recall {
                // Mappings are no copies.
                return Retain::Keep;
            }
            harvest = harvest.or(Harvest { dirty: mapping.dirty, accessed: mapping.accessed });
            if kind == Invalidation::Clean {
                (mapping.writable, mapping.dirty) = (false, false);
                return Retain::Keep;
            }
            Retain::Drop
        });
        harvest
    }

    fn age_page(&self, page: &LockedPage<'_>) -> bool {
        let mut accessed = false;
        self.visit(page, |mapping| {
            accessed |= std::mem::take(&mut mapping.accessed);
            Retain::Keep
        });
        accessed
    }

    fn flush(&self, _frames: &[Pfn], _reason: FlushReason) -> Result<(), RevokeError> {
        // Nothing is cached, and nothing is in flight without the lock.
        Ok(())
    }
}

fn main() -> Result<()> {
    let mm = HostMm::new(HostMmConfig::new(8 << 20))?;
    let object = mm.create_object(32 << 20)?;
    let (client, membership) = Client::new(&object)?;
    let pages = object.bytes() / PAGE_SIZE_U64;
    for round in 0..3 {
        for page in 0..pages {
            let before = client.add(Gfn::new(page), page)?;
            anyhow::ensure!(before == round * page, "page {page} has {before} in round {round}");
        }
    }
    let stats = mm.stats();
    println!("{pages} pages in {} frames, each right three times", mm.frame_count());
    println!("{} evictions, {} pages back from swap", stats.evictions, stats.swap_ins);

    // The end: every mapping is given up, then the client leaves the list.
    object.withdraw_mappings(Gfn::new(0), pages)?;
    drop(membership);
    Ok(())
}
