//! Work pages by DMA: the device reads and writes them while the vCPU goes on with others.
//!
//! | kind | the device | what is checked |
//! |---|---|---|
//! | copy out | copies the page to the buffer | the copy, word by word, against the ledger |
//! | sum | sums the page up | the sum against that of what the ledger says |
//! | write | copies the page's next version from the buffer | the page, at its next access |
//! | clear | fills the page with zeros | the page, at its next access |

use core::sync::atomic::Ordering;

use crate::dma::{self, Command, DmaUnit};
use crate::memory::PAGE_BYTES;
use crate::oracle::{PageId, WORDS};
use crate::pages::{self, WorkSet, count};
use crate::rng::Rng;
use crate::worker::Worker;
use gnomon_abi::{self as abi, Violation};

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    CopyOut,
    Sum,
    Write,
    Clear,
}

/// What the device is at.
#[derive(Clone, Copy)]
struct Pending {
    kind: Kind,
    page: u64,
    id: PageId,
    /// Where in memory the buffer's page begins.
    buffer: u64,
}

/// A vCPU's use of the device: one command at a time.
pub(super) struct DmaChannel {
    pending: Option<Pending>,
}

impl DmaChannel {
    pub(super) fn new() -> DmaChannel {
        DmaChannel { pending: None }
    }

    /// Looks after the device before the vCPU accesses `page`, which must not be in its hands.
    pub(super) fn before(&mut self, worker: &Worker, page: u64) {
        if let Some(pending) = self.pending
            && (pending.page == page || unit(worker).poll().is_some())
        {
            self.finish(worker);
        }
    }

    /// Hands a page to the device.
    pub(super) fn begin(&mut self, worker: &Worker, rng: &mut Rng, page: u64) {
        self.finish(worker);
        let id = worker.id(page);
        let entry = pages::version(id.gfn).load(Ordering::Relaxed);
        let kind = match rng.below(4) {
            0 => Kind::Sum,
            // The device leaves the page table alone: what was never written must not look so.
            1 if entry != 0 => Kind::Write,
            2 if entry != 0 => Kind::Clear,
            _ => Kind::CopyOut,
        };
        // Any aligned place, so that most copies cross a page boundary on one side.
        let buffer = unit(worker).buffer() + 8 * rng.below(WORDS as u64);
        if kind == Kind::Write {
            let (_, last) = pages::content_of(entry);
            // SAFETY: the buffer is this vCPU's, and the device is idle.
            unsafe {
                worker.machine.oracle.write(buffer as *mut u64, id, pages::next_version(last));
            }
        }
        let memory = id.gfn * PAGE_BYTES;
        let (command, source, destination) = match kind {
            Kind::CopyOut => (abi::DMA_COPY, memory, buffer),
            Kind::Sum => (abi::DMA_CHECKSUM, memory, 0),
            Kind::Write => (abi::DMA_COPY, buffer, memory),
            Kind::Clear => (abi::DMA_FILL, 0, memory),
        };
        unit(worker).start(&Command {
            command,
            source,
            destination,
            bytes: PAGE_BYTES,
            pattern: 0,
        });
        self.pending = Some(Pending { kind, page, id, buffer });
    }

    /// Waits for the device and checks what it did.
    pub(super) fn finish(&mut self, worker: &Worker) {
        let Some(Pending { kind, page, id, buffer }) = self.pending.take() else {
            return;
        };
        let unit = unit(worker);
        let answer = unit.wait();
        if answer.status != abi::DMA_DONE {
            let (expected, found) = (abi::DMA_DONE.into(), answer.status.into());
            worker.report(Violation::Device, unit.descriptor(), expected, found, id.gfn);
            return;
        }
        count(&worker.counters.dma_ops, 1);
        count(&worker.counters.dma_bytes, PAGE_BYTES);
        let ledger = pages::version(id.gfn);
        let entry = ledger.load(Ordering::Relaxed);
        let (version, last) = pages::content_of(entry);
        match kind {
            Kind::CopyOut => {
                count(&worker.counters.verified, 1);
                let copy = buffer as *const u64;
                // SAFETY: the buffer is this vCPU's, and the device is idle.
                if let Err(mismatch) = unsafe { worker.machine.oracle.verify(copy, id, version) } {
                    let at = buffer + 8 * mismatch.word as u64;
                    worker.report(mismatch.kind, at, mismatch.expected, mismatch.found, id.gfn);
                }
            }
            Kind::Sum => {
                count(&worker.counters.verified, 1);
                let expected = expected_sum(worker, id, version, buffer as *mut u64);
                if answer.result != expected {
                    let address = WorkSet::address(worker.index(page));
                    worker.report(Violation::Checksum, address, expected, answer.result, id.gfn);
                }
            }
            Kind::Write => {
                ledger.store(pages::next_version(last), Ordering::Relaxed);
                count(&worker.counters.writes, 1);
            }
            Kind::Clear => {
                ledger.store(pages::freed(entry), Ordering::Relaxed);
                count(&worker.counters.writes, 1);
            }
        }
    }
}

fn unit(worker: &Worker) -> &'static DmaUnit {
    &worker.machine.dma[worker.vcpu.index as usize]
}

/// The sum of the page as it must be, made in `scratch`.
fn expected_sum(worker: &Worker, id: PageId, version: u32, scratch: *mut u64) -> u64 {
    // SAFETY: the buffer is this vCPU's, a page of it follows `scratch`, and the device is idle.
    unsafe {
        if version == 0 {
            scratch.write_bytes(0, WORDS);
        } else {
            worker.machine.oracle.write(scratch, id, version);
        }
        dma::checksum(scratch, WORDS)
    }
}
