//! Slots, and what can hold pages in them.

use std::fmt;
use std::io;

use crate::addr::{PAGE_SIZE, PAGE_SIZE_U64};

/// Number of a page-sized place in swap, below [`Slot::MAX_SLOTS`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(u32);

impl Slot {
    /// Most slots that swap can have: 2^31 - 1, just under 8 TiB.
    pub const MAX_SLOTS: u32 = i32::MAX.cast_unsigned();

    /// A slot from its number; `None` from [`Self::MAX_SLOTS`] on.
    #[must_use]
    pub const fn new(raw: u32) -> Option<Self> {
        if raw < Self::MAX_SLOTS { Some(Self(raw)) } else { None }
    }

    /// The slot `distance` after slot number `first`. The caller knows that both are in range;
    /// beyond it, the number is one that no swap has.
    pub(super) fn at(first: u32, distance: usize) -> Self {
        let distance = u32::try_from(distance).unwrap_or(u32::MAX);
        Self(first.saturating_add(distance).min(Self::MAX_SLOTS))
    }

    /// The number.
    #[must_use]
    pub const fn as_u32(self) -> u32 {
        self.0
    }

    /// The number as an index.
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }

    /// Byte offset of the slot in a swap file.
    #[must_use]
    pub const fn byte_offset(self) -> u64 {
        self.0 as u64 * PAGE_SIZE_U64
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Slot({})", self.0)
    }
}

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
