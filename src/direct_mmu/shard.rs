//! A part of the window: its userfaultfd, its MMU lock and what its two threads share.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex};

use crate::addr::PAGE_SIZE;
use crate::direct_mmu::turn::Turns;
use crate::direct_mmu::zap::OwnZap;
use crate::export_rmap::{ClientGuard, ClientLock};
use crate::host_mm::{GuestView, MmError};
use crate::streams::Streams;
use crate::sync::lock;
use crate::sys::uffd::Features;
use crate::sys::uffd_window::Window;

/// A fault that was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) page: u64,
    pub(super) write: bool,
    /// The page is mapped, and protected.
    pub(super) protected: bool,
}

/// What is a worker's to do, in this order.
#[derive(Debug)]
pub(super) enum Job {
    /// To resolve a fault.
    Fault(Fault),
    /// To free pages that were removed.
    Remove(Range<u64>),
    /// To give up mappings that are gone, and to say so.
    Lose(Range<u64>, &'static str),
}

/// What the MMU lock protects beside the [table](crate::direct_mmu::table).
#[derive(Debug, Default)]
pub(super) struct Noted {
    /// Removals whose events were read and which are not done yet.
    pub(super) removals: Vec<Range<u64>>,
    /// The zap of our own that is under way.
    pub(super) zap: Option<OwnZap>,
    /// What faults have come in sequence.
    pub(super) streams: Streams,
}

/// What the MMU lock protects, while it is held.
pub(super) type LockedShard<'a> = ClientGuard<'a, Noted>;

/// What keeps a page from being mapped for now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Deferral {
    /// Its removal: a fault is to queue up behind it.
    Removal,
    /// A zap that is under way: over in a moment.
    Zap,
}

impl Noted {
    pub(super) fn deferral(&self, page: u64) -> Option<Deferral> {
        if self.removals.iter().any(|removal| removal.contains(&page)) {
            return Some(Deferral::Removal);
        }
        self.zap.as_ref().filter(|zap| zap.covers(page)).map(|_| Deferral::Zap)
    }
}

#[derive(Debug, Default)]
struct Queue {
    jobs: VecDeque<Job>,
    stopped: bool,
}

/// A part of the window.
#[derive(Debug)]
pub(super) struct Shard {
    pub(super) window: Window,
    /// Its pages.
    pub(super) pages: Range<u64>,
    /// The MMU lock.
    noted: ClientLock<Noted>,
    /// Held by the one who zaps.
    pub(super) zapping: Mutex<()>,
    pub(super) reader_turns: Turns,
    pub(super) worker_turns: Turns,
    queue: Mutex<Queue>,
    changed: Condvar,
    reader_stopped: AtomicBool,
}

impl Shard {
    pub(super) fn open(
        view: &GuestView,
        pages: Range<usize>,
        features: Features,
    ) -> Result<Self, MmError> {
        let bytes = pages.start * PAGE_SIZE..pages.end * PAGE_SIZE;
        Ok(Self {
            window: Window::open(view.region().clone(), bytes, features)?,
            pages: pages.start as u64..pages.end as u64,
            noted: ClientLock::default(),
            zapping: Mutex::default(),
            reader_turns: Turns::default(),
            worker_turns: Turns::default(),
            queue: Mutex::default(),
            changed: Condvar::new(),
            reader_stopped: AtomicBool::new(false),
        })
    }

    /// Takes the MMU lock.
    pub(super) fn lock(&self) -> LockedShard<'_> {
        self.noted.lock()
    }

    /// May be called with the MMU lock held: the queue's own is held for a moment only.
    pub(super) fn hand_over(&self, job: Job) {
        lock(&self.queue).jobs.push_back(job);
        self.changed.notify_all();
    }

    /// The next job, waiting for one; `None` when it is time to end.
    pub(super) fn next_job(&self) -> Option<Job> {
        let mut queue = lock(&self.queue);
        loop {
            if queue.stopped {
                return None;
            }
            if let Some(job) = queue.jobs.pop_front() {
                return Some(job);
            }
            queue = self.changed.wait(queue).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
    }

    /// Waits until no removal whose call has returned is left to do.
    pub(super) fn settle(&self) {
        // Its event was read, and the lock is held until it is noted: as a removal, or as a part of a
        // zap until that knows better.
        let is_left = |noted: &Noted| noted.zap.is_some() || !noted.removals.is_empty();
        while is_left(&self.lock()) && !self.is_worker_stopped() {
            std::thread::yield_now();
        }
    }

    /// Waits until all is done that belongs to faults which were resolved before.
    pub(super) fn await_turns(&self) {
        self.reader_turns.await_end();
        self.worker_turns.await_end();
    }

    pub(super) fn await_zap(&self) {
        drop(lock(&self.zapping));
    }

    pub(super) fn stop_worker(&self) {
        lock(&self.queue).stopped = true;
        self.changed.notify_all();
    }

    pub(super) fn is_worker_stopped(&self) -> bool {
        lock(&self.queue).stopped
    }

    pub(super) fn stop_reader(&self) {
        // Release pairs with the Acquire in `is_reader_stopped`.
        self.reader_stopped.store(true, Ordering::Release);
        // Without it the reader would sleep on: but an eventfd takes a write unless it is full, and
        // then the reader does not sleep.
        let _ = self.window.interrupt();
    }

    pub(super) fn is_reader_stopped(&self) -> bool {
        self.reader_stopped.load(Ordering::Acquire)
    }
}
