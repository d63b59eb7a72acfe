//! What another part of the process may do to a mapping that is not its own: for tests.

use std::io;

use vm_memory::MmapRegion;

/// Maps inaccessible memory over the range, which ends the mapping that was there.
pub fn unmap(region: &MmapRegion, offset: usize, len: usize) -> io::Result<()> {
    map_over(region, offset, len, libc::PROT_NONE)
}

/// Maps other memory over the range, which ends the mapping that was there.
pub fn replace(region: &MmapRegion, offset: usize, len: usize) -> io::Result<()> {
    map_over(region, offset, len, libc::PROT_READ | libc::PROT_WRITE)
}

fn map_over(region: &MmapRegion, offset: usize, len: usize, rights: i32) -> io::Result<()> {
    assert!(offset + len <= region.size());
    let address = region.as_ptr().wrapping_add(offset).cast();
    let flags = libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: the range lies in the region, so it goes away with it; nothing but bytes is kept there,
    // which the test that asked for this does not miss.
    let mapped = unsafe { libc::mmap(address, len, rights, flags, -1, 0) };
    if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Moves the range's mapping somewhere else; the old range stays reserved.
pub fn move_away(region: &MmapRegion, offset: usize, len: usize) -> io::Result<()> {
    assert!(offset + len <= region.size());
    let address = region.as_ptr().wrapping_add(offset).cast();
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP;
    // SAFETY: as for `unmap`; the new mapping is leaked.
    let moved = unsafe { libc::mremap(address, len, len, flags) };
    if moved == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
}
