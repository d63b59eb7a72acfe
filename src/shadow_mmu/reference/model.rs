//! The guest's paging as the manuals have it, done naively: a walk over a map of words, and all
//! the versions of the tables that a processor may still have in its TLB.

use std::collections::BTreeMap;
use std::rc::Rc;

use super::machine::{
    ACCESSED, ADDRESS, DIRTY, NO_EXECUTE, PAGE_SIZE_BIT, PHYS_BITS, PRESENT, RAM_BYTES, WRITABLE,
};
use crate::addr::{Gfn, Gpa, Gva, PAGE_SIZE_U64};
use crate::shadow_mmu::{Access, PagingContext};

/// Guest memory: 64-bit words by guest-physical address, 0 where there is none.
pub(crate) type Words = BTreeMap<u64, u64>;

/// A translation that exists, whatever may be done with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Leaf {
    pub(crate) gpa: u64,
    pub(crate) writable: bool,
    pub(crate) executable: bool,
    pub(crate) dirty: bool,
    /// All entries on the way are accessed.
    pub(crate) accessed: bool,
    /// Bytes of the guest page.
    pub(crate) size: u64,
    /// Addresses of the entries that the walk used, the leaf's last.
    pub(crate) entries: Vec<u64>,
}

impl Leaf {
    pub(crate) fn gfn(&self) -> Gfn {
        Gpa::new(self.gpa).gfn()
    }

    pub(crate) fn allows(&self, access: Access) -> bool {
        match access {
            Access::Read => true,
            Access::Write => self.writable,
            Access::Execute => self.executable,
        }
    }
}

/// Intel SDM vol. 3, table 4-12 and 4.7: the error code of the access itself.
fn access_bits(context: &PagingContext, access: Access) -> u32 {
    match access {
        Access::Read => 0b0_0000,
        Access::Write => 0b0_0010,
        Access::Execute => u32::from(context.nxe) << 4,
    }
}

/// The translation, or the error code.
pub(crate) fn walk(
    words: &Words,
    context: &PagingContext,
    gva: Gva,
    access: Access,
) -> Result<Leaf, u32> {
    let bits = access_bits(context, access);
    let mut table = context.cr3.as_u64() & ADDRESS;
    let (mut writable, mut executable) = (true, true);
    let mut accessed = true;
    let mut entries = Vec::new();
    for shift in [39, 30, 21, 12] {
        if table >= RAM_BYTES {
            return Err(bits | 0b1001);
        }
        let at = table + (gva.as_u64() >> shift & 511) * 8;
        let entry = words.get(&at).copied().unwrap_or(0);
        if entry & PRESENT == 0 {
            return Err(bits);
        }
        entries.push(at);
        let large = shift != 12 && entry & PAGE_SIZE_BIT != 0;
        let size = 1u64 << shift;
        let mut reserved = ADDRESS & !((1 << PHYS_BITS) - 1);
        if !context.nxe {
            reserved |= NO_EXECUTE;
        }
        if shift == 39 {
            reserved |= PAGE_SIZE_BIT;
        } else if large {
            // All of the address below the page's size, but bit 12, which is PAT.
            reserved |= (size - 1) & ADDRESS & !(1 << 12);
        }
        if entry & reserved != 0 {
            return Err(bits | 0b1001);
        }
        writable &= entry & WRITABLE != 0;
        executable &= entry & NO_EXECUTE == 0;
        accessed &= entry & ACCESSED != 0;
        if large || shift == 12 {
            let base = entry & ADDRESS & !(size - 1);
            let leaf = Leaf {
                gpa: base | (gva.as_u64() & (size - 1)),
                writable: writable || !context.write_protect,
                executable,
                dirty: entry & DIRTY != 0,
                accessed,
                size,
                entries,
            };
            return if leaf.allows(access) { Ok(leaf) } else { Err(bits | 0b0001) };
        }
        table = entry & ADDRESS;
    }
    unreachable!("the last level is a leaf");
}

/// What an invalidation by the guest covered.
#[derive(Clone, Copy, Debug)]
struct Flush {
    cr3: u64,
    /// Versions before this one are gone ...
    version: usize,
    /// ... for the guest page of this address; for all if there is none.
    gva: Option<Gva>,
}

/// Guest memory now and in all versions that translations may still come from.
pub(crate) struct Model {
    versions: Vec<Rc<Words>>,
    flushes: Vec<Flush>,
    pub(crate) context: PagingContext,
}

impl Model {
    pub(crate) fn new(context: PagingContext) -> Self {
        Self { versions: vec![Rc::default()], flushes: Vec::new(), context }
    }

    pub(crate) fn now(&self) -> &Words {
        &self.versions[self.versions.len() - 1]
    }

    pub(crate) fn read(&self, gpa: u64) -> u64 {
        self.now().get(&gpa).copied().unwrap_or(0)
    }

    /// A store by the guest. Any word may be an entry of some table.
    pub(crate) fn write(&mut self, gpa: u64, value: u64) {
        if (self.read(gpa) | value) & PRESENT == 0 {
            // Maps nothing before or after, whatever it is used for.
            let current = self.versions.last_mut().expect("there is one");
            Rc::make_mut(current).insert(gpa, value);
            return;
        }
        let mut next = Words::clone(self.now());
        next.insert(gpa, value);
        self.versions.push(Rc::new(next));
    }

    /// What a walk does for the access: the translation, with accessed and dirty bits set as
    /// Intel SDM vol. 3, 4.8 says, or the error code, with no bit set.
    pub(crate) fn access(&mut self, gva: Gva, access: Access) -> Result<Leaf, u32> {
        let leaf = walk(self.now(), &self.context, gva, access)?;
        let current = self.versions.last_mut().expect("there is one");
        let words = Rc::make_mut(current);
        for &at in &leaf.entries {
            *words.entry(at).or_default() |= ACCESSED;
        }
        if access == Access::Write {
            *words.entry(leaf.entries[leaf.entries.len() - 1]).or_default() |= DIRTY;
        }
        // Entries may be shared between levels.
        walk(self.now(), &self.context, gva, access)
    }

    pub(crate) fn invlpg(&mut self, gva: Gva) {
        self.flush(Some(gva));
    }

    pub(crate) fn flush_all(&mut self) {
        self.flush(None);
    }

    /// Every translation is made anew from now on.
    pub(crate) fn forget_versions(&mut self) {
        self.versions.drain(..self.versions.len() - 1);
        self.flushes.clear();
    }

    fn flush(&mut self, gva: Option<Gva>) {
        let (cr3, version) = (self.context.cr3.as_u64(), self.versions.len() - 1);
        self.flushes.push(Flush { cr3, version, gva });
    }

    /// Every translation for reading that a TLB may hold for the address, the current one last.
    pub(crate) fn allowed(&self, gva: Gva) -> Vec<Leaf> {
        self.versions
            .iter()
            .enumerate()
            .filter_map(|(version, words)| {
                let leaf = walk(words, &self.context, gva, Access::Read).ok()?;
                (!self.is_flushed(version, &leaf, gva)).then_some(leaf)
            })
            .collect()
    }

    fn is_flushed(&self, version: usize, leaf: &Leaf, gva: Gva) -> bool {
        self.flushes.iter().any(|flush| {
            let same_page = |flushed: Gva| {
                let size = leaf.size.max(PAGE_SIZE_U64);
                flushed.as_u64() / size == gva.as_u64() / size
            };
            flush.cr3 == self.context.cr3.as_u64()
                && version < flush.version
                && flush.gva.is_none_or(same_page)
        })
    }
}
