//! The reverse map: from a frame to every place in which an export client maps it.
//!
//! Guarantees:
//!
//! - [`EXPORTED`](PageFlags::EXPORTED) is set exactly while a frame's map holds an entry (invariant
//!   I4), as seen by anyone who holds the entry lock, which is bit 0 of the head word;
//! - adding or removing an entry takes time in proportion to the logarithm of the frame's entries at
//!   most (invariant I10), and no step holds a lock for longer than [`VISIT_BATCH`] entries take.
//!
//! One map serves all clients; an entry carries the [`ClientId`] and a location that only the
//! client can read. A map is a *set*: a location of a client maps one frame at most, so nobody has an
//! entry twice. A frame with one mapping, by far the most common case, has it inline in the head word;
//! a few are together in a cache line; more are in an ordered set, where a client's are neighbours, so
//! that a visit of one client meets no entry of another and can go on where it stopped.
//!
//! | head, bits 63..3 | bits 2..1 | bit 0 |
//! |---|---|---|
//! | 0 | 00: empty | entry lock |
//! | the entry | 01: one entry, inline | entry lock |
//! | number of the line | 10: a few | entry lock |
//! | number of the ordered set | 11: many | entry lock |

use std::collections::BTreeSet;
use std::ops::RangeInclusive;

use crate::addr::Pfn;
use crate::flags::PageFlags;
use crate::frame_table::{Frame, FrameTable};
use crate::lock_rank::{self, Held, Rank};
use crate::sync::{Mutex, Ordering, lock, spin_loop};

/// Number of an export client, as its [`Membership`](crate::Membership) gives it.
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

/// One mapping of a frame: whose, and where. In order of the clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RmapEntry(u64);

impl Ord for RmapEntry {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        #[cfg(all(test, not(any(loom, shuttle))))]
        tests::count_comparison();
        self.0.cmp(&other.0)
    }
}

impl PartialOrd for RmapEntry {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

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
const KIND_ONE: u64 = 0b010;
const KIND_FEW: u64 = 0b100;
const KIND_MANY: u64 = 0b110;
const PAYLOAD_SHIFT: u32 = 3;

/// Entries that are visited at a time: what a lock is held for at most.
pub const VISIT_BATCH: usize = 128;

/// Entries of a line; with their count it makes 64 bytes, one cache line.
const LINE_ENTRIES: usize = 7;
/// An ordered set that has shrunk to so many becomes a line again: not at once, or a mapping that
/// comes and goes would have all of them copied each time.
const FEW_AGAIN: usize = 3;

/// A few entries, in no order.
#[derive(Clone, Debug, Default)]
struct Line {
    entries: [u64; LINE_ENTRIES],
    len: u32,
}

const _: () = assert!(size_of::<Line>() == 64);

impl Line {
    fn of(entries: impl IntoIterator<Item = RmapEntry>) -> Self {
        let mut line = Self::default();
        for entry in entries {
            line.push(entry);
        }
        line
    }

    fn len(&self) -> usize {
        self.len as usize
    }

    fn iter(&self) -> impl Iterator<Item = RmapEntry> {
        self.entries[..self.len()].iter().map(|&raw| RmapEntry(raw))
    }

    fn position(&self, entry: RmapEntry) -> Option<usize> {
        self.iter().position(|other| other == entry)
    }

    /// `false` if the line is full.
    fn push(&mut self, entry: RmapEntry) -> bool {
        let at = self.len();
        let Some(free) = self.entries.get_mut(at) else { return false };
        *free = entry.0;
        self.len += 1;
        true
    }

    fn retain(&mut self, keep: impl FnMut(&RmapEntry) -> bool) {
        *self = Self::of(self.iter().filter(keep));
    }
}

/// Values with numbers, allocated as needed; numbers that are free are given again.
#[derive(Debug)]
struct Pool<T> {
    all: Vec<T>,
    free: Vec<u32>,
}

impl<T> Default for Pool<T> {
    fn default() -> Self {
        Self { all: Vec::new(), free: Vec::new() }
    }
}

impl<T: Default> Pool<T> {
    fn put(&mut self, value: T) -> u32 {
        if let Some(number) = self.free.pop() {
            *self.get(number) = value;
            return number;
        }
        self.all.push(value);
        // 2^32 of them would be 96 GiB at least.
        u32::try_from(self.all.len() - 1).unwrap_or(u32::MAX)
    }

    fn get(&mut self, number: u32) -> &mut T {
        &mut self.all[number as usize]
    }

    fn take(&mut self, number: u32) -> T {
        self.free.push(number);
        std::mem::take(self.get(number))
    }
}

/// The memory of all maps of more than one entry. It is bounded by the number of the clients'
/// mappings, which each client bounds itself. The lock is held for a line at most: an ordered set is
/// taken out while it is worked on, under the entry lock of its frame.
#[derive(Debug, Default)]
pub(super) struct RmapMemory(Mutex<Pools>);

#[derive(Debug, Default)]
struct Pools {
    few: Pool<Line>,
    many: Pool<BTreeSet<RmapEntry>>,
}

/// How a map is kept, as the head says.
enum Kind {
    Empty,
    One(RmapEntry),
    Few(u32),
    Many(u32),
}

/// A frame's map while its entry lock is held.
struct LockedMap<'a> {
    frame: &'a Frame,
    memory: &'a RmapMemory,
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
                return Self { frame, memory: &table.rmap_memory, head, _held: held };
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

    // Only `set` writes the payload of the kinds with a number, from a u32.
    #[allow(clippy::cast_possible_truncation)]
    fn kind(&self) -> Kind {
        let payload = self.head >> PAYLOAD_SHIFT;
        match self.head & KIND_MASK {
            KIND_ONE => Kind::One(RmapEntry(payload)),
            KIND_FEW => Kind::Few(payload as u32),
            KIND_MANY => Kind::Many(payload as u32),
            _ => Kind::Empty,
        }
    }

    fn set(&mut self, payload: u64, kind: u64) {
        self.head = (payload << PAYLOAD_SHIFT) | kind;
    }

    /// Keeps these entries, a line of them at most, in the way that fits their number.
    fn set_few(&mut self, pools: &mut Pools, line: Line) {
        match line.len() {
            0 => self.head = 0,
            1 => self.set(line.entries[0], KIND_ONE),
            _ => {
                let number = pools.few.put(line);
                self.set(number.into(), KIND_FEW);
            }
        }
    }

    fn len(&mut self) -> usize {
        match self.kind() {
            Kind::Empty => 0,
            Kind::One(_) => 1,
            Kind::Few(number) => lock(&self.memory.0).few.get(number).len(),
            Kind::Many(number) => lock(&self.memory.0).many.get(number).len(),
        }
    }

    /// Adds an entry; `false` if it was there.
    fn insert(&mut self, entry: RmapEntry) -> bool {
        match self.kind() {
            Kind::Empty => self.set(entry.0, KIND_ONE),
            Kind::One(first) if first == entry => return false,
            Kind::One(first) => {
                let mut pools = lock(&self.memory.0);
                self.set_few(&mut pools, Line::of([first, entry]));
            }
            Kind::Few(number) => {
                let mut pools = lock(&self.memory.0);
                let line = pools.few.get(number);
                if line.position(entry).is_some() {
                    return false;
                }
                if !line.push(entry) {
                    let line = pools.few.take(number);
                    let set = line.iter().chain([entry]).collect();
                    let number = pools.many.put(set);
                    self.set(number.into(), KIND_MANY);
                }
            }
            Kind::Many(number) => return self.with_set(number, |set| set.insert(entry)),
        }
        true
    }

    /// Works on the ordered set, without the lock that all frames share.
    fn with_set<R>(&mut self, number: u32, work: impl FnOnce(&mut BTreeSet<RmapEntry>) -> R) -> R {
        let mut set = std::mem::take(lock(&self.memory.0).many.get(number));
        let result = work(&mut set);
        let mut pools = lock(&self.memory.0);
        if set.len() <= FEW_AGAIN {
            pools.many.take(number);
            self.set_few(&mut pools, Line::of(set));
        } else {
            *pools.many.get(number) = set;
        }
        result
    }

    /// Calls `visit` with the entries of the range in ascending order if there are many of them, and
    /// drops those for which it says so; at most `most`, or a line. Returns the next entry.
    fn visit(
        &mut self,
        range: RangeInclusive<RmapEntry>,
        most: usize,
        mut visit: impl FnMut(RmapEntry) -> Retain,
    ) -> Option<RmapEntry> {
        match self.kind() {
            Kind::Empty => {}
            Kind::One(entry) => {
                if range.contains(&entry) && visit(entry) == Retain::Drop {
                    self.head = 0;
                }
            }
            Kind::Few(number) => {
                let mut line = std::mem::take(lock(&self.memory.0).few.get(number));
                line.retain(|&entry| !range.contains(&entry) || visit(entry) == Retain::Keep);
                let mut pools = lock(&self.memory.0);
                if line.len() > 1 {
                    *pools.few.get(number) = line;
                } else {
                    pools.few.take(number);
                    self.set_few(&mut pools, line);
                }
            }
            Kind::Many(number) => {
                return self.with_set(number, |set| {
                    let mut entries: Vec<_> = set.range(range).take(most + 1).copied().collect();
                    let next = if entries.len() > most { entries.pop() } else { None };
                    for entry in entries {
                        if visit(entry) == Retain::Drop {
                            set.remove(&entry);
                        }
                    }
                    next
                });
            }
        }
        None
    }

    fn remove(&mut self, entry: RmapEntry) -> bool {
        if let Kind::Many(number) = self.kind() {
            return self.with_set(number, |set| set.remove(&entry));
        }
        let mut found = false;
        self.visit(entry..=entry, LINE_ENTRIES, |_| {
            found = true;
            Retain::Drop
        });
        found
    }
}

// An inline entry must fit beside the lock and kind bits.
const _: () = assert!(RmapEntry::LOCATION_BITS + 12 + PAYLOAD_SHIFT <= 64);

impl FrameTable {
    /// Adds a mapping to the frame's map and so sets `EXPORTED`; whether it was not there. The caller
    /// holds its MMU lock and checks the invalidation sequence afterwards, before the mapping can be
    /// used.
    pub(crate) fn rmap_add(&self, pfn: Pfn, entry: RmapEntry) -> bool {
        let mut map = LockedMap::lock(self, pfn);
        let added = map.insert(entry);
        map.unlock();
        added
    }

    /// Removes one mapping; whether it was there. `EXPORTED` is cleared with the last one.
    pub(crate) fn rmap_remove(&self, pfn: Pfn, entry: RmapEntry) -> bool {
        let mut map = LockedMap::lock(self, pfn);
        let removed = map.remove(entry);
        map.unlock();
        removed
    }

    /// Whether the frame's map lists a mapping.
    #[must_use]
    pub fn rmap_contains(&self, pfn: Pfn, entry: RmapEntry) -> bool {
        let mut map = LockedMap::lock(self, pfn);
        let mut found = false;
        map.visit(entry..=entry, 1, |_| {
            found = true;
            Retain::Keep
        });
        map.unlock();
        found
    }

    /// Number of mappings in the frame's map.
    #[must_use]
    pub fn rmap_len(&self, pfn: Pfn) -> usize {
        let mut map = LockedMap::lock(self, pfn);
        let len = map.len();
        map.unlock();
        len
    }

    /// Calls `visit` with the location of each mapping that `client` has of the frame, and drops
    /// those for which it says so. `visit` must not lock anything: the entry lock spins. It is let go
    /// from time to time: the client sees to it that no mapping of its own comes or goes meanwhile.
    pub fn rmap_visit(&self, pfn: Pfn, client: ClientId, mut visit: impl FnMut(u64) -> Retain) {
        let mut from = Some(0);
        while let Some(location) = from {
            from = self.rmap_visit_batch(pfn, client, location, &mut visit);
        }
    }

    /// As [`rmap_visit`](Self::rmap_visit), but at most [`VISIT_BATCH`] mappings, of those at `from`
    /// and above. Returns the location to go on from, or `None` after the last.
    pub fn rmap_visit_batch(
        &self,
        pfn: Pfn,
        client: ClientId,
        from: u64,
        mut visit: impl FnMut(u64) -> Retain,
    ) -> Option<u64> {
        let mut map = LockedMap::lock(self, pfn);
        let first = RmapEntry::new(client, from);
        let last = RmapEntry::new(client, RmapEntry::MAX_LOCATION);
        let next = map.visit(first..=last, VISIT_BATCH, |entry| visit(entry.location()));
        map.unlock();
        next.map(RmapEntry::location)
    }

    /// The clients that have a mapping of the frame, in ascending order: a look for each, however many
    /// mappings it has.
    #[must_use]
    pub fn rmap_clients(&self, pfn: Pfn) -> Vec<ClientId> {
        let mut clients = Vec::new();
        let mut from = RmapEntry(0);
        loop {
            let mut first: Option<RmapEntry> = None;
            let mut map = LockedMap::lock(self, pfn);
            // A line is visited whole, and in no order.
            map.visit(from..=RmapEntry(u64::MAX), 1, |entry| {
                first = Some(first.map_or(entry, |first| first.min(entry)));
                Retain::Keep
            });
            map.unlock();
            let Some(entry) = first else { return clients };
            clients.push(entry.client());
            from = RmapEntry(RmapEntry::new(entry.client(), RmapEntry::MAX_LOCATION).0 + 1);
        }
    }

    /// Notes that a client wrote to the page, when it gives a mapping up of its own accord. For a
    /// client that holds its MMU lock and has not removed the mapping's entry yet: an invalidation
    /// that no longer finds the entry then finds the page dirty, since both stand in one word.
    pub(crate) fn note_dirty(&self, pfn: Pfn) {
        self.frame(pfn).flags.fetch_or(PageFlags::BY_WRITE.bits(), Ordering::Relaxed);
    }

    /// All mappings of the frame, for checks.
    #[must_use]
    pub fn rmap_entries(&self, pfn: Pfn) -> Vec<RmapEntry> {
        let mut entries = Vec::new();
        let mut from = Some(RmapEntry(0));
        while let Some(first) = from {
            let mut map = LockedMap::lock(self, pfn);
            from = map.visit(first..=RmapEntry(u64::MAX), VISIT_BATCH, |entry| {
                entries.push(entry);
                Retain::Keep
            });
            map.unlock();
        }
        entries
    }

    /// Whether the frame's map has no entry, without waiting for its lock: a hint, unless nobody
    /// adds one meanwhile.
    #[must_use]
    pub fn is_rmap_empty(&self, pfn: Pfn) -> bool {
        self.frame(pfn).rmap.load(Ordering::Relaxed) & KIND_MASK == 0
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
#[path = "rmap_tests.rs"]
mod tests;
