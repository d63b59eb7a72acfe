//! Pages that leave the guest.
//!
//! A stretch of pages at a time is given up under the lock of the rings, so that a reset, after which
//! the guest may use the pages again, comes before it or after it.

use super::{Balloon, Request, Trouble};
use crate::addr::{Gfn, PAGE_SIZE_U64};

/// Bytes of a page number in the queues, 5.5.6.
const NUMBER_BYTES: usize = 4;
/// Page numbers that are read at a time.
const NUMBERS: usize = 1024;
/// Most pages that are given up at a time: a reset waits for them.
const STRETCH: u64 = 512;

impl Balloon {
    /// The buffer has the numbers of pages that the guest puts into the balloon.
    pub(super) fn inflate(&self, request: &Request<'_>) -> Result<(), Trouble> {
        let mut bytes = [0; NUMBERS * NUMBER_BYTES];
        let mut offset = 0;
        loop {
            let read = match request.read(offset, &mut bytes) {
                Ok(read) => read,
                // No guest memory: there are no numbers in it.
                Err(Trouble::Memory(_)) => return Ok(()),
                Err(other) => return Err(other),
            };
            let mut numbers: Vec<u32> = bytes[..read]
                .chunks_exact(NUMBER_BYTES)
                .map(|number| u32::from_le_bytes([number[0], number[1], number[2], number[3]]))
                .collect();
            if numbers.is_empty() {
                return Ok(());
            }
            self.counters.inflated.add(numbers.len() as u64);
            numbers.sort_unstable();
            numbers.dedup();
            for run in numbers.chunk_by(|one, next| one.checked_add(1) == Some(*next)) {
                self.give_up(request, run[0].into(), run.len() as u64)?;
            }
            offset += read as u64;
        }
    }

    /// The buffer has the numbers of pages that the guest takes out. They are there, as zeros.
    pub(super) fn deflate(&self, request: &Request<'_>) {
        self.counters.deflated.add(request.readable().bytes() / NUMBER_BYTES as u64);
    }

    /// The buffer is what the guest has no use for.
    pub(super) fn report(&self, request: &Request<'_>) -> Result<(), Trouble> {
        if !self.heeds_reports() || request.fault().is_some() {
            return Ok(());
        }
        for &(start, bytes) in request.writable().parts() {
            // Whole pages: what is beside them may be in use.
            let Some(end) = start.checked_add(bytes.into()) else { continue };
            let first = start.as_u64().div_ceil(PAGE_SIZE_U64);
            let pages = (end.as_u64() / PAGE_SIZE_U64).saturating_sub(first);
            self.counters.reported.add(pages);
            self.give_up(request, first, pages)?;
        }
        Ok(())
    }

    /// Those of the pages that are the guest's memory become zeros.
    fn give_up(&self, request: &Request<'_>, first: u64, pages: u64) -> Result<(), Trouble> {
        let end = first.saturating_add(pages).min(self.memory.bytes() / PAGE_SIZE_U64);
        let mut next = first;
        while next < end {
            let stretch = (end - next).min(STRETCH);
            match request.alone(|| self.memory.free_pages(Gfn::new(next), stretch)) {
                Ok(given_up) => self.counters.given_up.add(given_up),
                // Of some it may be said wrongly that they were kept.
                Err(Trouble::Memory(_)) => self.counters.kept.add(stretch),
                Err(other) => return Err(other),
            }
            next += stretch;
        }
        Ok(())
    }
}
