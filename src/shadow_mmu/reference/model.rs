//! The guest's paging as the manuals have it, done naively: a walk over a map of words, and all
//! the versions of the tables that a processor may still have in its TLB.
//!
//! Each word has its history, so a version costs no more than what it changed, and a walk of many
//! versions is done once for all of those between two changes of what it went through.

use std::collections::{BTreeMap, BTreeSet};

use super::machine::{
    ACCESSED, ADDRESS, DIRTY, NO_EXECUTE, PAGE_SIZE_BIT, PHYS_BITS, PRESENT, RAM_BYTES, WRITABLE,
};
use crate::addr::{Gfn, Gpa, Gva, PAGE_SIZE_U64};
use crate::shadow_mmu::{Access, PagingContext};

/// Number of a version of guest memory.
type Version = u32;

/// The values of a word, each with the first version that has it; before the first it is 0.
#[derive(Debug, Default)]
struct History(Vec<(Version, u64)>);

impl History {
    fn now(&self) -> u64 {
        self.0.last().map_or(0, |&(_, value)| value)
    }

    /// The value in a version, and the version at which the next one begins.
    fn at(&self, version: Version) -> (u64, Version) {
        let next = self.0.iter().rposition(|&(since, _)| since <= version).map_or(0, |at| at + 1);
        let value = if next == 0 { 0 } else { self.0[next - 1].1 };
        (value, self.0.get(next).map_or(Version::MAX, |&(since, _)| since))
    }

    fn set(&mut self, version: Version, value: u64) {
        match self.0.last_mut() {
            Some(last) if last.0 == version => last.1 = value,
            _ => self.0.push((version, value)),
        }
    }
}

/// What a page holds: words by offset, without those that are 0.
pub(crate) type PageWords = Vec<(u64, u64)>;

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
    entries: [u64; 4],
    depth: usize,
}

impl Leaf {
    /// Addresses of the entries that the walk used, the leaf's last.
    pub(crate) fn entries(&self) -> &[u64] {
        &self.entries[..self.depth]
    }

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
fn walk(
    mut read: impl FnMut(u64) -> u64,
    context: &PagingContext,
    gva: Gva,
    access: Access,
) -> Result<Leaf, u32> {
    let bits = access_bits(context, access);
    let mut table = context.cr3.as_u64() & ADDRESS;
    let (mut writable, mut executable) = (true, true);
    let mut accessed = true;
    let mut entries = [0; 4];
    for (level, shift) in [39, 30, 21, 12].into_iter().enumerate() {
        if table >= RAM_BYTES {
            return Err(bits | 0b1001);
        }
        let at = table + (gva.as_u64() >> shift & 511) * 8;
        let entry = read(at);
        if entry & PRESENT == 0 {
            return Err(bits);
        }
        entries[level] = at;
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
                depth: level + 1,
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
    version: Version,
    /// ... for the guest page of this address; for all if there is none.
    gva: Option<Gva>,
}

/// Guest memory now and in all versions that translations may still come from.
pub(crate) struct Model {
    words: BTreeMap<u64, History>,
    /// The oldest version that counts, and the current one.
    oldest: Version,
    version: Version,
    flushes: Vec<Flush>,
    /// Guest frames written since the dirty log took them.
    pub(crate) written: BTreeSet<u64>,
    pub(crate) context: PagingContext,
}

impl Model {
    pub(crate) fn new(context: PagingContext) -> Self {
        Self {
            words: BTreeMap::new(),
            oldest: 0,
            version: 0,
            flushes: Vec::new(),
            written: BTreeSet::new(),
            context,
        }
    }

    /// All words that were ever written, in ascending order, and what they are now.
    pub(crate) fn words(&self) -> impl Iterator<Item = (u64, u64)> {
        self.words.iter().map(|(&gpa, history)| (gpa, history.now()))
    }

    pub(crate) fn read(&self, gpa: u64) -> u64 {
        self.words.get(&gpa).map_or(0, History::now)
    }

    /// The walk for reading, without any effect.
    pub(crate) fn walk(&self, gva: Gva, access: Access) -> Result<Leaf, u32> {
        walk(|gpa| self.read(gpa), &self.context, gva, access)
    }

    fn set(&mut self, gpa: u64, value: u64) {
        self.words.entry(gpa).or_default().set(self.version, value);
        self.written.insert(gpa / PAGE_SIZE_U64);
    }

    /// A store by the guest. Any word may be an entry of some table.
    pub(crate) fn write(&mut self, gpa: u64, value: u64) {
        // What maps nothing before or after, whatever it is used for, makes no version.
        if (self.read(gpa) | value) & PRESENT != 0 {
            self.version += 1;
        }
        self.set(gpa, value);
    }

    /// What a page holds.
    pub(crate) fn page(&self, gfn: Gfn) -> PageWords {
        let first = gfn.base().as_u64();
        let words = self.words.range(first..first + PAGE_SIZE_U64);
        let all = words.map(|(&gpa, history)| (gpa - first, history.now()));
        all.filter(|&(_, value)| value != 0).collect()
    }

    /// The host gives a page other content, in one step.
    pub(crate) fn replace_page(&mut self, gfn: Gfn, content: &[(u64, u64)]) {
        let old = self.page(gfn);
        if old == content {
            return;
        }
        self.version += 1;
        let first = gfn.base().as_u64();
        for (offset, _) in old {
            self.set(first + offset, 0);
        }
        for &(offset, value) in content {
            self.set(first + offset, value);
        }
    }

    /// What a walk does for the access: the translation, with accessed and dirty bits set as
    /// Intel SDM vol. 3, 4.8 says, or the error code, with no bit set.
    pub(crate) fn access(&mut self, gva: Gva, access: Access) -> Result<Leaf, u32> {
        let leaf = self.walk(gva, access)?;
        let last = leaf.entries().len() - 1;
        for (number, &at) in leaf.entries().iter().enumerate() {
            let mut marks = ACCESSED;
            if access == Access::Write && number == last {
                marks |= DIRTY;
            }
            let entry = self.read(at);
            if entry & marks != marks {
                self.set(at, entry | marks);
            }
        }
        // Entries may be shared between levels.
        self.walk(gva, access)
    }

    pub(crate) fn invlpg(&mut self, gva: Gva) {
        self.flush(Some(gva));
    }

    pub(crate) fn flush_all(&mut self) {
        self.flush(None);
    }

    /// Every translation is made anew from now on.
    pub(crate) fn forget_versions(&mut self) {
        self.oldest = self.version;
        self.flushes.clear();
    }

    fn flush(&mut self, gva: Option<Gva>) {
        let (cr3, version) = (self.context.cr3.as_u64(), self.version);
        self.flushes.push(Flush { cr3, version, gva });
    }

    /// Every translation for reading that a TLB may hold for the address, the current one last.
    pub(crate) fn allowed(&self, gva: Gva) -> Vec<Leaf> {
        let mut leaves = Vec::new();
        let mut version = self.oldest;
        while version <= self.version {
            let mut until = self.version + 1;
            let read = |gpa| {
                let (value, next) = match self.words.get(&gpa) {
                    Some(history) => history.at(version),
                    None => (0, Version::MAX),
                };
                until = until.min(next);
                value
            };
            // The last of the versions in which the walk is the same is flushed last.
            if let Ok(leaf) = walk(read, &self.context, gva, Access::Read)
                && !self.is_flushed(until - 1, &leaf, gva)
            {
                leaves.push(leaf);
            }
            version = until;
        }
        leaves
    }

    fn is_flushed(&self, version: Version, leaf: &Leaf, gva: Gva) -> bool {
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
