//! Any bytes as what a peer sends to the server, in between what the host does with the pages that
//! the peer has: the [`Book`] of a session, without its socket and its threads.
//!
//! Checked, besides that nothing panics, against a naive list of slots: a slot is lent, dropped and
//! freed only in the order of its states; a flush waits for a batch exactly while a slot that was
//! dropped for its frames is not freed; what goes out is, message for message, what happened; each page
//! that was asked for is answered exactly once, with its own page, however often its slot is lent, given
//! up and asked for again while jobs are under way; what is kept is bounded.

use std::collections::VecDeque;
use std::time::Instant;

use super::{Bytes, number};
use crate::addr::{Gfn, Pfn};
use crate::export_rmap::Owner;
use crate::peer::book::{Batch, Book, Event, Fault, Holding, Job};
use crate::peer::protocol::{
    Closing, MAX_REQUESTS, MESSAGE_BYTES, Refusal, Reply, ReplyReader, Request,
};

const SLOTS: u32 = 12;
const PAGES: u64 = 40;
/// Frames that pages are in.
const FRAMES: u32 = 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Slot {
    Free,
    /// The page that was asked for last.
    Wanted(Gfn),
    Held(Pfn),
    Dropped(Pfn),
}

/// A job that the lender has taken, and what of it has no answer.
struct UnderWay {
    job: Job,
    left: Vec<(Gfn, u32)>,
}

/// The book, and what a naive reader of the protocol takes it for.
struct Case {
    book: Book,
    slots: Vec<Slot>,
    /// Jobs that were asked for and that the lender has not taken: first page, how many, first slot.
    jobs: VecDeque<(Gfn, u32, u32)>,
    under_way: Option<UnderWay>,
    /// Batches that were announced and not freed: number and slots.
    batches: Vec<(u64, Vec<u32>)>,
    sequence: u64,
    /// What the peer is yet to be told, by what happened.
    expected: VecDeque<Reply>,
    /// Of each slot, the pages that were asked for and of which no answer was read: one that was refused
    /// may be asked for again before that.
    open: Vec<VecDeque<Gfn>>,
    reader: ReplyReader,
    /// What was sent to the book and not acted on.
    inbox: Vec<u8>,
    now: Instant,
}

pub(super) fn run(data: &[u8]) {
    let mut bytes = Bytes::new(data);
    let mut case = Case::new();
    let mut is_alive = true;
    while is_alive && !bytes.is_empty() {
        is_alive = case.step(&mut bytes);
        if is_alive {
            case.check();
        }
    }
    if is_alive {
        case.settle();
    }
    case.book.close(Closing::EndOfRun);
    assert_eq!(case.book.all_held().count(), 0, "held after the end");
    case.expected.push_back(Reply::Closed { why: Closing::EndOfRun });
    case.drain(usize::MAX);
    assert!(case.expected.is_empty(), "never told: {:?}", case.expected);
}

impl Case {
    fn new() -> Self {
        Self {
            book: Book::new(SLOTS, vec![PAGES]),
            slots: vec![Slot::Free; SLOTS as usize],
            jobs: VecDeque::new(),
            under_way: None,
            batches: Vec::new(),
            sequence: 0,
            expected: VecDeque::new(),
            open: vec![VecDeque::new(); SLOTS as usize],
            reader: ReplyReader::default(),
            inbox: Vec::new(),
            now: Instant::now(),
        }
    }

    /// `false` once the peer is cut off, or has left.
    fn step(&mut self, bytes: &mut Bytes<'_>) -> bool {
        match number::<u8>(bytes) % 12 {
            0 => return self.hear_any(bytes),
            1 | 2 => return self.hear_likely(bytes),
            3 | 8 => self.lend(bytes),
            4 => self.invalidate(bytes),
            5 => self.flush(bytes),
            6 => return self.hear(&Request::Ack { sequence: self.oldest() }.bytes()),
            7 => self.drain(usize::from(number::<u8>(bytes))),
            9 => return self.hear_again(bytes),
            10 => self.take_job(),
            _ => self.answer(),
        }
        true
    }

    // What the peer sends.

    fn hear_any(&mut self, bytes: &mut Bytes<'_>) -> bool {
        let count = usize::from(number::<u8>(bytes) % 40).min(bytes.len());
        let said = bytes.bytes(count).unwrap_or_default().to_vec();
        self.hear(&said)
    }

    /// A message that is one, with small numbers.
    fn hear_likely(&mut self, bytes: &mut Bytes<'_>) -> bool {
        let [kind, first, count, slot] = [(); 4].map(|()| number::<u8>(bytes));
        let (slot, count) = (u32::from(slot % 16), u32::from(count % 5));
        let request = match kind % 4 {
            0 | 1 => Request::Map { object: 0, first: Gfn::new((first % 48).into()), count, slot },
            2 => Request::Unmap { slot, count },
            _ => Request::Ack { sequence: u64::from(count) },
        };
        self.hear(&request.bytes())
    }

    /// Gives a slot up if it is held, and asks for another page in it if it can be.
    fn hear_again(&mut self, bytes: &mut Bytes<'_>) -> bool {
        let [slot, page] = [(); 2].map(|()| number::<u8>(bytes));
        let slot = u32::from(slot) % SLOTS;
        if matches!(self.slots[slot as usize], Slot::Held(_))
            && !self.hear(&Request::Unmap { slot, count: 1 }.bytes())
        {
            return false;
        }
        let is_free = self.slots[slot as usize] == Slot::Free;
        if !is_free || self.unanswered() == MAX_REQUESTS {
            return true;
        }
        let first = Gfn::new(u64::from(page) % PAGES);
        self.hear(&Request::Map { object: 0, first, count: 1, slot }.bytes())
    }

    fn oldest(&self) -> u64 {
        self.batches.first().map_or(self.sequence, |batch| batch.0)
    }

    fn unanswered(&self) -> usize {
        let is_open = |under_way: &UnderWay| !under_way.left.is_empty();
        self.jobs.len() + usize::from(self.under_way.as_ref().is_some_and(is_open))
    }

    /// `false` once the peer is cut off, or has left.
    fn hear(&mut self, said: &[u8]) -> bool {
        self.book.receive(said);
        self.inbox.extend_from_slice(said);
        loop {
            let event = self.book.hear();
            let request = match event {
                Ok(Some(_)) => self.request(),
                _ => None,
            };
            match event {
                Err(fault) => {
                    assert!(!fault.to_string().is_empty());
                    let is_full = self.unanswered() == MAX_REQUESTS;
                    assert!(fault != Fault::TooManyRequests || is_full, "{fault}");
                    return false;
                }
                Ok(None) => return true,
                Ok(Some(Event::Left)) => return false,
                Ok(Some(Event::Asked)) => self.asked(request),
                Ok(Some(Event::Released(slots))) => self.release(slots),
                Ok(Some(Event::Acked(batch))) => {
                    assert_eq!(request, Some(Request::Ack { sequence: batch.sequence }));
                    self.acknowledge(&batch);
                }
            }
        }
    }

    /// The message that the book has just acted on.
    fn request(&mut self) -> Option<Request> {
        let head = *self.inbox.first_chunk::<MESSAGE_BYTES>()?;
        self.inbox.drain(..MESSAGE_BYTES);
        Request::parse(&head).ok()
    }

    /// The book has taken a request in: pages that do not exist are refused at once.
    fn asked(&mut self, request: Option<Request>) {
        let Some(Request::Map { object, first, count, slot }) = request else {
            panic!("{request:?} asks for nothing")
        };
        let is_outside = object != 0 || first.as_u64() + u64::from(count) > PAGES;
        for at in 0..count {
            let (gfn, slot) = (Gfn::new(first.as_u64() + u64::from(at)), slot + at);
            let found = &mut self.slots[slot as usize];
            assert_eq!(*found, Slot::Free, "slot {slot} was asked for");
            self.open[slot as usize].push_back(gfn);
            if is_outside {
                self.expected.push_back(Reply::Refused { slot, gfn, why: Refusal::Outside });
            } else {
                *found = Slot::Wanted(gfn);
            }
        }
        if !is_outside {
            self.jobs.push_back((first, count, slot));
        }
        assert!(self.unanswered() <= MAX_REQUESTS, "requests are bounded");
    }

    fn release(&mut self, slots: std::ops::Range<u32>) {
        for slot in slots {
            let held = self.book.held(slot);
            match self.slots[slot as usize] {
                Slot::Held(pfn) => {
                    assert_eq!(held.map(|holding| holding.pfn), Some(pfn));
                    self.book.released(slot);
                    self.slots[slot as usize] = Slot::Free;
                    self.expected.push_back(Reply::Unmapped { slot });
                }
                Slot::Dropped(_) => assert_eq!(held, None),
                other => panic!("slot {slot} is {other:?} and was given up"),
            }
        }
    }

    fn acknowledge(&mut self, batch: &Batch) {
        let (sequence, slots) = self.batches.remove(0);
        let mut named = batch.slots.clone();
        named.sort_unstable();
        assert_eq!((batch.sequence, &named), (sequence, &slots), "acknowledged out of turn");
        self.book.freed(batch);
        for slot in slots {
            let found = std::mem::replace(&mut self.slots[slot as usize], Slot::Free);
            assert!(matches!(found, Slot::Dropped(_)), "slot {slot} was {found:?} and is freed");
        }
        self.expected.push_back(Reply::Freed { sequence });
    }

    // What the host does.

    fn take_job(&mut self) {
        if self.under_way.is_some() {
            return;
        }
        let job = self.book.take_job();
        let taken = job.map(|job| (job.first, job.count, job.slot));
        assert_eq!(taken, self.jobs.pop_front(), "jobs are taken in the order of the requests");
        self.under_way = job.map(|job| UnderWay { job, left: job.pages().collect() });
    }

    /// Lends one page of the job that is under way, in any order.
    fn lend(&mut self, bytes: &mut Bytes<'_>) {
        self.take_job();
        let Some(UnderWay { job, left }) = &mut self.under_way else { return };
        if left.is_empty() {
            return;
        }
        let (gfn, slot) = left.swap_remove(usize::from(number::<u8>(bytes)) % left.len());
        assert_eq!(self.slots[slot as usize], Slot::Wanted(gfn));
        assert_eq!(self.book.wanted(*job, gfn), Some(slot));
        let pfn = Pfn::new(u32::try_from(gfn.as_u64()).unwrap_or(0) % FRAMES);
        let holding = Holding { owner: Owner { object: 1, gfn }, pfn };
        assert!(self.book.lend(*job, holding), "slot {slot} is wanted");
        self.slots[slot as usize] = Slot::Held(pfn);
        self.expected.push_back(Reply::Mapped { slot, object: 0, gfn });
    }

    /// The job that is under way is done; what of it was not lent cannot be had.
    fn answer(&mut self) {
        self.take_job();
        let Some(UnderWay { job, mut left }) = self.under_way.take() else { return };
        // Whatever became of their slots since: the pages that have their answer are not wanted.
        for (gfn, slot) in job.pages().filter(|page| !left.contains(page)) {
            let owner = Owner { object: 1, gfn };
            assert_eq!(self.book.wanted(job, gfn), None, "slot {slot} has its answer");
            assert!(!self.book.lend(job, Holding { owner, pfn: Pfn::new(0) }));
        }
        self.book.answer(job);
        left.sort_unstable_by_key(|&(_, slot)| slot);
        for (gfn, slot) in left {
            assert_eq!(self.slots[slot as usize], Slot::Wanted(gfn));
            self.slots[slot as usize] = Slot::Free;
            self.expected.push_back(Reply::Refused { slot, gfn, why: Refusal::Unavailable });
        }
    }

    fn invalidate(&mut self, bytes: &mut Bytes<'_>) {
        let frame = Pfn::new(u32::from(number::<u8>(bytes)) % FRAMES);
        let held: Vec<u32> = self.book.all_held().map(|(slot, _)| slot).collect();
        for slot in held {
            if self.slots[slot as usize] == Slot::Held(frame) {
                self.book.drop_held(slot);
                self.slots[slot as usize] = Slot::Dropped(frame);
            }
        }
    }

    fn flush(&mut self, bytes: &mut Bytes<'_>) {
        let frame = Pfn::new(u32::from(number::<u8>(bytes)) % FRAMES);
        let of_frame = |slot: &u32| self.slots[*slot as usize] == Slot::Dropped(frame);
        let is_announced = |slot: &u32| self.batches.iter().any(|(_, slots)| slots.contains(slot));
        let dropped: Vec<u32> = (0..SLOTS)
            .filter(|&slot| matches!(self.slots[slot as usize], Slot::Dropped(_)))
            .filter(|slot| !is_announced(slot))
            .collect();
        let announced = self.batches.iter().rev().find(|(_, slots)| slots.iter().any(of_frame));
        let expected = if dropped.iter().any(of_frame) {
            Some((self.sequence + 1, true))
        } else {
            announced.map(|&(sequence, _)| (sequence, false))
        };
        assert_eq!(self.book.announce(&[frame], self.now), expected);
        if let Some((sequence, true)) = expected {
            self.sequence = sequence;
            self.expected.push_back(Reply::Invalidate { sequence, slots: dropped.clone() });
            self.batches.push((sequence, dropped));
        }
    }

    /// The lender does all that it was asked for; then everything has its answer.
    fn settle(&mut self) {
        while self.under_way.is_some() || !self.jobs.is_empty() {
            self.answer();
        }
        self.drain(usize::MAX);
        self.check();
        let open: Vec<_> =
            (0..SLOTS).zip(&self.open).filter(|(_, pages)| !pages.is_empty()).collect();
        assert!(open.is_empty(), "never answered: {open:?}");
    }

    // What goes out.

    /// Sends so many bytes; what goes out are whole messages, one after the other.
    fn drain(&mut self, most: usize) {
        let mut left = most;
        while left > 0 && !self.book.to_send().is_empty() {
            let sent = self.book.to_send().len().min(left);
            let part = self.book.to_send()[..sent].to_vec();
            self.reader.push(&part);
            self.book.sent_bytes(sent);
            left -= sent;
        }
        while let Some(mut reply) = self.reader.take().expect("a message of the server's own") {
            // They are named in the order in which they were dropped, whatever that was.
            if let Reply::Invalidate { slots, .. } = &mut reply {
                slots.sort_unstable();
            }
            if let Reply::Mapped { slot, gfn, .. } | Reply::Refused { slot, gfn, .. } = reply {
                let open = self.open[slot as usize].pop_front();
                assert_eq!(open, Some(gfn), "{reply:?} answers what was not asked for");
            }
            assert_eq!(Some(reply), self.expected.pop_front(), "told, and what happened");
        }
    }

    fn check(&self) {
        for (slot, found) in (0..).zip(&self.slots) {
            let held = self.book.held(slot).map(|holding| holding.pfn);
            let expected = if let Slot::Held(pfn) = found { Some(*pfn) } else { None };
            assert_eq!(held, expected, "slot {slot} is {found:?}");
        }
        let done = self.batches.first().map_or(self.sequence, |batch| batch.0 - 1);
        assert_eq!(self.book.done(), done, "a flush waits for too little or too much");
        // What a peer that reads nothing can cause, one message of it at a time.
        let bound = 4 * MESSAGE_BYTES * (SLOTS as usize + MAX_REQUESTS * 64 + 64);
        assert!(self.book.is_unread() || self.book.to_send().len() <= bound);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// Requests, answers, releases and invalidations in any order: each request has one answer,
        /// with its own page.
        #[test]
        fn each_request_has_exactly_one_answer(data in prop::collection::vec(any::<u8>(), 0..300)) {
            super::run(&data);
        }
    }
}
