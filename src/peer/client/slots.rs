//! The slots of a peer as the peer sees them, and everything that it checks.
//!
//! What is checked, each exactly, without any guess about time but for the last two:
//!
//! - a message about a slot fits what the peer asked for and gave up: each request is answered once,
//!   with its own pages, and in the order of the requests;
//! - a slot that is free is empty when it is asked for, and one that is refused is;
//! - a held page reads the same at any time, until the peer has acknowledged that it gave it up, or
//!   the connection is closed;
//! - two copies of one page that are held at the same time are the same: nobody wrote in between;
//! - a page that the guest's oracle watches carries its own number;
//! - a slot that was freed, and every slot once the connection is closed, is empty: what was there
//!   is out of reach, though the peer still has its mapping;
//! - a page that was copied in the middle of a write is asked back in [`TORN_LIMIT`];
//! - a held slot that is found empty is the end of the connection: slots are emptied before the
//!   message goes out that says so, which must come in [`CLOSED_LIMIT`].

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use rand::RngExt;
use rand::rngs::StdRng;
use vm_memory::{Bytes, MmapRegion, VolatileMemory};
use xxhash_rust::xxh3::xxh3_64;

use crate::abi::verify::{Page, Words};
use crate::addr::{Gfn, PAGE_SIZE};
use crate::page_format::WORDS;
use crate::peer::client::test_guest::TestGuest;
use crate::peer::protocol::{Closing, Refusal};

/// Time in which the writer of a page that was caught in the middle of a write must ask for it. It
/// goes on as soon as it has a processor.
pub const TORN_LIMIT: Duration = Duration::from_secs(30);
/// Time in which the server must say that it has closed the connection, once it has emptied a slot.
const CLOSED_LIMIT: Duration = Duration::from_secs(30);
/// Most of the time between two looks that counts: for the rest this process had no processor.
const LONGEST_TICK: Duration = Duration::from_millis(20);
/// A server at work says something more often than this.
const SILENCE: Duration = Duration::from_secs(1);
/// Violations that are kept in words.
const MAX_KEPT: usize = 20;

/// A page in a slot.
#[derive(Clone, Copy, Debug)]
struct Held {
    object: u32,
    gfn: Gfn,
    hash: u64,
    /// How long the connection had lived when it was lent, if it was in the middle of a write.
    torn: Option<Duration>,
    /// When the peer gives it up of its own accord.
    until: Instant,
}

#[derive(Clone, Copy, Debug)]
enum Slot {
    Free,
    Asked {
        object: u32,
        gfn: Gfn,
        /// Number of the request.
        request: u64,
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
    /// Pages asked for.
    pub asked: u64,
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

/// How long the connection has lived, that is, the peer ran and the server spoke: neither is to be
/// blamed for time in which it was stopped.
#[derive(Debug, Default)]
struct Life {
    lived: Duration,
    silent: Duration,
}

impl Life {
    fn tick(&mut self, passed: Duration, has_heard: bool) {
        let passed = passed.min(LONGEST_TICK);
        self.silent = if has_heard { Duration::ZERO } else { self.silent + passed };
        if self.silent < SILENCE {
            self.lived += passed;
        }
    }
}

/// Requests that have not been answered in full.
#[derive(Debug, Default)]
struct Requests {
    /// Pages without an answer of each, oldest first.
    left: VecDeque<u32>,
    /// Number of the oldest.
    oldest: u64,
}

impl Requests {
    /// The number of a new one.
    fn begin(&mut self, pages: u32) -> u64 {
        self.left.push_back(pages);
        self.oldest + self.left.len() as u64 - 1
    }

    /// A page of this request has its answer; `false` if it was not its turn.
    fn answered(&mut self, request: u64) -> bool {
        let at = request.checked_sub(self.oldest).and_then(|at| usize::try_from(at).ok());
        if let Some(left) = at.and_then(|at| self.left.get_mut(at)) {
            *left = left.saturating_sub(1);
        }
        while self.left.front() == Some(&0) {
            self.left.pop_front();
            self.oldest += 1;
        }
        // It was the oldest with anything left, or was that until just now.
        request <= self.oldest
    }
}

/// The slots and the file that they are in.
pub(super) struct Slots {
    slots: Vec<Slot>,
    region: MmapRegion,
    pub(super) guest: TestGuest,
    requests: Requests,
    /// The first held slot that was found empty: when in the connection's life, and what that is unless
    /// it is the end.
    emptied: Option<(Duration, String)>,
    life: Life,
    pub(super) findings: Findings,
}

impl Slots {
    pub(super) fn new(count: u32, region: MmapRegion) -> Self {
        Self {
            slots: vec![Slot::Free; count as usize],
            region,
            guest: TestGuest::default(),
            requests: Requests::default(),
            emptied: None,
            life: Life::default(),
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

    /// So much time has passed since the last look, and whether the server has said anything.
    pub(super) fn tick(&mut self, passed: Duration, has_heard: bool) {
        self.life.tick(passed, has_heard);
    }

    /// How long the connection has lived.
    pub(super) fn lived(&self) -> Duration {
        self.life.lived
    }

    /// Whether nothing is in a slot, or asked for.
    pub(super) fn is_free(&self, slot: u32) -> bool {
        matches!(self.slots.get(slot as usize), Some(Slot::Free))
    }

    /// The first run of so many free slots, or the longest; `None` if too few are free for more than `most_used`
    /// to stay unused.
    pub(super) fn free_run(&self, most_used: usize, most: u32) -> Option<(u32, u32)> {
        let used = self.slots.iter().filter(|slot| !matches!(slot, Slot::Free)).count();
        let room = u32::try_from(most_used.saturating_sub(used)).unwrap_or(u32::MAX);
        let most = most.min(room) as usize;
        let mut run = 0;
        let mut longest = (0, 0);
        for (at, slot) in self.slots.iter().enumerate() {
            run = if matches!(slot, Slot::Free) { run + 1 } else { 0 };
            if run > longest.1 {
                longest = (at + 1 - run, run);
            }
            if run == most {
                break;
            }
        }
        let (first, count) = longest;
        (count.min(most) > 0)
            .then(|| Some((u32::try_from(first).ok()?, u32::try_from(count.min(most)).ok()?)))
            .flatten()
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

    /// Notes that pages are asked for.
    pub(super) fn asked(&mut self, first_slot: u32, object: u32, first: Gfn, count: u32) {
        let request = self.requests.begin(count);
        for at in 0..count {
            let slot = first_slot + at;
            if !self.is_empty(slot) {
                self.findings.violation(format!("slot {slot} is free, but can be read"));
            }
            let gfn = Gfn::new(first.as_u64() + u64::from(at));
            if let Some(found) = self.get(slot) {
                *found = Slot::Asked { object, gfn, request };
                self.findings.asked += 1;
            }
        }
    }

    /// Number of requests that have not been answered in full.
    pub(super) fn unanswered(&self) -> usize {
        self.requests.left.len()
    }

    /// Notes that the server did not answer all in its time.
    pub(super) fn never_answered(&mut self) {
        let left: u32 = self.requests.left.iter().sum();
        self.findings.violation(format!("{left} pages were asked for and never answered"));
    }

    /// A page of a request has its answer.
    fn answered(&mut self, slot: u32, request: u64) {
        if !self.requests.answered(request) {
            let oldest = self.requests.oldest;
            self.findings.violation(format!(
                "slot {slot}, of request {request}, was answered before all of request {oldest} was"
            ));
        }
    }

    pub(super) fn refused(&mut self, slot: u32, gfn: Gfn, why: Refusal) {
        let request = match self.get(slot) {
            Some(&mut Slot::Asked { gfn: asked, request, .. }) if asked == gfn => request,
            found => {
                let found = format!("{found:?}");
                return self
                    .findings
                    .violation(format!("slot {slot} was refused page {gfn}, but is {found}"));
            }
        };
        self.findings.refused += 1;
        if why == Refusal::Outside {
            self.findings.violation(format!("page {gfn} exists, and was refused since {why}"));
        }
        self.freed_slot(slot);
        self.answered(slot, request);
    }

    pub(super) fn mapped(&mut self, slot: u32, (object, gfn): (u32, Gfn), hold: Duration) {
        let request = match self.get(slot) {
            Some(&mut Slot::Asked { object: asked, gfn: page, request })
                if (asked, page) == (object, gfn) =>
            {
                request
            }
            found => {
                let found = format!("{found:?}");
                return self.findings.violation(format!(
                    "slot {slot} was lent page {gfn} of object {object}, but is {found}"
                ));
            }
        };
        self.answered(slot, request);
        self.findings.mapped += 1;
        let words = self.words(slot);
        let hash = hash(&words);
        let now = Instant::now();
        let mut torn = None;
        match self.guest.look(object, gfn, &words) {
            Ok(Some(Page::Torn)) => {
                self.findings.torn += 1;
                torn = Some(self.life.lived);
            }
            Ok(Some(Page::Zero | Page::Whole) | None) => {}
            Err(wrong) => self.findings.violation(format!("page {gfn} {wrong}")),
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
            self.emptied.get_or_insert((self.life.lived, violation));
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
        let lived = self.life.lived;
        if self.emptied.as_ref().is_some_and(|(since, _)| lived - *since > CLOSED_LIMIT) {
            self.emptied_by_nobody();
        }
        let mut given_up = Vec::new();
        for slot in 0..u32::try_from(self.slots.len()).unwrap_or(u32::MAX) {
            let Some(&mut Slot::Held(held)) = self.get(slot) else { continue };
            let gfn = held.gfn;
            match held.torn {
                // Kept: whoever writes it must ask for it.
                Some(since) if lived - since < TORN_LIMIT => continue,
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
#[path = "slots_tests.rs"]
mod tests;
