//! Slots, and what can hold pages in them.

use std::io;

use gnomon_export_rmap::addr::PAGE_SIZE;

pub use gnomon_export_rmap::addr::SwapSlot as Slot;

/// Storage for pages. It neither knows which slots are in use nor checks content; that is
/// [`SwapSpace`](super::SwapSpace)'s part.
///
/// Calls on different slots may come from several threads at once.
pub trait SwapBackend: Send + Sync {
    /// Reads one whole page; a slot never written reads as zeros.
    ///
    /// # Errors
    /// The operating system's, with its errno; `InvalidInput` for a slot from
    /// [`slots`](Self::slots) on. `page` is then undefined (but initialised).
    fn read(&self, slot: Slot, page: &mut [u8; PAGE_SIZE]) -> io::Result<()>;

    /// Writes whole pages to as many consecutive slots from `first` on.
    ///
    /// # Errors
    /// The operating system's, with its errno; `InvalidInput` if `pages` is not whole pages or
    /// goes past the last slot. Any part of the pages may have been written then.
    fn write(&self, first: Slot, pages: &[u8]) -> io::Result<()>;

    /// Number of slots.
    fn slots(&self) -> u32;

    /// Whether the pages stay in memory, for example on tmpfs.
    fn is_in_memory(&self) -> bool {
        false
    }
}

/// The `InvalidInput` of both operations: `bytes` from slot `first` on must be whole pages inside.
pub(super) fn check_range(slots: u32, first: Slot, bytes: usize) -> io::Result<()> {
    let end = u64::from(first.as_u32()).checked_add((bytes / PAGE_SIZE) as u64);
    if !bytes.is_multiple_of(PAGE_SIZE) || end.is_none_or(|end| end > u64::from(slots)) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{bytes} bytes at slot {first} are not whole pages in {slots} slots"),
        ));
    }
    Ok(())
}
