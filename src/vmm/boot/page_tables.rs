//! The page tables that a guest starts with: an identity map of 1 TiB in 1 GiB pages, which is
//! RAM below 512 GiB and the pinned window above. Accessed and dirty bits are preset.

use crate::abi;
use crate::addr::{Gpa, PAGE_SIZE, PAGE_SIZE_U64};

/// Page-directory-pointer table for 0 to 512 GiB.
const LOW_PDPT: Gpa = Gpa::new(abi::BOOT_PML4_GPA + PAGE_SIZE_U64);
/// Page-directory-pointer table for 512 GiB to 1 TiB.
const HIGH_PDPT: Gpa = Gpa::new(abi::BOOT_PML4_GPA + 2 * PAGE_SIZE_U64);

/// Present, writable, for CPL 3 as well, accessed.
const TABLE: u64 = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 5;
/// The same, dirty, and a page rather than a table.
const LARGE_PAGE: u64 = TABLE | 1 << 6 | 1 << 7;
const ENTRIES: u64 = 512;
const GIB: u64 = 1 << 30;

/// The tables and where they go.
pub(in crate::vmm) fn build() -> [(Gpa, [u8; PAGE_SIZE]); 3] {
    let root = table(|index| match index {
        0 => LOW_PDPT.as_u64() | TABLE,
        1 => HIGH_PDPT.as_u64() | TABLE,
        _ => 0,
    });
    let low = table(|index| (index * GIB) | LARGE_PAGE);
    let high = table(|index| ((ENTRIES + index) * GIB) | LARGE_PAGE);
    [(Gpa::new(abi::BOOT_PML4_GPA), root), (LOW_PDPT, low), (HIGH_PDPT, high)]
}

fn table(entry: impl Fn(u64) -> u64) -> [u8; PAGE_SIZE] {
    let mut page = [0; PAGE_SIZE];
    for (index, slot) in (0..ENTRIES).zip(page.chunks_exact_mut(8)) {
        slot.copy_from_slice(&entry(index).to_le_bytes());
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Walks the tables as a processor would.
    fn translate(gva: u64) -> Option<u64> {
        let tables = build();
        let entry = |gpa: u64, index: u64| {
            let (_, table) = tables.iter().find(|(base, _)| base.as_u64() == gpa)?;
            let at = usize::try_from(index * 8).ok()?;
            let value = u64::from_le_bytes(table[at..at + 8].try_into().ok()?);
            (value & 1 != 0).then_some(value)
        };
        let pdpt = entry(abi::BOOT_PML4_GPA, gva >> 39 & 511)? & !0xfff;
        let page = entry(pdpt, gva >> 30 & 511)?;
        assert_eq!(page & 0xfff, 0xe7, "1 GiB page, for all, writable, accessed, dirty");
        Some((page & !0xfff) + (gva & (GIB - 1)))
    }

    #[test]
    fn one_tebibyte_is_mapped_to_itself_and_no_more() {
        for gva in [0, 0x10_0000, GIB - 1, 511 * GIB + 5, abi::WINDOW_GPA, 1023 * GIB + 0xfff] {
            assert_eq!(translate(gva), Some(gva));
        }
        assert_eq!(translate(1024 * GIB), None);
    }
}
