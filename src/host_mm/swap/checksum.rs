//! The checksum of each slot, in a table that grows as slots are used.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use super::Slot;

/// Checksums in one piece of the table: 64 KiB of them for 32 MiB of swap.
const PER_PIECE: usize = 8192;
/// No content. A checksum that comes out as 0 is stored as 1.
const NONE: u64 = 0;

/// XXH3 of a page, seeded with where it belongs, combined with whose it is: a page that was written
/// to, or read from, the wrong slot does not match either. It is a guard against faults, not attacks.
pub(super) fn of(slot: Slot, owner_tag: u64, page: &[u8]) -> u64 {
    let content = xxh3_64_with_seed(page, xxh3_64(&slot.as_u32().to_le_bytes()));
    (content ^ name(owner_tag)).max(1)
}

/// The checksum of the same page in the same slot under another owner's name. (Where one of the two
/// is [`NONE`], once in 2^63 times, the page will be taken for a damaged one.)
pub(super) fn renamed(checksum: u64, from_tag: u64, to_tag: u64) -> u64 {
    (checksum ^ name(from_tag) ^ name(to_tag)).max(1)
}

fn name(owner_tag: u64) -> u64 {
    xxh3_64(&owner_tag.to_le_bytes())
}

/// One checksum a slot.
///
/// All accesses are relaxed: a slot is written, read and freed by whoever owns it, and what hands
/// it from one thread to another (the memory object's locks, the slot map's) orders them. From std under a
/// model checker, too: a piece of the table is thousands of them.
#[derive(Debug)]
pub(super) struct Checksums {
    pieces: Box<[OnceLock<Box<[AtomicU64]>>]>,
}

impl Checksums {
    pub(super) fn new(slots: u32) -> Self {
        let pieces = (slots as usize).div_ceil(PER_PIECE);
        Self { pieces: (0..pieces).map(|_| OnceLock::new()).collect() }
    }

    /// The checksum of what was last written to the slot; `None` if nothing was.
    pub(super) fn get(&self, slot: Slot) -> Option<u64> {
        let piece = self.pieces.get(slot.index() / PER_PIECE)?.get()?;
        Some(piece[slot.index() % PER_PIECE].load(Ordering::Relaxed)).filter(|&sum| sum != NONE)
    }

    pub(super) fn set(&self, slot: Slot, checksum: u64) {
        if let Some(piece) = self.pieces.get(slot.index() / PER_PIECE) {
            let piece =
                piece.get_or_init(|| (0..PER_PIECE).map(|_| AtomicU64::new(NONE)).collect());
            piece[slot.index() % PER_PIECE].store(checksum, Ordering::Relaxed);
        }
    }

    /// Makes the slot one that nothing was written to.
    pub(super) fn forget(&self, slot: Slot) {
        if let Some(piece) = self.pieces.get(slot.index() / PER_PIECE).and_then(OnceLock::get) {
            piece[slot.index() % PER_PIECE].store(NONE, Ordering::Relaxed);
        }
    }
}
