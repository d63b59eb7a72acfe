//! The zero page (`struct boot_params`) and the command line.
//!
//! Source: Linux `Documentation/arch/x86/zero-page.rst` for the offsets, `boot.rst` for the setup
//! header's fields and the 64-bit boot protocol.

use crate::abi;
use crate::addr::PAGE_SIZE;

use super::BootError;

/// Offsets in the zero page.
mod offset {
    pub(super) const E820_ENTRIES: usize = 0x1e8;
    pub(super) const VID_MODE: usize = 0x1fa;
    pub(super) const BOOT_FLAG: usize = 0x1fe;
    pub(super) const HEADER: usize = 0x202;
    pub(super) const VERSION: usize = 0x206;
    pub(super) const TYPE_OF_LOADER: usize = 0x210;
    pub(super) const LOADFLAGS: usize = 0x211;
    pub(super) const CMD_LINE_PTR: usize = 0x228;
    pub(super) const KERNEL_ALIGNMENT: usize = 0x230;
    pub(super) const XLOADFLAGS: usize = 0x236;
    pub(super) const CMDLINE_SIZE: usize = 0x238;
    pub(super) const E820_TABLE: usize = 0x2d0;
}

/// `boot_flag`.
const BOOT_FLAG: u16 = 0xaa55;
/// `header`: "HdrS".
const HEADER_MAGIC: u32 = 0x5372_6448;
/// Boot protocol 2.15.
const PROTOCOL: u16 = 0x020f;
/// `type_of_loader`: one without an assigned number.
const LOADER_UNDEFINED: u8 = 0xff;
/// `loadflags`: LOADED_HIGH.
const LOADED_HIGH: u8 = 1;
/// `xloadflags`: XLF_KERNEL_64, XLF_CAN_BE_LOADED_ABOVE_4G.
const XLOADFLAGS: u16 = 0b11;
/// `vid_mode`: normal.
const VIDEO_NORMAL: u16 = 0xffff;
/// `kernel_alignment`.
const ALIGNMENT: u32 = 0x20_0000;

/// e820 types.
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
/// Bytes of an e820 entry in the zero page.
const E820_ENTRY_BYTES: usize = 20;
/// End of conventional memory: the extended BIOS data area of a PC begins here.
const LOW_RAM_END: u64 = 0x9_fc00;
/// End of the reserved area below 1 MiB.
const HIGH_RAM_START: u64 = 0x10_0000;

/// `cmdline` with its final NUL.
pub(in crate::vmm) fn terminated(cmdline: &[u8]) -> Result<Vec<u8>, BootError> {
    let max = abi::CMDLINE_BYTES - 1;
    if cmdline.len() as u64 > max {
        return Err(BootError::CmdlineTooLong { bytes: cmdline.len(), max });
    }
    if let Some(at) = cmdline.iter().position(|byte| *byte == 0) {
        return Err(BootError::CmdlineNul { at });
    }
    let mut bytes = cmdline.to_vec();
    bytes.push(0);
    Ok(bytes)
}

/// The memory map of a PC with so much RAM: `[start, end)` and e820 type, in order.
pub(in crate::vmm) fn ram_map(memory_bytes: u64) -> Vec<(u64, u64, u32)> {
    let mut map = vec![
        (0, LOW_RAM_END.min(memory_bytes), E820_RAM),
        (LOW_RAM_END, HIGH_RAM_START, E820_RESERVED),
    ];
    if memory_bytes > HIGH_RAM_START {
        map.push((HIGH_RAM_START, memory_bytes, E820_RAM));
    }
    map
}

/// The same, with the pinned window.
fn memory_map(memory_bytes: u64, window_bytes: u64) -> Vec<(u64, u64, u32)> {
    let mut map = ram_map(memory_bytes);
    map.push((abi::WINDOW_GPA, abi::WINDOW_GPA + window_bytes, E820_RESERVED));
    map
}

/// The zero page for `memory_bytes` of RAM and a command line of `cmdline_bytes` with its NUL.
pub(super) fn build(memory_bytes: u64, cmdline_bytes: usize) -> [u8; PAGE_SIZE] {
    let mut page = [0u8; PAGE_SIZE];
    let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
    put(offset::VID_MODE, &VIDEO_NORMAL.to_le_bytes());
    put(offset::BOOT_FLAG, &BOOT_FLAG.to_le_bytes());
    put(offset::HEADER, &HEADER_MAGIC.to_le_bytes());
    put(offset::VERSION, &PROTOCOL.to_le_bytes());
    put(offset::TYPE_OF_LOADER, &[LOADER_UNDEFINED]);
    put(offset::LOADFLAGS, &[LOADED_HIGH]);
    // Below 4 GiB by the contract; the high half would be in ext_cmd_line_ptr.
    #[allow(clippy::cast_possible_truncation)]
    const CMDLINE_PTR: u32 = abi::CMDLINE_GPA as u32;
    put(offset::CMD_LINE_PTR, &CMDLINE_PTR.to_le_bytes());
    put(offset::KERNEL_ALIGNMENT, &ALIGNMENT.to_le_bytes());
    put(offset::XLOADFLAGS, &XLOADFLAGS.to_le_bytes());
    let cmdline_size = u32::try_from(cmdline_bytes.saturating_sub(1)).unwrap_or(0);
    put(offset::CMDLINE_SIZE, &cmdline_size.to_le_bytes());

    let map =
        memory_map(memory_bytes, crate::vmm::contract::control_block::window_bytes(memory_bytes));
    put(offset::E820_ENTRIES, &[u8::try_from(map.len()).unwrap_or(0)]);
    for (index, (start, end, kind)) in map.into_iter().enumerate() {
        let at = offset::E820_TABLE + index * E820_ENTRY_BYTES;
        put(at, &start.to_le_bytes());
        put(at + 8, &(end - start).to_le_bytes());
        put(at + 16, &kind.to_le_bytes());
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    fn u32_at(page: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(page[at..at + 4].try_into().unwrap())
    }

    fn u64_at(page: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(page[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn the_header_is_what_a_kernel_looks_for() {
        let page = build(64 << 20, 6);
        assert_eq!(&page[0x202..0x206], b"HdrS");
        assert_eq!(&page[0x1fe..0x200], [0x55, 0xaa]);
        assert_eq!(u32_at(&page, 0x228), 0x2_0000, "cmd_line_ptr");
        assert_eq!(u32_at(&page, 0x238), 5, "cmdline_size is without the NUL");
        assert_eq!(page[0x210], 0xff);
    }

    #[test]
    fn the_memory_map_covers_ram_and_reserves_the_rest() {
        let page = build(64 << 20, 1);
        let entries: Vec<_> = (0..usize::from(page[0x1e8]))
            .map(|i| 0x2d0 + i * 20)
            .map(|at| (u64_at(&page, at), u64_at(&page, at + 8), u32_at(&page, at + 16)))
            .collect();
        let window = crate::vmm::contract::control_block::window_bytes(64 << 20);
        assert_eq!(
            entries,
            [
                (0, 0x9_fc00, 1),
                (0x9_fc00, 0x6_0400, 2),
                (0x10_0000, 63 << 20, 1),
                (512 << 30, window, 2),
            ]
        );
    }

    #[test]
    fn a_command_line_must_fit_and_have_no_nul() {
        assert_eq!(terminated(b"a=1").unwrap(), b"a=1\0");
        assert_eq!(terminated(&[b'x'; 4095]).unwrap().len(), 4096);
        let error = terminated(&[b'x'; 4096]).unwrap_err().to_string();
        assert_eq!(
            error,
            "the command line has 4096 bytes, more than the 4095 that fit: shorten it"
        );
        let error = terminated(b"ab\0c").unwrap_err().to_string();
        assert_eq!(error, "the command line has a NUL at byte 2: leave it out");
    }
}
