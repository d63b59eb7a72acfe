//! The reverse map: from a frame to every place in which an export client maps it.
//!
//! Guarantee: [`EXPORTED`](PageFlags::EXPORTED) is set exactly while a frame's map holds an entry
//! (invariant I4), as seen by anyone who holds the entry lock, which is bit 0 of the head word.
//!
//! One map serves all clients; an entry carries the [`ClientId`] and a location that only the
//! client can read. A frame with one mapping, by far the most common case, has it inline in the
//! head word; more are kept in a chain of chunks.
//!
//! | head, bits 63..3 | bits 2..1 | bit 0 |
//! |---|---|---|
//! | 0 | 00: empty | entry lock |
//! | the entry | 01: one entry, inline | entry lock |
//! | number of the first chunk | 10: a chain | entry lock |
//!
//! 11 never occurs.

use crate::addr::Pfn;
use crate::export_rmap::flags::PageFlags;
use crate::export_rmap::frame_table::{Frame, FrameTable};
use crate::export_rmap::lock_rank::{self, Held, Rank};
use crate::sync::{Mutex, Ordering, lock, spin_loop};

/// Number of an export client, as its [`Registration`](crate::export_rmap::Registration) gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ClientId(u16);

impl ClientId {
    /// Most clients at a time.
    pub const MAX: u16 = (1 << 12) - 1;

    /// Wraps a number up to [`ClientId::MAX`]; `None` above.
    #[must_use]
    pub const fn new(raw: u16) -> Option<Self> {
        if raw <= Self::MAX { Some(Self(raw)) } else { None }
    }

    /// The raw number.
    #[must_use]
    pub const fn as_u16(self) -> u16 {
        self.0
    }
}

/// One mapping of a frame: whose, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RmapEntry(u64);

impl RmapEntry {
    const LOCATION_BITS: u32 = 48;
    /// The largest location that an entry can hold.
    pub const MAX_LOCATION: u64 = (1 << Self::LOCATION_BITS) - 1;

    /// An entry of `client`; `location` is the client's own and is cut to
    /// [`RmapEntry::MAX_LOCATION`].
    #[must_use]
    pub const fn new(client: ClientId, location: u64) -> Self {
        Self(((client.0 as u64) << Self::LOCATION_BITS) | (location & Self::MAX_LOCATION))
    }

    /// The client that holds the mapping.
    #[must_use]
    pub const fn client(self) -> ClientId {
        // `new` put a 12-bit number there.
        #[allow(clippy::cast_possible_truncation)]
        let raw = (self.0 >> Self::LOCATION_BITS) as u16;
        ClientId(raw)
    }

    /// Where the client maps the frame.
    #[must_use]
    pub const fn location(self) -> u64 {
        self.0 & Self::MAX_LOCATION
    }
}

/// What to do with an entry that was visited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retain {
    /// The mapping stands, perhaps with fewer rights.
    Keep,
    /// The mapping is gone.
    Drop,
}

const ENTRY_LOCK: u64 = 1;
const KIND_MASK: u64 = 0b110;
const KIND_INLINE: u64 = 0b010;
const KIND_CHAIN: u64 = 0b100;
const PAYLOAD_SHIFT: u32 = 3;

/// Entries of a chunk; with the link it makes 64 bytes, one cache line.
const CHUNK_ENTRIES: usize = 7;
/// "No further chunk".
const NO_CHUNK: u32 = u32::MAX;

#[derive(Clone, Debug)]
struct Chunk {
    entries: [u64; CHUNK_ENTRIES],
    len: u32,
    next: u32,
}

/// The chunks of all chains, allocated as needed. Their number is bounded by that of the clients'
/// mappings, which each client bounds itself.
#[derive(Debug, Default)]
pub(super) struct ChunkPool(Mutex<Chunks>);

#[derive(Debug, Default)]
struct Chunks {
    all: Vec<Chunk>,
    free: Vec<u32>,
}

impl Chunks {
    fn allocate(&mut self, next: u32) -> u32 {
        let chunk = Chunk { entries: [0; CHUNK_ENTRIES], len: 0, next };
        if let Some(index) = self.free.pop() {
            self.all[index as usize] = chunk;
            return index;
        }
        self.all.push(chunk);
        // 2^32 chunks would be 256 GiB.
        u32::try_from(self.all.len() - 1).unwrap_or(NO_CHUNK)
    }

    /// Puts an entry at the front of the chain; returns the chain's first chunk.
    fn push(&mut self, mut head: u32, entry: RmapEntry) -> u32 {
        if head == NO_CHUNK || self.all[head as usize].len as usize == CHUNK_ENTRIES {
            head = self.allocate(head);
        }
        let chunk = &mut self.all[head as usize];
        chunk.entries[chunk.len as usize] = entry.0;
        chunk.len += 1;
        head
    }

    /// Takes all entries out of the chain and frees its chunks.
    fn take(&mut self, mut head: u32) -> Vec<RmapEntry> {
        let mut entries = Vec::new();
        while head != NO_CHUNK {
            let chunk = &self.all[head as usize];
            entries.extend(chunk.entries[..chunk.len as usize].iter().map(|&raw| RmapEntry(raw)));
            self.free.push(head);
            head = chunk.next;
        }
        entries
    }
}

/// A frame's map while its entry lock is held.
struct LockedMap<'a> {
    frame: &'a Frame,
    chunks: &'a ChunkPool,
    head: u64,
    _held: Held,
}

impl<'a> LockedMap<'a> {
    fn lock(table: &'a FrameTable, pfn: Pfn) -> Self {
        let held = lock_rank::wait_for(Rank::RmapEntry(pfn));
        let frame = table.frame(pfn);
        loop {
            let head = frame.rmap.load(Ordering::Relaxed);
            // No fetch_or: a try that fails must store nothing, or a model checker that does not
            // order it before the plain store in `unlock` would let it undo that.
            if head & ENTRY_LOCK == 0
                && frame
                    .rmap
                    // Acquire pairs with the Release in `unlock`.
                    .compare_exchange_weak(
                        head,
                        head | ENTRY_LOCK,
                        Ordering::Acquire,
                        Ordering::Relaxed,
                    )
                    .is_ok()
            {
                return Self { frame, chunks: &table.chunks, head, _held: held };
            }
            spin_loop();
        }
    }

    /// Stores the head and makes the flag follow it: set before the entry can be seen, cleared
    /// only once none is left.
    fn unlock(self) {
        let exported = PageFlags::EXPORTED.bits();
        if self.head & KIND_MASK == 0 {
            self.frame.flags.fetch_and(!exported, Ordering::Relaxed);
        } else if self.frame.flags.load(Ordering::Relaxed) & exported == 0 {
            self.frame.flags.fetch_or(exported, Ordering::Relaxed);
        }
        // Release pairs with the Acquire in `lock`.
        self.frame.rmap.store(self.head & !ENTRY_LOCK, Ordering::Release);
    }

    fn first_chunk(&self) -> u32 {
        // Only `set` writes a chain's payload, from a u32.
        #[allow(clippy::cast_possible_truncation)]
        let index = (self.head >> PAYLOAD_SHIFT) as u32;
        index
    }

    fn push(&mut self, entry: RmapEntry) {
        match self.head & KIND_MASK {
            0 => self.head = (entry.0 << PAYLOAD_SHIFT) | KIND_INLINE,
            KIND_INLINE => {
                let first = RmapEntry(self.head >> PAYLOAD_SHIFT);
                let mut chunks = lock(&self.chunks.0);
                let chunk = chunks.push(NO_CHUNK, first);
                let chunk = chunks.push(chunk, entry);
                self.head = (u64::from(chunk) << PAYLOAD_SHIFT) | KIND_CHAIN;
            }
            _ => {
                let chunk = lock(&self.chunks.0).push(self.first_chunk(), entry);
                self.head = (u64::from(chunk) << PAYLOAD_SHIFT) | KIND_CHAIN;
            }
        }
    }

    /// Takes all entries out, leaving the map empty.
    fn take(&mut self) -> Taken {
        let taken = match self.head & KIND_MASK {
            0 => Taken::None,
            KIND_INLINE => Taken::One(RmapEntry(self.head >> PAYLOAD_SHIFT)),
            _ => Taken::Many(lock(&self.chunks.0).take(self.first_chunk())),
        };
        self.head = 0;
        taken
    }
}

/// Entries taken out of a map; the common cases do not allocate.
enum Taken {
    None,
    One(RmapEntry),
    Many(Vec<RmapEntry>),
}

impl Taken {
    fn as_slice(&self) -> &[RmapEntry] {
        match self {
            Taken::None => &[],
            Taken::One(entry) => std::slice::from_ref(entry),
            Taken::Many(entries) => entries,
        }
    }
}

// An inline entry must fit beside the lock and kind bits.
const _: () = assert!(RmapEntry::LOCATION_BITS + 12 + PAYLOAD_SHIFT <= 64);

impl FrameTable {
    /// Adds a mapping to the frame's map and so sets `EXPORTED`. The caller holds its MMU lock and
    /// checks the invalidation sequence afterwards, before the mapping can be used.
    pub fn rmap_add(&self, pfn: Pfn, entry: RmapEntry) {
        let mut map = LockedMap::lock(self, pfn);
        map.push(entry);
        map.unlock();
    }

    /// Removes one mapping; whether it was there. `EXPORTED` is cleared with the last one.
    pub fn rmap_remove(&self, pfn: Pfn, entry: RmapEntry) -> bool {
        let mut found = false;
        self.visit(pfn, |other| {
            if !found && other == entry {
                found = true;
                Retain::Drop
            } else {
                Retain::Keep
            }
        });
        found
    }

    /// Calls `visit` with the location of each mapping that `client` has of the frame, and drops
    /// those for which it says so. `visit` must not lock anything: the entry lock spins.
    pub fn rmap_visit(&self, pfn: Pfn, client: ClientId, mut visit: impl FnMut(u64) -> Retain) {
        self.visit(pfn, |entry| {
            if entry.client() == client { visit(entry.location()) } else { Retain::Keep }
        });
    }

    /// Notes that a client wrote to the page, when it gives a mapping up of its own accord. For a
    /// client that holds its MMU lock and has not removed the mapping's entry yet: an invalidation
    /// that no longer finds the entry then finds the page dirty, since both stand in one word.
    pub fn note_dirty(&self, pfn: Pfn) {
        self.frame(pfn).flags.fetch_or(PageFlags::BY_WRITE.bits(), Ordering::Relaxed);
    }

    /// All mappings of the frame, for checks.
    #[must_use]
    pub fn rmap_entries(&self, pfn: Pfn) -> Vec<RmapEntry> {
        let mut entries = Vec::new();
        self.visit(pfn, |entry| {
            entries.push(entry);
            Retain::Keep
        });
        entries
    }

    /// Whether the frame's map has no entry, without waiting for its lock: a hint, unless nobody
    /// adds one meanwhile.
    #[must_use]
    pub fn is_rmap_empty(&self, pfn: Pfn) -> bool {
        self.frame(pfn).rmap.load(Ordering::Relaxed) & KIND_MASK == 0
    }

    fn visit(&self, pfn: Pfn, mut visit: impl FnMut(RmapEntry) -> Retain) {
        let mut map = LockedMap::lock(self, pfn);
        let taken = map.take();
        for &entry in taken.as_slice() {
            if visit(entry) == Retain::Keep {
                map.push(entry);
            }
        }
        map.unlock();
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FRAME: Pfn = Pfn::new(0);

    fn client(raw: u16) -> ClientId {
        ClientId::new(raw).unwrap()
    }

    #[test]
    fn the_largest_entry_survives_inline_and_chained() {
        let table = FrameTable::new(1);
        let entry = RmapEntry::new(client(ClientId::MAX), RmapEntry::MAX_LOCATION);
        table.rmap_add(FRAME, entry);
        assert_eq!(table.rmap_entries(FRAME), [entry]);
        let other = RmapEntry::new(client(0), 0);
        table.rmap_add(FRAME, other);
        let mut entries = table.rmap_entries(FRAME);
        entries.sort_by_key(|entry| entry.0);
        assert_eq!(entries, [other, entry]);
    }

    #[test]
    fn a_client_sees_only_its_own_mappings() {
        let table = FrameTable::new(1);
        table.rmap_add(FRAME, RmapEntry::new(client(1), 10));
        table.rmap_add(FRAME, RmapEntry::new(client(2), 20));
        let mut seen = Vec::new();
        table.rmap_visit(FRAME, client(2), |location| {
            seen.push(location);
            Retain::Drop
        });
        assert_eq!(seen, [20]);
        assert!(table.get(FRAME).unwrap().is_exported(), "client 1 still maps it");
        table.rmap_visit(FRAME, client(1), |_| Retain::Drop);
        assert!(!table.get(FRAME).unwrap().is_exported());
    }

    #[test]
    fn chunks_are_used_again() {
        let table = FrameTable::new(1);
        for _ in 0..100 {
            for location in 0..50 {
                table.rmap_add(FRAME, RmapEntry::new(client(1), location));
            }
            table.rmap_visit(FRAME, client(1), |_| Retain::Drop);
        }
        assert!(lock(&table.chunks.0).all.len() <= 50usize.div_ceil(CHUNK_ENTRIES) + 1);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Add(u16, u64),
        Remove(u16, u64),
        DropAll(u16),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => (0..3u16, 0..12u64).prop_map(|(client, at)| Step::Add(client, at)),
            2 => (0..3u16, 0..12u64).prop_map(|(client, at)| Step::Remove(client, at)),
            1 => (0..3u16).prop_map(Step::DropAll),
        ]
    }

    proptest! {
        /// Against a plain multiset: same entries and, after each step, I4.
        #[test]
        fn it_is_a_multiset_and_the_flag_follows_it(steps in prop::collection::vec(step(), 0..200)) {
            let table = FrameTable::new(1);
            let mut model: Vec<(u16, u64)> = Vec::new();
            for step in steps {
                match step {
                    Step::Add(raw, at) => {
                        table.rmap_add(FRAME, RmapEntry::new(client(raw), at));
                        model.push((raw, at));
                    }
                    Step::Remove(raw, at) => {
                        let found = table.rmap_remove(FRAME, RmapEntry::new(client(raw), at));
                        let place = model.iter().position(|&entry| entry == (raw, at));
                        prop_assert_eq!(found, place.is_some());
                        place.map(|place| model.swap_remove(place));
                    }
                    Step::DropAll(raw) => {
                        table.rmap_visit(FRAME, client(raw), |_| Retain::Drop);
                        model.retain(|entry| entry.0 != raw);
                    }
                }
                let mut entries: Vec<_> = table
                    .rmap_entries(FRAME)
                    .iter()
                    .map(|entry| (entry.client().as_u16(), entry.location()))
                    .collect();
                entries.sort_unstable();
                model.sort_unstable();
                prop_assert_eq!(&entries, &model);
                prop_assert_eq!(table.get(FRAME).unwrap().is_exported(), !model.is_empty());
            }
        }
    }
}
