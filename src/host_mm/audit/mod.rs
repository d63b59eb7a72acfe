//! Where the pages of a memory object are, and whether each can be had: asked after a guest was
//! ended by a fault of the host, whose promise is that no content is lost. And what of a client's
//! mappings is left: asked after it has gone.

pub(in crate::host_mm) mod tripwire;

use crate::addr::{Gfn, PAGE_SIZE, Pfn};
use crate::export_rmap::{ClientId, Retain};
use crate::host_mm::books::Books;
use crate::host_mm::frames::alarm::Quiet;
use crate::host_mm::memory::HostMm;
use crate::host_mm::memory::object::MemoryObject;
use crate::host_mm::object::pages::{ObjectPages, Place};
use crate::host_mm::swap::{SwapError, SwapSpace};
use crate::sys::signal;

/// Pages that cannot be read are kept one by one up to this many.
const KEPT: usize = 64;

/// The pages of a memory object by where they are. Those that are nowhere are zeros.
#[derive(Debug, Default)]
pub struct Audit {
    /// In frames.
    pub in_frames: u64,
    /// In swap, and read back with the right checksum.
    pub in_swap: u64,
    /// In swap, and lost.
    pub lost: u64,
    /// The first of them.
    pub first_lost: Vec<(Gfn, SwapError)>,
}

impl Audit {
    /// Adds that of another memory object. A page that several share counts for each.
    pub fn add(&mut self, other: Self) {
        self.in_frames += other.in_frames;
        self.in_swap += other.in_swap;
        self.lost += other.lost;
        let room = KEPT.saturating_sub(self.first_lost.len());
        self.first_lost.extend(other.first_lost.into_iter().take(room));
    }
}

impl HostMm {
    /// Number of entries that the reverse map has of a client: none once it has unregistered. It
    /// leaves off when a [stop](signal::is_stop_asked) is asked for.
    #[must_use]
    pub fn mappings_of(&self, client: ClientId) -> u64 {
        let frames = (0..self.frame_count()).map(Pfn::new);
        let frames = frames.take_while(|_| !signal::is_stop_asked());
        let frames = frames.filter(|&pfn| !self.pager.table.is_rmap_empty(pfn));
        let mut mappings = 0;
        for pfn in frames {
            // Its own alone: those of the clients that are there are many.
            self.pager.table.rmap_visit(pfn, client, |_| {
                mappings += 1;
                Retain::Keep
            });
        }
        mappings
    }
}

impl MemoryObject {
    /// Reads each page in swap, and leaves it there. Nobody may use the object meanwhile: a page that
    /// moves would be missed. It leaves off when a [stop](signal::is_stop_asked) is asked for.
    #[must_use]
    pub fn audit(&self, quiet: &Quiet<'_>) -> Audit {
        debug_assert!(self.mm.is_quiet(quiet), "it is another host memory's");
        let pager = &self.mm.pager;
        let mut audit = Audit::default();
        for (gfn, entry) in self.pages.touched().take_while(|_| !signal::is_stop_asked()) {
            audit_page(pager, &pager.swap, &self.pages, gfn, entry.load(), &mut audit);
        }
        audit
    }
}

fn audit_page(
    of: &Books,
    swap: &SwapSpace,
    pages: &ObjectPages,
    gfn: Gfn,
    place: Place,
    audit: &mut Audit,
) {
    match place {
        Place::Absent => {}
        Place::Frame(_) => audit.in_frames += 1,
        Place::Swap(slot) => {
            let mut content = [0; PAGE_SIZE];
            match swap.read_page(slot, pages.owner(gfn).tag(), &mut content) {
                Ok(()) => audit.in_swap += 1,
                Err(error) => {
                    audit.lost += 1;
                    if audit.first_lost.len() < KEPT {
                        audit.first_lost.push((gfn, error));
                    }
                }
            }
        }
        Place::Shared(shared) => {
            let (commons, gfn) = (&of.commons.pages, shared.gfn());
            if let Some(entry) = commons.touched_entry(gfn) {
                audit_page(of, swap, commons, gfn, entry.load(), audit);
            }
        }
    }
}
