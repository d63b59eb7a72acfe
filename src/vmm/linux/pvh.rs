//! What a PVH kernel finds at its entry: `hvm_start_info`, with a memory map and the RAM disk.
//!
//! Source: Xen `docs/misc/pvh.pandoc` and `xen/include/public/arch-x86/hvm/start_info.h`.

use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::ByteValued;

use super::Memory;
use super::layout;

/// `XEN_HVM_START_MAGIC_VALUE`.
const MAGIC: u32 = 0x336e_c578;

/// The structures and where they go.
pub(super) fn build(memory: &Memory) -> Vec<(u64, Vec<u8>)> {
    let mut info = hvm_start_info {
        magic: MAGIC,
        version: 1,
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: layout::ACPI,
        memmap_paddr: layout::PVH_MEMORY_MAP,
        memmap_entries: u32::try_from(memory.map.len()).unwrap_or(0),
        ..hvm_start_info::default()
    };
    let mut pieces = Vec::new();
    if !memory.initrd.is_empty() {
        info.nr_modules = 1;
        info.modlist_paddr = layout::PVH_MODULES;
        let module = hvm_modlist_entry {
            paddr: memory.initrd.start,
            size: memory.initrd.end - memory.initrd.start,
            ..hvm_modlist_entry::default()
        };
        pieces.push((layout::PVH_MODULES, module.as_slice().to_vec()));
    }
    let map = memory.map.iter().flat_map(|&(start, end, type_)| {
        let entry = hvm_memmap_table_entry { addr: start, size: end - start, type_, reserved: 0 };
        entry.as_slice().to_vec()
    });
    pieces.push((layout::PVH_MEMORY_MAP, map.collect()));
    pieces.push((layout::PVH_START_INFO, info.as_slice().to_vec()));
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pieces_point_at_each_other_and_do_not_overlap() {
        let memory = Memory {
            map: vec![(0, 0x9_fc00, 1), (0x9_fc00, 0x10_0000, 2), (0x10_0000, 1 << 30, 1)],
            initrd: 0x3000_0000..0x3000_0010,
        };
        let mut pieces = build(&memory);
        pieces.sort();
        let starts: Vec<_> = pieces.iter().map(|(at, _)| *at).collect();
        assert_eq!(starts, [0x6000, 0x6100, 0x6200]);
        for pair in pieces.windows(2) {
            assert!(pair[0].0 + pair[0].1.len() as u64 <= pair[1].0);
        }
        let info = hvm_start_info::from_slice(&pieces[0].1);
        let info = info.expect("aligned by chance").to_owned();
        assert_eq!((info.magic, info.nr_modules, info.memmap_entries), (0x336e_c578, 1, 3));
        assert_eq!((info.cmdline_paddr, info.rsdp_paddr), (0x2_0000, 0xe_0000));
        assert_eq!(pieces[1].1[..16], [0, 0, 0, 0x30, 0, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(pieces[2].1.len(), 72);

        let without = build(&Memory { initrd: 0..0, ..memory });
        assert_eq!(without.len(), 2);
    }
}
