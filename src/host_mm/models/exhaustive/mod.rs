//! What loom goes through: small models, one question each.

mod dirty;
mod fault;
mod iotlb;
mod lending;
mod reuse;
mod sharing;
mod two_clients;

use std::iter;

use crate::models::client::{Client, DIRTY, WRITABLE};
use crate::models::host::{Host, gfn};
use crate::object::pages::ObjectPages;
use crate::sources::{clone, lend, migrate};
use gnomon_export_rmap::addr::Pfn;
use gnomon_export_rmap::sync::Ordering;
use gnomon_export_rmap::{FrameTable, LockedPage, SequenceToken};

const FRAME: Pfn = Pfn::new(0);
/// Number of a memory object beside the one that there is.
const OTHER_OBJECT: u16 = 1;

impl Host {
    /// Lends the page: `borrow` gets its frame, locked, and its first word.
    fn lend(&self, page: usize, mut borrow: impl FnMut(&LockedPage<'_>, u32)) {
        let mut take = |_, page: &LockedPage<'_>, content: &[u8; 4096]| {
            let [a, b, c, d, ..] = *content;
            borrow(page, u32::from_le_bytes([a, b, c, d]));
        };
        lend::lend(&self.pager, &self.pages, &[gfn(page)], &mut take).unwrap();
    }

    /// Shares the page with another memory object.
    fn share(&self, page: usize) {
        let other = ObjectPages::new(OTHER_OBJECT, self.pages.bytes);
        clone::share(&self.pager, &self.pages, &other, iter::once(gfn(page))).unwrap();
    }

    /// Moves the page in a frame to another, unless somebody has it locked; whether it did.
    fn migrate(&self, frame: Pfn) -> bool {
        migrate::migrate(&self.pager, &[frame]).unwrap() == 1
    }

    /// Forgets the page.
    fn discard(&self, page: usize) {
        if let Some(entry) = self.pages.touched_entry(gfn(page)) {
            self.pager.discard_page(entry, self.pages.owner(gfn(page)));
        }
    }
}

impl Client {
    /// Lets the next flush fail.
    fn refuse_next_flush(&self) {
        self.refuses.store(1, Ordering::Relaxed);
    }

    /// Whether an SPTE says that its page was written through it.
    fn is_dirty(&self, page: usize) -> bool {
        self.sptes[page].load(Ordering::Relaxed) & DIRTY != 0
    }

    /// Whether an SPTE allows its page to be written.
    fn may_write(&self, page: usize) -> bool {
        self.sptes[page].load(Ordering::Relaxed) & WRITABLE != 0
    }

    /// The second half of a fault; `false` if it must start over.
    fn install(&self, table: &FrameTable, page: usize, write: bool, token: SequenceToken) -> bool {
        self.install_with(table, page, write, token, WRITABLE)
    }
}
