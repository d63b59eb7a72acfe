//! Any bytes as what a peer sends to the server, in between what the host does with the pages that
//! the peer has: the [`Book`] of a session, without its socket and its threads.
//!
//! Checked, besides that nothing panics, against a naive list of slots: a slot is lent, dropped and
//! freed only in the order of its states; a flush waits for a batch exactly while a slot that was
//! dropped for its frames is not freed; each message that goes out fits what happened, in order; what
//! is kept is bounded.

use std::time::Instant;

use super::{Bytes, number};
use crate::addr::{Gfn, Pfn};
use crate::export_rmap::Owner;
use crate::peer::book::{Batch, Book, Event, Holding, Job};
use crate::peer::protocol::{Closing, MAX_REQUESTS, MESSAGE_BYTES, Reply, ReplyReader, Request};

const SLOTS: u32 = 12;
const PAGES: u64 = 40;
/// Frames that pages are in.
const FRAMES: u32 = 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Slot {
    Free,
    Wanted(Gfn),
    Held(Pfn),
    Dropped(Pfn),
}

/// The book, and what a naive reader of the protocol takes it for.
struct Case {
    book: Book,
    slots: Vec<Slot>,
    jobs: Vec<Job>,
    /// Batches that were announced and not freed: number and slots.
    batches: Vec<(u64, Vec<u32>)>,
    sequence: u64,
    reader: ReplyReader,
    /// What was sent to the book and not acted on.
    inbox: Vec<u8>,
    now: Instant,
}

pub(super) fn run(data: &[u8]) {
    let mut bytes = Bytes::new(data);
    let mut case = Case {
        book: Book::new(SLOTS, vec![PAGES]),
        slots: vec![Slot::Free; SLOTS as usize],
        jobs: Vec::new(),
        batches: Vec::new(),
        sequence: 0,
        reader: ReplyReader::default(),
        inbox: Vec::new(),
        now: Instant::now(),
    };
    while !bytes.is_empty() {
        let is_alive = match number::<u8>(&mut bytes) % 8 {
            0 => case.hear_any(&mut bytes),
            1 | 2 => case.hear_likely(&mut bytes),
            3 => case.lend(),
            4 => case.invalidate(&mut bytes),
            5 => case.flush(&mut bytes),
            6 => case.hear(&Request::Ack { sequence: case.oldest() }.bytes()),
            _ => case.send(&mut bytes),
        };
        if !is_alive {
            break;
        }
        case.check();
    }
    case.book.close(Closing::EndOfRun);
    assert_eq!(case.book.all_held().count(), 0, "held after the end");
    case.drain(usize::MAX);
}

impl Case {
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

    fn oldest(&self) -> u64 {
        self.batches.first().map_or(self.sequence, |batch| batch.0)
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
                    return false;
                }
                Ok(None) => return true,
                Ok(Some(Event::Left)) => return false,
                Ok(Some(Event::Asked)) => self.asked(),
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

    /// The book has taken a request in, or refused it: which of the two, the replies tell.
    fn asked(&mut self) {
        let mut taken = Vec::new();
        while let Some(job) = self.book.take_job() {
            assert!(job.first.as_u64() + u64::from(job.count) <= PAGES, "{job:?} is outside");
            for (gfn, slot) in job.pages() {
                let found = &mut self.slots[slot as usize];
                assert_eq!(*found, Slot::Free, "slot {slot} was asked for");
                *found = Slot::Wanted(gfn);
            }
            taken.push(job);
        }
        self.jobs.extend(taken);
        assert!(self.jobs.len() <= MAX_REQUESTS, "requests are bounded");
    }

    fn release(&mut self, slots: std::ops::Range<u32>) {
        for slot in slots {
            let held = self.book.held(slot);
            match self.slots[slot as usize] {
                Slot::Held(pfn) => {
                    assert_eq!(held.map(|holding| holding.pfn), Some(pfn));
                    self.book.released(slot);
                    self.slots[slot as usize] = Slot::Free;
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
    }

    // What the host does.

    fn lend(&mut self) -> bool {
        if self.jobs.is_empty() {
            return true;
        }
        let job = self.jobs.remove(0);
        for (gfn, slot) in job.pages() {
            assert_eq!(self.slots[slot as usize], Slot::Wanted(gfn));
            // Some cannot be had.
            if gfn.as_u64() % 5 == 4 {
                self.slots[slot as usize] = Slot::Free;
                continue;
            }
            let pfn = Pfn::new(u32::try_from(gfn.as_u64()).unwrap_or(0) % FRAMES);
            let holding = Holding { owner: Owner { object: 1, gfn }, pfn };
            assert!(self.book.lend(slot, job.object, holding), "slot {slot} is wanted");
            assert!(!self.book.lend(slot, job.object, holding), "slot {slot} is lent");
            self.slots[slot as usize] = Slot::Held(pfn);
        }
        self.book.answer(job);
        true
    }

    fn invalidate(&mut self, bytes: &mut Bytes<'_>) -> bool {
        let frame = Pfn::new(u32::from(number::<u8>(bytes)) % FRAMES);
        let held: Vec<u32> = self.book.all_held().map(|(slot, _)| slot).collect();
        for slot in held {
            if self.slots[slot as usize] == Slot::Held(frame) {
                self.book.drop_held(slot);
                self.slots[slot as usize] = Slot::Dropped(frame);
            }
        }
        true
    }

    fn flush(&mut self, bytes: &mut Bytes<'_>) -> bool {
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
            self.batches.push((sequence, dropped));
        }
        true
    }

    // What goes out.

    fn send(&mut self, bytes: &mut Bytes<'_>) -> bool {
        self.drain(usize::from(number::<u8>(bytes)));
        true
    }

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
        while let Some(reply) = self.reader.take().expect("a message of the server's own") {
            match reply {
                Reply::Hello { .. } | Reply::Info { .. } => panic!("{reply:?} of the book"),
                Reply::Mapped { slot, gfn, .. } => assert!(slot < SLOTS && gfn.as_u64() < PAGES),
                Reply::Invalidate { sequence, slots } => {
                    assert!(sequence <= self.sequence && !slots.is_empty());
                }
                Reply::Freed { sequence } => assert!(sequence <= self.sequence),
                Reply::Refused { .. } | Reply::Unmapped { .. } | Reply::Closed { .. } => {}
            }
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
