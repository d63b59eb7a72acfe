//! The slots of a peer as the peer sees them, and everything that it checks.
//!
//! What is checked, each exactly, without any guess about time but for the last two:
//!
//! - a message about a slot fits what the peer asked for and gave up;
//! - a held page reads the same at any time, until the peer has acknowledged that it gave it up, or
//!   the connection is closed;
//! - two copies of one page that are held at the same time are the same: nobody wrote in between;
//! - a page that the guest's oracle watches carries its own number;
//! - a slot that was freed, and every slot once the connection is closed, is empty: what was there
//!   is out of reach, though the peer still has its mapping;
//! - a page that was copied in the middle of a write is asked back in [`TORN_LIMIT`];
//! - a held slot that is found empty is the end of the connection: slots are emptied before the
//!   message goes out that says so, which must come in [`CLOSED_LIMIT`].

use std::time::{Duration, Instant};

use rand::RngExt;
use rand::rngs::StdRng;
use vm_memory::{Bytes, MmapRegion, VolatileMemory};
use xxhash_rust::xxh3::xxh3_64;

use crate::addr::{Gfn, PAGE_SIZE};
use crate::page_format::WORDS;
use crate::peer::protocol::Closing;
use crate::peer::verify::{Page, Verifier, Words};

/// Time in which the writer of a page that was caught in the middle of a write must ask for it. It
/// goes on as soon as it has a processor.
pub const TORN_LIMIT: Duration = Duration::from_secs(30);
/// Time in which the server must say that it has closed the connection, once it has emptied a slot.
const CLOSED_LIMIT: Duration = Duration::from_secs(30);
/// Violations that are kept in words.
const MAX_KEPT: usize = 20;

/// A page in a slot.
#[derive(Clone, Copy, Debug)]
struct Held {
    object: u32,
    gfn: Gfn,
    hash: u64,
    /// When it was lent, if it was in the middle of a write.
    torn: Option<Instant>,
    /// When the peer gives it up of its own accord.
    until: Instant,
}

#[derive(Clone, Copy, Debug)]
enum Slot {
    Free,
    Asked {
        object: u32,
        gfn: Gfn,
    },
    Held(Held),
    /// Given up; the server has not said that it is empty.
    GivenUp {
        sequence: Option<u64>,
    },
}

/// What a peer has done and found.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Findings {
    /// Pages lent.
    pub mapped: u64,
    /// Pages that the server could not lend.
    pub refused: u64,
    /// Slots invalidated.
    pub invalidated: u64,
    /// Invalidations acknowledged.
    pub acknowledged: u64,
    /// Slots given up of the peer's own accord.
    pub unmapped: u64,
    /// Pages read and compared with what they were at first.
    pub verified: u64,
    /// Pairs of copies of one page that were compared.
    pub twins: u64,
    /// Slots found empty after they were freed.
    pub empty: u64,
    /// Pages that were copied in the middle of a write.
    pub torn: u64,
    /// Everything that was wrong.
    pub violations: u64,
    /// The first of it, a sentence each.
    pub first: Vec<String>,
}

impl Findings {
    fn violation(&mut self, text: String) {
        self.violations += 1;
        if self.first.len() < MAX_KEPT {
            self.first.push(text);
        }
    }
}

/// The slots and the file that they are in.
pub(super) struct Slots {
    slots: Vec<Slot>,
    region: MmapRegion,
    verifier: Verifier,
    /// The first held slot that was found empty: when, and what that is unless it is the end.
    emptied: Option<(Instant, String)>,
    pub(super) findings: Findings,
}

impl Slots {
    pub(super) fn new(count: u32, region: MmapRegion) -> Self {
        Self {
            slots: vec![Slot::Free; count as usize],
            region,
            verifier: Verifier::default(),
            emptied: None,
            findings: Findings::default(),
        }
    }

    fn words(&self, slot: u32) -> Words {
        let mut bytes = [0; PAGE_SIZE];
        // Inside the region: the slot exists.
        let _ = self.region.as_volatile_slice().read_slice(&mut bytes, slot as usize * PAGE_SIZE);
        let mut words = [0; WORDS];
        for (word, chunk) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = chunk.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte));
        }
        words
    }

    fn get(&mut self, slot: u32) -> Option<&mut Slot> {
        self.slots.get_mut(slot as usize)
    }

    /// A run of free slots, at most so many; `None` if too few are free for more than `most_used`
    /// to stay unused.
    pub(super) fn free_run(&self, most_used: usize, most: u32) -> Option<(u32, u32)> {
        let used = self.slots.iter().filter(|slot| !matches!(slot, Slot::Free)).count();
        let most = most.min(u32::try_from(most_used.saturating_sub(used)).unwrap_or(u32::MAX));
        let is_free = |slot: &Slot| matches!(slot, Slot::Free);
        let first = self.slots.iter().position(is_free).filter(|_| most > 0)?;
        let run = self.slots[first..].iter().take(most as usize).take_while(|slot| is_free(slot));
        Some((u32::try_from(first).ok()?, u32::try_from(run.count()).ok()?))
    }

    /// A page that is held, chosen at random.
    pub(super) fn any_held(&self, random: &mut StdRng) -> Option<(u32, u32, Gfn)> {
        let start = random.random_range(0..self.slots.len().max(1));
        let order = (start..self.slots.len()).chain(0..start);
        order.into_iter().find_map(|at| match &self.slots[at] {
            Slot::Held(held) => Some((u32::try_from(at).ok()?, held.object, held.gfn)),
            _ => None,
        })
    }

    pub(super) fn asked(&mut self, slot: u32, object: u32, gfn: Gfn) {
        if let Some(found) = self.get(slot) {
            *found = Slot::Asked { object, gfn };
        }
    }

    pub(super) fn refused(&mut self, slot: u32, gfn: Gfn) {
        match self.get(slot) {
            Some(found @ Slot::Asked { .. }) => {
                *found = Slot::Free;
                self.findings.refused += 1;
            }
            _ => self
                .findings
                .violation(format!("slot {slot} was refused page {gfn}, which nobody asked for")),
        }
    }

    pub(super) fn mapped(
        &mut self,
        slot: u32,
        (object, gfn): (u32, Gfn),
        is_watched: bool,
        hold: Duration,
    ) {
        match self.get(slot) {
            Some(Slot::Asked { object: asked, gfn: page }) if (*asked, *page) == (object, gfn) => {}
            found => {
                let found = format!("{found:?}");
                return self.findings.violation(format!(
                    "slot {slot} was lent page {gfn} of object {object}, but is {found}"
                ));
            }
        }
        self.findings.mapped += 1;
        let words = self.words(slot);
        let hash = hash(&words);
        let now = Instant::now();
        let mut torn = None;
        if is_watched {
            match self.verifier.check(gfn, &words) {
                Ok(Page::Torn) => {
                    self.findings.torn += 1;
                    torn = Some(now);
                }
                Ok(Page::Zero | Page::Whole) => {}
                Err(wrong) => self.findings.violation(format!("page {gfn} {wrong}")),
            }
        }
        self.compare_twins(slot, object, gfn, hash);
        if let Some(found) = self.get(slot) {
            *found = Slot::Held(Held { object, gfn, hash, torn, until: now + hold });
        }
    }

    /// Compares with the other copies of the page that are held.
    fn compare_twins(&mut self, new: u32, object: u32, gfn: Gfn, hash: u64) {
        let mut differing = None;
        for (at, slot) in self.slots.iter().enumerate() {
            if let Slot::Held(held) = slot
                && (held.object, held.gfn) == (object, gfn)
            {
                self.findings.twins += 1;
                if held.hash != hash {
                    differing = Some(at);
                }
            }
        }
        if let Some(at) = differing {
            self.differs(
                new,
                format!(
                    "page {gfn} of object {object} has changed while slot {at} held a copy of it"
                ),
            );
        }
    }

    /// The slot is not what it should be. If it is empty that may be the end of the connection.
    fn differs(&mut self, slot: u32, violation: String) {
        // Read again: half of a page can be read before it goes, and half after.
        if self.is_empty(slot) {
            self.emptied.get_or_insert_with(|| (Instant::now(), violation));
        } else {
            self.findings.violation(violation);
        }
    }

    /// Reads a held page again.
    pub(super) fn verify(&mut self, slot: u32) {
        let found = hash(&self.words(slot));
        if let Some(&mut Slot::Held(held)) = self.get(slot) {
            self.findings.verified += 1;
            if found != held.hash {
                let gfn = held.gfn;
                self.differs(slot, format!("page {gfn} in slot {slot} changed while held"));
            }
        }
    }

    /// Gives up what an invalidation names.
    pub(super) fn invalidated(&mut self, sequence: u64, named: &[u32]) {
        for &slot in named {
            self.verify(slot);
            match self.get(slot) {
                Some(found @ (Slot::Held(_) | Slot::GivenUp { sequence: None })) => {
                    *found = Slot::GivenUp { sequence: Some(sequence) };
                    self.findings.invalidated += 1;
                }
                found => {
                    let found = format!("{found:?}");
                    self.findings.violation(format!("slot {slot} was invalidated, but is {found}"));
                }
            }
        }
    }

    /// What is behind its time is given up: those slots are returned.
    pub(super) fn expire(&mut self, now: Instant) -> Vec<u32> {
        if self.emptied.as_ref().is_some_and(|(since, _)| now - *since > CLOSED_LIMIT) {
            self.emptied_by_nobody();
        }
        let mut given_up = Vec::new();
        for slot in 0..u32::try_from(self.slots.len()).unwrap_or(u32::MAX) {
            let Some(&mut Slot::Held(held)) = self.get(slot) else { continue };
            let gfn = held.gfn;
            match held.torn {
                // Kept: whoever writes it must ask for it.
                Some(since) if now - since < TORN_LIMIT => continue,
                Some(_) => self.findings.violation(format!(
                    "page {gfn} was copied in the middle of a write that did not go on in {} s",
                    TORN_LIMIT.as_secs()
                )),
                None if held.until > now => continue,
                None => {}
            }
            self.verify(slot);
            if let Some(found) = self.get(slot) {
                *found = Slot::GivenUp { sequence: None };
            }
            self.findings.unmapped += 1;
            given_up.push(slot);
        }
        given_up
    }

    pub(super) fn unmapped(&mut self, slot: u32) {
        match self.get(slot) {
            Some(Slot::GivenUp { sequence: None }) => self.freed_slot(slot),
            found => {
                let found = format!("{found:?}");
                self.findings.violation(format!("slot {slot} was said to be free, but is {found}"));
            }
        }
    }

    pub(super) fn freed(&mut self, sequence: u64) {
        for slot in 0..u32::try_from(self.slots.len()).unwrap_or(u32::MAX) {
            if matches!(self.get(slot), Some(Slot::GivenUp { sequence: Some(of) }) if *of == sequence)
            {
                self.freed_slot(slot);
            }
        }
    }

    fn freed_slot(&mut self, slot: u32) {
        self.check_empty(slot);
        if let Some(found) = self.get(slot) {
            *found = Slot::Free;
        }
    }

    /// A slot was emptied, and not because the server closed the connection.
    pub(super) fn emptied_by_nobody(&mut self) {
        if let Some((_, violation)) = self.emptied.take() {
            self.findings.violation(violation);
        }
    }

    fn is_empty(&self, slot: u32) -> bool {
        self.words(slot).iter().all(|&word| word == 0)
    }

    fn check_empty(&mut self, slot: u32) {
        if self.is_empty(slot) {
            self.findings.empty += 1;
        } else {
            self.findings.violation(format!("slot {slot} can still be read after it was freed"));
        }
    }

    /// The connection is closed: nothing may be left.
    pub(super) fn closed(&mut self, why: Closing) {
        // What the peer's own good-bye empties is emptied after it.
        if why == Closing::Left {
            self.emptied_by_nobody();
        }
        for slot in 0..u32::try_from(self.slots.len()).unwrap_or(u32::MAX) {
            self.freed_slot(slot);
        }
    }
}

fn hash(words: &Words) -> u64 {
    let mut bytes = [0; PAGE_SIZE];
    for (chunk, word) in bytes.chunks_exact_mut(8).zip(words) {
        chunk.copy_from_slice(&word.to_le_bytes());
    }
    xxh3_64(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    /// A peer that holds a page in slot 1, which is then emptied under it.
    fn emptied() -> Slots {
        let mut slots = Slots::new(2, MmapRegion::new(2 * PAGE_SIZE).unwrap());
        write(&slots, &[7; PAGE_SIZE]);
        slots.asked(1, 0, Gfn::new(5));
        slots.mapped(1, (0, Gfn::new(5)), false, HOUR);
        slots.verify(1);
        write(&slots, &[0; PAGE_SIZE]);
        slots.verify(1);
        assert_eq!((slots.findings.verified, slots.findings.violations), (2, 0));
        slots
    }

    fn write(slots: &Slots, page: &[u8]) {
        slots.region.as_volatile_slice().write_slice(page, PAGE_SIZE).unwrap();
    }

    #[test]
    fn a_slot_that_the_end_of_the_connection_emptied_is_no_violation() {
        for why in [Closing::EndOfRun, Closing::TooSlow] {
            let mut slots = emptied();
            slots.closed(why);
            assert_eq!((slots.findings.violations, slots.findings.empty), (0, 2));
        }
    }

    #[test]
    fn a_slot_that_is_emptied_and_no_end_follows_is_a_violation() {
        let mut slots = emptied();
        slots.expire(Instant::now());
        assert_eq!(slots.findings.violations, 0);
        slots.expire(Instant::now() + 2 * CLOSED_LIMIT);
        assert_eq!(slots.findings.violations, 1);

        let mut slots = emptied();
        slots.closed(Closing::Left);
        assert_eq!(slots.findings.violations, 1, "emptied before the peer said that it leaves");
    }

    #[test]
    fn a_slot_that_holds_something_else_is_a_violation_at_once() {
        let mut slots = emptied();
        write(&slots, &[8; PAGE_SIZE]);
        slots.verify(1);
        assert_eq!(slots.findings.violations, 1);
    }
}
