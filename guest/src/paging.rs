//! Page tables: 4 levels, entries changed atomically because the hypervisor sets accessed and
//! dirty bits in them at any time.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::memory::{FreeRam, PAGE_BYTES};

/// Entry bits (Intel SDM vol. 3, 5.5.4).
pub const PRESENT: u64 = 1 << 0;
pub const WRITE: u64 = 1 << 1;
pub const USER: u64 = 1 << 2;
pub const ACCESSED: u64 = 1 << 5;
pub const DIRTY: u64 = 1 << 6;
pub const LARGE: u64 = 1 << 7;
pub const NO_EXECUTE: u64 = 1 << 63;
/// The physical address in an entry.
pub const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Flags of entries that point to tables: permissions are decided at the leaves. All entries have
/// [`USER`]: with shadow paging it makes no difference, otherwise this guest is at CPL 3.
const TABLE_FLAGS: u64 = PRESENT | WRITE | USER | ACCESSED;
/// Entries of a table.
pub const ENTRIES: u64 = 512;

/// Page-fault error code bits.
pub const FAULT_PRESENT: u64 = 1 << 0;
pub const FAULT_WRITE: u64 = 1 << 1;
pub const FAULT_FETCH: u64 = 1 << 4;

/// log2 of the bytes that an entry at `level` maps; level 1 is the table of 4 KiB pages.
const fn shift(level: u32) -> u32 {
    12 + 9 * (level - 1)
}

/// One page table in RAM that is mapped at its physical address.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Table(u64);

impl Table {
    /// A new, empty table.
    pub fn new(ram: &mut FreeRam) -> Table {
        Table(ram.take_pages(1))
    }

    /// Its physical address.
    pub fn address(self) -> u64 {
        self.0
    }

    /// The entry with an index (taken modulo 512).
    pub fn entry(self, index: u64) -> &'static AtomicU64 {
        // SAFETY: a `Table` is a page of RAM for good, mapped at its physical address; entries are
        // only ever accessed as atomics.
        unsafe { &*((self.0 + (index % ENTRIES) * 8) as *const AtomicU64) }
    }

    /// The entry for an address in a table of `level`.
    pub fn entry_for(self, address: u64, level: u32) -> &'static AtomicU64 {
        self.entry(address >> shift(level))
    }

    /// Makes the entry for an address in this table of `level` point to a lower table.
    pub fn link(self, address: u64, level: u32, lower: Table) {
        self.entry_for(address, level).store(lower.0 | TABLE_FLAGS, Ordering::Relaxed);
    }

    /// Copies all entries of another table.
    pub fn copy_from(self, other: Table) {
        for i in 0..ENTRIES {
            self.entry(i).store(other.entry(i).load(Ordering::Relaxed), Ordering::Relaxed);
        }
    }

    /// Makes all entries not present.
    pub fn clear(self) {
        for i in 0..ENTRIES {
            self.entry(i).store(0, Ordering::Relaxed);
        }
    }
}

/// The level of the largest pages: a processor of which the guest has CPL 0 need not have any of 1 GiB.
fn largest_level() -> u32 {
    if crate::ring0::is_present() { 2 } else { 3 }
}

/// A leaf entry for a page.
pub fn leaf(physical: u64, flags: u64) -> u64 {
    physical | flags | USER | PRESENT
}

/// A tree of page tables.
#[derive(Clone, Copy)]
pub struct AddressSpace {
    root: Table,
}

impl AddressSpace {
    /// An empty address space.
    pub fn new(ram: &mut FreeRam) -> AddressSpace {
        AddressSpace { root: Table::new(ram) }
    }

    /// The PML4 table.
    pub fn root(self) -> Table {
        self.root
    }

    /// The table of `level` that covers an address; missing tables are made.
    pub fn table(self, ram: &mut FreeRam, address: u64, level: u32) -> Table {
        let mut table = self.root;
        for upper in (level + 1..=4).rev() {
            let entry = table.entry_for(address, upper);
            let value = entry.load(Ordering::Relaxed);
            table = if value & PRESENT != 0 {
                Table(value & ADDRESS)
            } else {
                let lower = Table::new(ram);
                table.link(address, upper, lower);
                lower
            };
        }
        table
    }

    /// The entry of the 4 KiB page at an address, if there are tables down to it.
    pub fn leaf_entry(self, address: u64) -> Option<&'static AtomicU64> {
        let mut table = self.root;
        for level in (2..=4).rev() {
            let value = table.entry_for(address, level).load(Ordering::Relaxed);
            if value & PRESENT == 0 || value & LARGE != 0 {
                return None;
            }
            table = Table(value & ADDRESS);
        }
        Some(table.entry_for(address, 1))
    }

    /// Maps a range with the largest pages that fit.
    pub fn map(self, ram: &mut FreeRam, address: u64, physical: u64, bytes: u64, flags: u64) {
        let mut done = 0;
        while done < bytes {
            let fits = |level: u32| {
                let size = 1_u64 << shift(level);
                (address + done).is_multiple_of(size)
                    && (physical + done).is_multiple_of(size)
                    && bytes - done >= size
            };
            let level = (1..=largest_level()).rev().find(|level| fits(*level)).unwrap_or(1);
            let large = if level > 1 { LARGE } else { 0 };
            self.table(ram, address + done, level)
                .entry_for(address + done, level)
                .store(leaf(physical + done, flags | large), Ordering::Relaxed);
            done += 1 << shift(level);
        }
    }

    /// Maps `count` single pages from `address` up, the leaf of each given by its number.
    pub fn map_pages(
        self,
        ram: &mut FreeRam,
        address: u64,
        count: u64,
        leaf_of: impl Fn(u64) -> u64,
    ) {
        let mut table = None;
        for i in 0..count {
            let at = address + i * PAGE_BYTES;
            let leaves = match table {
                Some(leaves) if !at.is_multiple_of(ENTRIES * PAGE_BYTES) => leaves,
                _ => self.table(ram, at, 1),
            };
            table = Some(leaves);
            leaves.entry_for(at, 1).store(leaf_of(i), Ordering::Relaxed);
        }
    }

    /// Pages that the tables for `count` single pages may take.
    pub fn tables_for(count: u64) -> u64 {
        let level = |entries: u64| entries.div_ceil(ENTRIES) + 1;
        level(count) + level(level(count)) + level(level(level(count)))
    }
}
