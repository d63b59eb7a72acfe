//! `boot_params` for the 64-bit entry: the kernel's own setup header, and what the loader adds.
//!
//! Source: Linux `Documentation/arch/x86/boot.rst` and `zero-page.rst`.

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};

use super::Memory;
use super::layout;

/// `type_of_loader`: one without an assigned number.
const LOADER_UNDEFINED: u8 = 0xff;
/// `boot_flag`.
const BOOT_FLAG: u16 = 0xaa55;
/// `header`: "HdrS".
const MAGIC: u32 = 0x5372_6448;
/// Boot protocol 2.15.
const PROTOCOL: u16 = 0x020f;
/// `loadflags`: LOADED_HIGH.
const LOADED_HIGH: u8 = 1;
/// `kernel_alignment`, of a kernel that does not say.
const ALIGNMENT: u32 = 0x20_0000;

/// The header of a kernel that has none, a vmlinux.
fn bare_header() -> setup_header {
    setup_header {
        boot_flag: BOOT_FLAG,
        header: MAGIC,
        version: PROTOCOL,
        loadflags: LOADED_HIGH,
        kernel_alignment: ALIGNMENT,
        ..setup_header::default()
    }
}

/// The page, for a kernel with this setup header.
pub(super) fn build(kernel: Option<setup_header>, memory: &Memory) -> boot_params {
    let mut hdr = kernel.unwrap_or_else(bare_header);
    hdr.type_of_loader = LOADER_UNDEFINED;
    // All of these are below 4 GiB: by the layout, or since RAM ends below.
    hdr.cmd_line_ptr = narrow(layout::CMDLINE);
    hdr.ramdisk_image = narrow(memory.initrd.start);
    hdr.ramdisk_size = narrow(memory.initrd.end - memory.initrd.start);
    let mut params = boot_params { hdr, acpi_rsdp_addr: layout::ACPI, ..boot_params::default() };
    let mut count = 0;
    for (slot, (start, end, kind)) in params.e820_table.iter_mut().zip(&memory.map) {
        *slot = boot_e820_entry { addr: *start, size: end - start, r#type: *kind };
        count += 1;
    }
    params.e820_entries = count;
    params
}

/// A value that fits, by the layout.
pub(super) fn narrow(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::linux::header;
    use vm_memory::ByteValued;

    fn memory() -> Memory {
        Memory {
            map: vec![(0, 0x9_fc00, 1), (0x10_0000, 0x400_0000, 1)],
            initrd: 0x3ff_0000..0x3ff_1234,
        }
    }

    fn u32_at(page: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(page[at..at + 4].try_into().unwrap())
    }

    #[test]
    fn the_kernels_header_is_kept_and_the_loaders_part_added() {
        let header = header::read(&header::tests::bzimage()).unwrap();
        let params = build(Some(header), &memory());
        let page = params.as_slice();
        assert_eq!(page.len(), 4096);
        assert_eq!(&page[0x202..0x206], b"HdrS");
        assert_eq!(u32_at(page, 0x260), 0x20_0000, "init_size, the kernel's own");
        assert_eq!(page[0x210], 0xff, "type_of_loader");
        assert_eq!(u32_at(page, 0x228), 0x2_0000, "cmd_line_ptr");
        assert_eq!((u32_at(page, 0x218), u32_at(page, 0x21c)), (0x3ff_0000, 0x1234));
        assert_eq!(u32_at(page, 0x70), 0xe_0000, "acpi_rsdp_addr");
        assert_eq!(page[0x1e8], 2);
        assert_eq!((u32_at(page, 0x2e4), u32_at(page, 0x2ec)), (0x10_0000, 0x3f0_0000));
        assert_eq!(page[0x1ef], 0, "the sentinel says that the rest is initialised");
    }

    #[test]
    fn a_kernel_without_a_header_gets_one() {
        let params = build(None, &memory());
        let page = params.as_slice();
        assert_eq!(&page[0x202..0x206], b"HdrS");
        assert_eq!(&page[0x1fe..0x200], [0x55, 0xaa]);
    }
}
