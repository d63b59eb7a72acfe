//! The setup header of a bzImage, checked before any of it is used.
//!
//! Source: Linux `Documentation/arch/x86/boot.rst`.

use linux_loader::loader::bootparam::setup_header;
use vm_memory::ByteValued;

use super::LinuxError;
use super::layout;

/// Offset of the setup header in the file, and in the zero page.
const HEADER_AT: usize = 0x1f1;
/// "HdrS".
const MAGIC: u32 = 0x5372_6448;
const MAGIC_AT: usize = 0x202;
/// Boot protocol 2.12, which has `xloadflags`.
const OLDEST_PROTOCOL: u16 = 0x020c;
/// `xloadflags`: the 64-bit entry at 0x200 is there.
const XLF_KERNEL_64: u16 = 1;
/// `loadflags`: the protected-mode part belongs at 1 MiB or above.
const LOADED_HIGH: u8 = 1;
/// The 64-bit entry, from the start of the protected-mode part.
pub(super) const ENTRY_64: u64 = 0x200;
const SECTOR_BYTES: u64 = 512;
/// Unit of `syssize`.
const PARAGRAPH_BYTES: u64 = 16;

/// Whether the file says that it is a bzImage.
pub(super) fn is_bzimage(image: &[u8]) -> bool {
    image.get(MAGIC_AT..MAGIC_AT + 4) == Some(&MAGIC.to_le_bytes())
}

/// What the header of a bzImage says of how to load it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    /// Where the protected-mode part goes.
    pub(super) load_at: u64,
    /// Bytes of it in the file.
    pub(super) bytes: u64,
    /// First byte after what the kernel needs to unpack itself.
    pub(super) end: u64,
    /// Most bytes of a command line, without its NUL.
    pub(super) max_cmdline: u64,
    /// First address that an initial RAM disk may not use.
    pub(super) initrd_end: u64,
}

impl Plan {
    /// Reads and checks the header of `image`, for a guest with `memory_bytes` of RAM.
    pub(super) fn new(image: &[u8], memory_bytes: u64) -> Result<Self, LinuxError> {
        let found = image.len() as u64;
        let header = read(image)?;
        let setup_header { version, loadflags, xloadflags, setup_sects, syssize, .. } = header;
        let is_64_bit = version >= OLDEST_PROTOCOL && xloadflags & XLF_KERNEL_64 != 0;
        if !is_64_bit {
            return Err(LinuxError::Protocol { version, is_64_bit });
        }
        let damaged = |field, value: u64| Err(LinuxError::Header { field, value });
        if loadflags & LOADED_HIGH == 0 {
            return damaged("loadflags", loadflags.into());
        }
        // As the protocol wants it: 0 stands for 4.
        let setup_sectors = if setup_sects == 0 { 4 } else { u64::from(setup_sects) };
        let setup_bytes = (setup_sectors + 1) * SECTOR_BYTES;
        let expected = setup_bytes + u64::from(syssize) * PARAGRAPH_BYTES;
        if expected > found {
            return Err(LinuxError::TruncatedKernel { found, expected });
        }
        let bytes = found - setup_bytes;
        if syssize == 0 || bytes <= ENTRY_64 {
            return damaged("syssize", syssize.into());
        }
        let load_at = header.pref_address;
        if load_at < layout::HIGH_MEMORY {
            return damaged("pref_address", load_at);
        }
        let needed = u64::from(header.init_size).max(bytes);
        let end = load_at.saturating_add(needed);
        check_room(load_at, end, memory_bytes)?;
        let max_cmdline = u64::from(header.cmdline_size);
        if max_cmdline == 0 {
            return damaged("cmdline_size", max_cmdline);
        }
        let initrd_end = u64::from(header.initrd_addr_max) + 1;
        Ok(Self { load_at, bytes, end, max_cmdline, initrd_end })
    }
}

/// Whether a kernel of `[start, end)` has room in a guest with so much memory.
pub(super) fn check_room(start: u64, end: u64, memory_bytes: u64) -> Result<(), LinuxError> {
    if end > layout::MAPPED_AT_ENTRY {
        return Err(LinuxError::KernelTooHigh { start, end, max: layout::MAPPED_AT_ENTRY });
    }
    if end > memory_bytes {
        return Err(LinuxError::KernelTooLarge { end, memory_bytes });
    }
    Ok(())
}

/// The header as the file has it, with zeros where the file's is shorter.
pub(super) fn read(image: &[u8]) -> Result<setup_header, LinuxError> {
    let bytes = size_of::<setup_header>();
    let Some(found) = image.get(HEADER_AT..HEADER_AT + bytes) else {
        let (found, expected) = (image.len() as u64, (HEADER_AT + bytes) as u64);
        return Err(LinuxError::TruncatedKernel { found, expected });
    };
    // It ends where the jump over it, at 0x200, leads: 0x202 and the second byte of the jump.
    let length = (MAGIC_AT - HEADER_AT) + usize::from(found[0x201 - HEADER_AT]);
    let mut header = setup_header::default();
    let kept = length.min(bytes);
    header.as_mut_slice()[..kept].copy_from_slice(&found[..kept]);
    Ok(header)
}

#[cfg(test)]
#[path = "header_tests.rs"]
pub(super) mod tests;
