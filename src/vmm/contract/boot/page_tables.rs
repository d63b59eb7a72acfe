//! The page tables that a guest starts with: an identity map of RAM, below 512 GiB, and of the pinned
//! window above. Accessed and dirty bits are preset.

use crate::abi;
use crate::addr::{Gpa, PAGE_SIZE, PAGE_SIZE_U64};

/// Page-directory-pointer table for 0 to 512 GiB.
const LOW_PDPT: Gpa = Gpa::new(abi::BOOT_PML4_GPA + PAGE_SIZE_U64);
/// Page-directory-pointer table for 512 GiB to 1 TiB.
const HIGH_PDPT: Gpa = Gpa::new(abi::BOOT_PML4_GPA + 2 * PAGE_SIZE_U64);

/// Page directories for the first GiB of each.
const LOW_PD: Gpa = Gpa::new(abi::BOOT_PML4_GPA + 3 * PAGE_SIZE_U64);
const HIGH_PD: Gpa = Gpa::new(abi::BOOT_PML4_GPA + 4 * PAGE_SIZE_U64);

/// How much the tables map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BootMap {
    /// 1 TiB in pages of 1 GiB.
    Everything,
    /// The first GiB of RAM's and of the window's addresses, in pages of 2 MiB: for processors that
    /// need not have larger ones.
    FirstGib,
}

/// Present, writable, for CPL 3 as well, accessed.
const TABLE: u64 = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 5;
/// The same, dirty, and a page rather than a table.
const LARGE_PAGE: u64 = TABLE | 1 << 6 | 1 << 7;
const ENTRIES: u64 = 512;
const GIB: u64 = 1 << 30;

/// The tables and where they go.
pub(in crate::vmm) fn build(map: BootMap) -> Vec<(Gpa, [u8; PAGE_SIZE])> {
    let only = |wanted: u64, lower: Gpa| {
        table(move |index| if index == wanted { lower.as_u64() | TABLE } else { 0 })
    };
    let pages = |first: u64, bytes: u64| table(move |index| (first + index * bytes) | LARGE_PAGE);
    let root = table(|index| match index {
        0 => LOW_PDPT.as_u64() | TABLE,
        1 => HIGH_PDPT.as_u64() | TABLE,
        _ => 0,
    });
    let root = (Gpa::new(abi::BOOT_PML4_GPA), root);
    match map {
        BootMap::Everything => {
            vec![root, (LOW_PDPT, pages(0, GIB)), (HIGH_PDPT, pages(ENTRIES * GIB, GIB))]
        }
        BootMap::FirstGib => vec![
            root,
            (LOW_PDPT, only(0, LOW_PD)),
            (HIGH_PDPT, only(0, HIGH_PD)),
            (LOW_PD, pages(0, GIB / ENTRIES)),
            (HIGH_PD, pages(ENTRIES * GIB, GIB / ENTRIES)),
        ],
    }
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
    fn translate(map: BootMap, gva: u64) -> Option<u64> {
        let tables = build(map);
        let mut gpa = abi::BOOT_PML4_GPA;
        for shift in [39, 30, 21] {
            let (_, table) = tables.iter().find(|(base, _)| base.as_u64() == gpa)?;
            let at = usize::try_from((gva >> shift & 511) * 8).ok()?;
            let value = u64::from_le_bytes(table[at..at + 8].try_into().ok()?);
            if value & 1 == 0 {
                return None;
            }
            if value & 1 << 7 != 0 {
                assert_eq!(value & 0xfff, 0xe7, "a large page, for all, writable, accessed, dirty");
                return Some((value & !0xfff) + (gva & ((1 << shift) - 1)));
            }
            gpa = value & !0xfff;
        }
        None
    }

    #[test]
    fn one_tebibyte_is_mapped_to_itself_and_no_more() {
        let translate = |gva| translate(BootMap::Everything, gva);
        for gva in [0, 0x10_0000, GIB - 1, 511 * GIB + 5, abi::WINDOW_GPA, 1023 * GIB + 0xfff] {
            assert_eq!(translate(gva), Some(gva));
        }
        assert_eq!(translate(1024 * GIB), None);
    }

    #[test]
    fn one_gibibyte_of_ram_and_window_is_mapped_to_itself_and_no_more() {
        let translate = |gva| translate(BootMap::FirstGib, gva);
        for gva in [0, 0x10_0000, GIB - 1, abi::WINDOW_GPA, abi::WINDOW_GPA + GIB - 1] {
            assert_eq!(translate(gva), Some(gva));
        }
        for gva in [GIB, abi::WINDOW_GPA - 1, abi::WINDOW_GPA + GIB, 1024 * GIB] {
            assert_eq!(translate(gva), None);
        }
    }
}
