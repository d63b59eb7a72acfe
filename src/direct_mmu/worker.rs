//! The thread that does what takes waiting: faults that need a page lock that somebody holds or a
//! frame that must be freed first, and what follows from events. Jobs are done in the order in which
//! they were handed over, so a fault on a removed page comes after its removal.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::addr::Gfn;
use crate::direct_mmu::install::Installed;
use crate::direct_mmu::shard::{Deferral, Fault, Job, Shard};
use crate::direct_mmu::{DirectError, Mmu};
use crate::sys::uffd_window::InstallError;

impl Mmu {
    pub(super) fn work(&self, shard: &Shard) {
        if catch_unwind(AssertUnwindSafe(|| self.work_until_stopped(shard))).is_err() {
            self.fail(DirectError::Panicked { thread: "the one that brings pages in" });
            // Nobody is to wait for what it does no more.
            shard.stop_worker();
        }
    }

    fn work_until_stopped(&self, shard: &Shard) {
        while let Some(job) = shard.next_job() {
            let _turn = shard.worker_turns.begin();
            match job {
                Job::Fault(fault) => self.resolve(shard, fault),
                Job::Remove(pages) => self.remove(shard, &pages),
                Job::Lose(pages, how) => self.lose(&pages, how),
            }
        }
    }

    fn resolve(&self, shard: &Shard, fault: Fault) {
        while !shard.is_worker_stopped() {
            let installed = match self.page(fault) {
                Ok(page) => self.attempt(shard, fault, page),
                Err(source) => {
                    let gfn = Gfn::new(fault.page);
                    return self.fail(DirectError::Page { gfn, source });
                }
            };
            match installed {
                Installed::Done => return,
                Installed::Retry => {}
                // Noted after this job was taken: the removal is in the queue.
                Installed::Deferred(Deferral::Removal) => {
                    return shard.hand_over(Job::Fault(fault));
                }
                // The reader is about to read the event that this waits for.
                Installed::Deferred(Deferral::Zap) | Installed::Refused(InstallError::Changing) => {
                    std::thread::yield_now()
                }
                Installed::Refused(error) => return self.fail_install(fault, error),
            }
        }
    }

    /// The pages are zero from now on.
    fn remove(&self, shard: &Shard, pages: &Range<u64>) {
        let (first, count) = (Gfn::new(pages.start), pages.end - pages.start);
        match self.object.free_pages(first, count) {
            Ok(_) => self.counters.removed.add(count),
            Err(source) => self.fail(DirectError::Remove { first, count, source }),
        }
        let mut noted = shard.lock();
        if let Some(done) = noted.removals.iter().position(|removal| removal == pages) {
            noted.removals.swap_remove(done);
        }
    }

    /// The window has no such pages any more: what was written there is noted, and the owner told.
    fn lose(&self, pages: &Range<u64>, how: &'static str) {
        let (first, count) = (Gfn::new(pages.start), pages.end - pages.start);
        if let Err(source) = self.object.withdraw_mappings(first, count) {
            self.fail(DirectError::Remove { first, count, source });
        }
        self.fail(DirectError::Lost { first, count, how });
    }
}
