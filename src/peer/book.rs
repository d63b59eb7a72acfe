//! What the server knows of one peer, without any I/O: the state of each slot, what the peer has
//! still to acknowledge, and what it is to be told, in order.
//!
//! Guarantee: whatever bytes a peer sends, in whatever order with what the host does, a slot is
//! free only when its page was taken from the peer, and everything here is bounded.
//!
//! | slot | how it gets there | page in the file | entry in the reverse map |
//! |---|---|---|---|
//! | free | at first; `FREED`, `UNMAPPED` or `REFUSED` was queued | no | no |
//! | wanted | the peer's `MAP` | no | no |
//! | held | lent; `MAPPED` was queued | yes | yes |
//! | dropped | invalidated; `INVALIDATE` is queued at the next flush | yes, until the `ACK` | no |
//!
//! Order: what is queued is sent in the order in which it was. A page is lent, and its `MAPPED`
//! queued, under its page lock; it is invalidated under the same lock. So a peer learns that it has a
//! slot before it learns that it must give it up, and `FREED` comes before any `MAPPED` for the same
//! slot, since only the peer itself can ask for that.

use std::collections::VecDeque;
use std::time::Instant;

use crate::addr::{Gfn, Pfn};
use crate::export_rmap::Owner;
use crate::peer::protocol::{
    Closing, MAX_REQUESTS, MESSAGE_BYTES, NotAMessage, Refusal, Reply, Request,
};

/// What the peer did that it must not do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// Not a message.
    #[error(transparent)]
    NotAMessage(#[from] NotAMessage),
    /// Beyond the last slot.
    #[error("slot {0} does not exist")]
    NoSuchSlot(u64),
    /// A slot that is not free is asked for again.
    #[error("slot {0} is in use")]
    InUse(u32),
    /// A slot that holds nothing is given up.
    #[error("slot {0} holds nothing")]
    NotHeld(u32),
    /// More requests than may be unanswered.
    #[error("more than {MAX_REQUESTS} requests are unanswered")]
    TooManyRequests,
    /// Not the invalidation whose turn it is.
    #[error("acknowledgement {0} is out of turn")]
    OutOfTurn(u64),
    /// Something after a good-bye.
    #[error("something follows a good-bye")]
    AfterBye,
}

/// A page that a peer holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holding {
    /// Memory object and page.
    pub owner: Owner,
    /// The frame that it was copied from, in which the page is as long as it is held.
    pub pfn: Pfn,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Slot {
    Free,
    Wanted,
    Held(Holding),
    Dropped(Pfn),
}

/// Pages to be lent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Job {
    /// Number of the memory object.
    pub object: u32,
    /// First page.
    pub first: Gfn,
    /// Number of pages.
    pub count: u32,
    /// Slot of the first.
    pub slot: u32,
}

impl Job {
    /// Its pages and the slots for them.
    pub fn pages(self) -> impl Iterator<Item = (Gfn, u32)> {
        let first = self.first.as_u64();
        (0..self.count).map(move |at| (Gfn::new(first + u64::from(at)), self.slot + at))
    }
}

/// What is to be done about something that the peer said.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// A job was queued.
    Asked,
    /// The peer has given up these slots: take those that it holds from it, then
    /// [`released`](Book::released).
    Released(std::ops::Range<u32>),
    /// The batch was acknowledged: take its slots from the peer, then [`freed`](Book::freed).
    Acked(Batch),
    /// The peer leaves.
    Left,
}

/// Slots that one `INVALIDATE` named.
#[derive(Debug, PartialEq, Eq)]
pub struct Batch {
    /// Its number.
    pub sequence: u64,
    /// The slots.
    pub slots: Vec<u32>,
    /// When it was queued.
    pub sent: Instant,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Book {
    slots: Vec<Slot>,
    /// Sizes of the memory objects in pages.
    objects: Vec<u64>,
    /// Dropped since the last flush.
    dropped: Vec<u32>,
    in_flight: VecDeque<Batch>,
    /// Number of the last batch that was queued.
    queued: u64,
    /// Number of the last batch whose slots are free again.
    done: u64,
    jobs: VecDeque<Job>,
    /// Jobs that are queued or under way.
    unanswered: usize,
    inbox: Vec<u8>,
    outbox: VecDeque<u8>,
    has_left: bool,
}

impl Book {
    /// Of a peer with so many slots, for memory objects of these sizes in pages.
    #[must_use]
    pub fn new(slots: u32, objects: Vec<u64>) -> Self {
        Self {
            slots: vec![Slot::Free; slots as usize],
            objects,
            dropped: Vec::new(),
            in_flight: VecDeque::new(),
            queued: 0,
            done: 0,
            jobs: VecDeque::new(),
            unanswered: 0,
            inbox: Vec::new(),
            outbox: VecDeque::new(),
            has_left: false,
        }
    }

    fn slot(&mut self, slot: u32) -> Option<&mut Slot> {
        self.slots.get_mut(slot as usize)
    }

    /// The slots as a range, if they exist.
    fn range(&self, slot: u32, count: u32) -> Result<std::ops::Range<u32>, Fault> {
        let end = u64::from(slot) + u64::from(count);
        if end > self.slots.len() as u64 {
            return Err(Fault::NoSuchSlot(end - 1));
        }
        Ok(slot..slot + count)
    }

    // What the peer says.

    /// Adds what was received.
    pub fn receive(&mut self, bytes: &[u8]) {
        self.inbox.extend_from_slice(bytes);
    }

    /// What the next message asks for; `None` if none is complete.
    ///
    /// # Errors
    /// [`Fault`]: the peer is to be cut off.
    pub fn hear(&mut self) -> Result<Option<Event>, Fault> {
        let Some(head) = self.inbox.first_chunk::<MESSAGE_BYTES>() else {
            return Ok(None);
        };
        if self.has_left {
            return Err(Fault::AfterBye);
        }
        let request = Request::parse(head)?;
        self.inbox.drain(..MESSAGE_BYTES);
        let event = match request {
            Request::Map { object, first, count, slot } => {
                self.ask(Job { object, first, count, slot })?;
                Event::Asked
            }
            Request::Unmap { slot, count } => {
                let range = self.range(slot, count)?;
                for slot in range.clone() {
                    match self.slots[slot as usize] {
                        // Dropped: the request has crossed its invalidation.
                        Slot::Held(_) | Slot::Dropped(_) => {}
                        Slot::Free | Slot::Wanted => return Err(Fault::NotHeld(slot)),
                    }
                }
                Event::Released(range)
            }
            Request::Ack { sequence } => {
                let oldest = self.in_flight.front();
                let is_its_turn = oldest.is_some_and(|batch| batch.sequence == sequence);
                let batch = if is_its_turn { self.in_flight.pop_front() } else { None };
                Event::Acked(batch.ok_or(Fault::OutOfTurn(sequence))?)
            }
            Request::Bye => {
                self.has_left = true;
                Event::Left
            }
        };
        Ok(Some(event))
    }

    fn ask(&mut self, job: Job) -> Result<(), Fault> {
        if self.unanswered == MAX_REQUESTS {
            return Err(Fault::TooManyRequests);
        }
        for slot in self.range(job.slot, job.count)? {
            if self.slots[slot as usize] != Slot::Free {
                return Err(Fault::InUse(slot));
            }
        }
        let pages = self.objects.get(job.object as usize).copied().unwrap_or(0);
        let is_inside = job.first.as_u64() + u64::from(job.count) <= pages;
        for (gfn, slot) in job.pages() {
            if is_inside {
                self.slots[slot as usize] = Slot::Wanted;
            } else {
                self.say(&Reply::Refused { slot, gfn, why: Refusal::Outside });
            }
        }
        if is_inside {
            self.jobs.push_back(job);
            self.unanswered += 1;
        }
        Ok(())
    }

    // What the host does.

    /// The next pages to be lent.
    pub fn take_job(&mut self) -> Option<Job> {
        self.jobs.pop_front()
    }

    /// The job is done: slots that nothing was lent into are refused.
    pub fn answer(&mut self, job: Job) {
        self.unanswered = self.unanswered.saturating_sub(1);
        for (gfn, slot) in job.pages() {
            if let Some(found @ Slot::Wanted) = self.slot(slot) {
                *found = Slot::Free;
                self.say(&Reply::Refused { slot, gfn, why: Refusal::Unavailable });
            }
        }
    }

    /// Notes that the page was copied into the slot, and tells the peer; `false` if the slot does not
    /// wait for one. The page lock is held, and the copy's entry is in the reverse map.
    pub fn lend(&mut self, slot: u32, object: u32, holding: Holding) -> bool {
        match self.slot(slot) {
            Some(found @ Slot::Wanted) => *found = Slot::Held(holding),
            _ => return false,
        }
        self.say(&Reply::Mapped { slot, object, gfn: holding.owner.gfn });
        true
    }

    /// The page in a slot.
    #[must_use]
    pub fn held(&self, slot: u32) -> Option<Holding> {
        match self.slots.get(slot as usize) {
            Some(Slot::Held(holding)) => Some(*holding),
            _ => None,
        }
    }

    /// All slots that hold a page.
    pub fn all_held(&self) -> impl Iterator<Item = (u32, Holding)> + '_ {
        (0..).zip(&self.slots).filter_map(|(slot, found)| match found {
            Slot::Held(holding) => Some((slot, *holding)),
            _ => None,
        })
    }

    /// The page in the slot is invalidated. Its page lock is held, and its entry leaves the reverse
    /// map; the next flush tells the peer.
    pub fn drop_held(&mut self, slot: u32) {
        if let Some(found) = self.slots.get_mut(slot as usize)
            && let Slot::Held(holding) = *found
        {
            *found = Slot::Dropped(holding.pfn);
            self.dropped.push(slot);
        }
    }

    /// Queues what was dropped, if any of it came from these frames. Returns the number of the batch
    /// that must be [`done`](Self::done) before the frames may be used for anything else, and
    /// whether it is new.
    pub fn announce(&mut self, frames: &[Pfn], now: Instant) -> Option<(u64, bool)> {
        let concerns = |slots: &[u32]| {
            let of_frame = |slot: &u32| {
                let slot = self.slots.get(*slot as usize);
                matches!(slot, Some(Slot::Dropped(pfn)) if frames.contains(pfn))
            };
            slots.iter().any(of_frame)
        };
        if !concerns(&self.dropped) {
            let last = self.in_flight.iter().rev().find(|batch| concerns(&batch.slots));
            return last.map(|batch| (batch.sequence, false));
        }
        self.queued += 1;
        let slots = std::mem::take(&mut self.dropped);
        self.say(&Reply::Invalidate { sequence: self.queued, slots: slots.clone() });
        self.in_flight.push_back(Batch { sequence: self.queued, slots, sent: now });
        Some((self.queued, true))
    }

    /// Number of the last batch whose slots were taken from the peer.
    #[must_use]
    pub fn done(&self) -> u64 {
        self.done
    }

    /// When a batch that is not acknowledged yet was queued.
    #[must_use]
    pub fn sent(&self, sequence: u64) -> Option<Instant> {
        let batch = self.in_flight.iter().find(|batch| batch.sequence == sequence);
        batch.map(|batch| batch.sent)
    }

    /// The slots of an acknowledged batch were taken from the peer.
    pub fn freed(&mut self, batch: &Batch) {
        for &slot in &batch.slots {
            if let Some(found) = self.slot(slot) {
                *found = Slot::Free;
            }
        }
        self.done = batch.sequence;
        self.say(&Reply::Freed { sequence: batch.sequence });
    }

    /// A held slot, which the peer gave up, was taken from it.
    pub fn released(&mut self, slot: u32) {
        if let Some(found @ Slot::Held(_)) = self.slot(slot) {
            *found = Slot::Free;
            self.say(&Reply::Unmapped { slot });
        }
    }

    /// Queues something to be told.
    pub fn say(&mut self, reply: &Reply) {
        reply.write(&mut self.outbox);
    }

    /// Everything was taken from the peer. Only the reason why is left to be told.
    pub fn close(&mut self, why: Closing) {
        self.slots.fill(Slot::Free);
        self.dropped.clear();
        self.in_flight.clear();
        self.jobs.clear();
        self.done = self.queued;
        self.say(&Reply::Closed { why });
    }

    // What goes out.

    /// Bytes to be sent next; empty if there are none.
    #[must_use]
    pub fn to_send(&self) -> &[u8] {
        self.outbox.as_slices().0
    }

    /// So many of them were sent.
    pub fn sent_bytes(&mut self, count: usize) {
        self.outbox.drain(..count.min(self.outbox.len()));
    }

    /// Whether the peer has left more unread than one that reads could have caused.
    #[must_use]
    pub fn is_unread(&self) -> bool {
        // Each slot can be lent, invalidated and freed once before the peer must say something;
        // refusals need requests, of which a few may be unanswered.
        let bound = 4 * MESSAGE_BYTES * (self.slots.len() + MAX_REQUESTS * 64 + 64);
        self.outbox.len() > bound
    }
}

#[cfg(test)]
#[path = "book_tests.rs"]
mod tests;
