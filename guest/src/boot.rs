//! What the guest is told at entry: the Linux 64-bit boot protocol's `boot_params`.

use core::slice;

/// Offsets in `boot_params` (Linux, Documentation/arch/x86/zero-page.rst and boot.rst).
const E820_ENTRIES: usize = 0x1e8;
const SETUP_MAGIC: usize = 0x202;
const CMD_LINE_PTR: usize = 0x228;
const E820_TABLE: usize = 0x2d0;
const E820_ENTRY_BYTES: usize = 20;
const E820_MOST: usize = 128;
const E820_USABLE: u32 = 1;

/// One range of the e820 memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct E820Range {
    /// First byte.
    pub start: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// 1 is usable RAM.
    pub kind: u32,
}

impl E820Range {
    /// Whether this is RAM for the guest to use.
    pub fn is_usable(&self) -> bool {
        self.kind == E820_USABLE
    }

    /// Name of its kind.
    pub fn kind_name(&self) -> &'static str {
        match self.kind {
            E820_USABLE => "usable",
            2 => "reserved",
            _ => "other",
        }
    }
}

/// A view of `boot_params`, which the guest leaves in place.
#[derive(Clone, Copy)]
pub struct BootParams(&'static [u8; 4096]);

impl BootParams {
    /// The boot parameters at a guest-physical address.
    ///
    /// # Safety
    /// The 4096 bytes there and the command line that they point to are mapped at their physical
    /// address for good, and nothing writes them.
    pub unsafe fn new(address: u64) -> BootParams {
        // SAFETY: the caller vouches for the bytes.
        BootParams(unsafe { &*(address as *const [u8; 4096]) })
    }

    fn bytes<const N: usize>(self, offset: usize) -> [u8; N] {
        let mut value = [0; N];
        value.copy_from_slice(&self.0[offset..offset + N]);
        value
    }

    /// Whether the setup header carries its magic.
    pub fn has_magic(self) -> bool {
        self.bytes(SETUP_MAGIC) == *b"HdrS"
    }

    /// The memory map.
    pub fn e820(self) -> impl Iterator<Item = E820Range> {
        let count = usize::from(self.0[E820_ENTRIES]).min(E820_MOST);
        (0..count).map(move |i| {
            let at = E820_TABLE + i * E820_ENTRY_BYTES;
            E820Range {
                start: u64::from_le_bytes(self.bytes(at)),
                bytes: u64::from_le_bytes(self.bytes(at + 8)),
                kind: u32::from_le_bytes(self.bytes(at + 16)),
            }
        })
    }

    /// The command line, without its NUL; empty if it is not UTF-8.
    pub fn command_line(self) -> &'static str {
        let pointer = u32::from_le_bytes(self.bytes(CMD_LINE_PTR));
        if pointer == 0 {
            return "";
        }
        // SAFETY: `new` was promised that the command line stays mapped and unwritten; the
        // contract gives it so many bytes.
        let line = unsafe {
            slice::from_raw_parts(pointer as usize as *const u8, gnomon_abi::CMDLINE_BYTES as usize)
        };
        let end = line.iter().position(|byte| *byte == 0).unwrap_or(line.len());
        str::from_utf8(&line[..end]).unwrap_or("")
    }
}
