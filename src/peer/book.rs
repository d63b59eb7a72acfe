//! What the server knows of one peer, without any I/O: the state of each slot, what the peer has
//! still to acknowledge, and what it is to be told, in order.
//!
//! Guarantee: whatever bytes a peer sends, in whatever order with what the host does,
//!
//! - a slot is free only when its page was taken from the peer;
//! - each page that is asked for is answered exactly once, with that page, as long as the connection
//!   lasts: an answer belongs to a request, not to a slot, which may have been lent, given up and asked
//!   for again since;
//! - everything here is bounded, and each step costs no more than what it names.
//!
//! | slot | how it gets there | page in the file | entry in the reverse map |
//! |---|---|---|---|
//! | free | at first; `FREED`, `UNMAPPED` or `REFUSED` was queued | no | no |
//! | wanted | the peer's `MAP`, whose job alone may answer | no | no |
//! | held | lent; `MAPPED` was queued | yes | yes |
//! | dropped | invalidated; `INVALIDATE` is queued at the next flush | yes, until the `ACK` | no |
//!
//! Order: what is queued is sent in the order in which it was. A page is lent, and its `MAPPED`
//! queued, under its page lock; it is invalidated under the same lock. So a peer learns that it has a
//! slot before it learns that it must give it up, and `FREED` comes before any `MAPPED` for the same
//! slot, since only the peer itself can ask for that.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
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
    /// By the job of this number: no other may lend into it, or refuse it.
    Wanted(u64),
    Held(Holding),
    Dropped(Pfn),
}

/// Pages to be lent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Job {
    /// Number among the peer's.
    pub number: u64,
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

    /// The slot for one of its pages.
    fn slot_of(self, gfn: Gfn) -> Option<u32> {
        let at = u32::try_from(gfn.as_u64().checked_sub(self.first.as_u64())?).ok()?;
        (at < self.count).then(|| self.slot + at)
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
    /// Of each frame that something was dropped of and is not free yet, the last batch with any of
    /// it: after `queued`, if it is yet to be announced.
    pending: HashMap<Pfn, u64>,
    jobs: VecDeque<Job>,
    /// Number of the last job.
    asked: u64,
    /// Pages without an answer of each job that has any, by its number.
    open: HashMap<u64, u32>,
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
            pending: HashMap::new(),
            jobs: VecDeque::new(),
            asked: 0,
            open: HashMap::new(),
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
                self.ask(Job { number: self.asked + 1, object, first, count, slot })?;
                Event::Asked
            }
            Request::Unmap { slot, count } => {
                let range = self.range(slot, count)?;
                for slot in range.clone() {
                    match self.slots[slot as usize] {
                        // Dropped: the request has crossed its invalidation.
                        Slot::Held(_) | Slot::Dropped(_) => {}
                        Slot::Free | Slot::Wanted(_) => return Err(Fault::NotHeld(slot)),
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
        if self.open.len() == MAX_REQUESTS {
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
                self.slots[slot as usize] = Slot::Wanted(job.number);
            } else {
                self.say(&Reply::Refused { slot, gfn, why: Refusal::Outside });
            }
        }
        if is_inside {
            self.jobs.push_back(job);
            self.asked = job.number;
            self.open.insert(job.number, job.count);
        }
        Ok(())
    }

    // What the host does.

    /// The next pages to be lent.
    pub fn take_job(&mut self) -> Option<Job> {
        self.jobs.pop_front()
    }

    /// The slot that waits for this page of the job; `None` if it has its answer, or there is none.
    #[must_use]
    pub fn wanted(&self, job: Job, gfn: Gfn) -> Option<u32> {
        let slot = job.slot_of(gfn)?;
        (self.slots.get(slot as usize) == Some(&Slot::Wanted(job.number))).then_some(slot)
    }

    /// The job is done: what of it has no answer is refused. A slot that was lent to, given up and
    /// asked for again meanwhile is wanted by another job.
    pub fn answer(&mut self, job: Job) {
        self.open.remove(&job.number);
        for (gfn, slot) in job.pages() {
            if self.wanted(job, gfn).is_some() {
                self.slots[slot as usize] = Slot::Free;
                self.say(&Reply::Refused { slot, gfn, why: Refusal::Unavailable });
            }
        }
    }

    /// Notes that the page of a job was copied into the slot that [waits for it](Self::wanted), and
    /// tells the peer; `false` if none does. The page lock is held, and the copy's entry is in the
    /// reverse map.
    pub fn lend(&mut self, job: Job, holding: Holding) -> bool {
        let gfn = holding.owner.gfn;
        let Some(slot) = self.wanted(job, gfn) else { return false };
        self.slots[slot as usize] = Slot::Held(holding);
        // The last page's answer is the request's: the peer may ask for more from here on.
        if let Entry::Occupied(mut open) = self.open.entry(job.number) {
            *open.get_mut() -= 1;
            if *open.get() == 0 {
                open.remove();
            }
        }
        self.say(&Reply::Mapped { slot, object: job.object, gfn });
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
            self.pending.insert(holding.pfn, self.queued + 1);
        }
    }

    /// Queues what was dropped, if any of it came from these frames. Returns the number of the batch
    /// that must be [`done`](Self::done) before the frames may be used for anything else, and
    /// whether it is new.
    pub fn announce(&mut self, frames: &[Pfn], now: Instant) -> Option<(u64, bool)> {
        let last = *frames.iter().filter_map(|pfn| self.pending.get(pfn)).max()?;
        if last <= self.queued {
            return Some((last, false));
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

    /// The slots of an acknowledged batch were taken from the peer.
    pub fn freed(&mut self, batch: &Batch) {
        for &slot in &batch.slots {
            if let Some(found) = self.slots.get_mut(slot as usize)
                && let Slot::Dropped(pfn) = *found
            {
                *found = Slot::Free;
                if self.pending.get(&pfn) == Some(&batch.sequence) {
                    self.pending.remove(&pfn);
                }
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

    /// Everything was taken from the peer. Only the reason why is left to be told: that is the answer
    /// to all that has none.
    pub fn close(&mut self, why: Closing) {
        self.slots.fill(Slot::Free);
        self.dropped.clear();
        self.in_flight.clear();
        self.pending.clear();
        self.jobs.clear();
        self.open.clear();
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
