//! The thread that reads what happens to a part of the window. It never waits for anybody but the
//! kernel: the [layer](crate::direct_mmu) says why.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use crate::direct_mmu::install::Installed;
use crate::direct_mmu::shard::{Deferral, Fault, Job, Shard};
use crate::direct_mmu::{DirectError, Mmu};
use crate::sys::uffd::UffdError;
use crate::sys::uffd_window::InstallError;

/// Attempts at a fault that invalidations overtake, before a worker waits for their end.
const ATTEMPTS: u32 = 4;
/// How long faults that were set aside wait if nothing happens.
const PARKED_TIME: Duration = Duration::from_micros(200);

/// What became of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Done,
    /// To be tried again once more was read.
    Parked,
}

/// When to look for the next fault and when to sleep: faults that came fast are taken to come fast.
struct Patience {
    spin: Duration,
    last: Instant,
    worth_it: bool,
}

impl Patience {
    /// Something came: was it within the time for which it is worth looking?
    fn note(&mut self) {
        self.worth_it = self.last.elapsed() < 2 * self.spin;
    }

    /// What came is done; from now on the next one is looked for.
    fn begin(&mut self) {
        self.last = Instant::now();
    }

    fn is_left(&self) -> bool {
        self.worth_it && self.last.elapsed() < self.spin
    }
}

impl Mmu {
    pub(super) fn read_faults(&self, shard: &Shard) {
        let error = match catch_unwind(AssertUnwindSafe(|| self.read_until_stopped(shard))) {
            Ok(Ok(())) => return,
            Ok(Err(source)) => DirectError::Events { source },
            Err(_) => DirectError::Panicked { thread: "the one that reads page faults" },
        };
        // Told first: no vCPU is to run on with what it finds when it is let go.
        self.fail(error);
        // Whoever waits must not wait for ever: neither for a page nor for an event to be read.
        let _ = shard.window.unregister();
        while !shard.is_reader_stopped() {
            let _ = shard.window.read(&mut Vec::new());
            std::thread::sleep(PARKED_TIME);
        }
    }

    fn read_until_stopped(&self, shard: &Shard) -> Result<(), UffdError> {
        let spin = self.config.spin;
        let mut patience = Patience { spin, last: Instant::now(), worth_it: false };
        let mut parked: Vec<Fault> = Vec::new();
        while !shard.is_reader_stopped() {
            // Asked first, so that nobody who wants the MMU lock finds it held by a look at nothing.
            if shard.window.wait(Some(Duration::ZERO))? {
                let _turn = shard.reader_turns.begin();
                patience.note();
                let faults = self.read_events(shard)?;
                self.counters.faults.add(faults.len() as u64);
                parked.retain(|&fault| self.resolve_now(shard, fault) == Outcome::Parked);
                for fault in faults {
                    if self.resolve_now(shard, fault) == Outcome::Parked {
                        self.counters.parked.add(1);
                        parked.push(fault);
                    }
                }
                patience.begin();
            } else if !parked.is_empty() {
                let turn = shard.reader_turns.begin();
                parked.retain(|&fault| self.resolve_now(shard, fault) == Outcome::Parked);
                drop(turn);
                if !parked.is_empty() {
                    shard.window.wait(Some(PARKED_TIME))?;
                }
            } else if patience.is_left() {
                std::hint::spin_loop();
            } else {
                shard.window.wait(None)?;
            }
        }
        Ok(())
    }

    /// Resolves a fault if that takes no waiting, or hands it over to the worker.
    fn resolve_now(&self, shard: &Shard, fault: Fault) -> Outcome {
        for _ in 0..ATTEMPTS {
            // Looked at first: a page that is about to be removed is not worth reading back.
            let deferral = shard.lock().deferral(fault.page);
            let installed = match deferral {
                Some(deferral) => Installed::Deferred(deferral),
                None => match self.try_page(fault) {
                    Ok(Some(page)) => self.attempt(shard, fault, page),
                    // The worker finds the error again, and tells.
                    Ok(None) | Err(_) => break,
                },
            };
            match installed {
                Installed::Done => return Outcome::Done,
                Installed::Retry => {}
                Installed::Deferred(Deferral::Removal) => break,
                Installed::Deferred(Deferral::Zap) | Installed::Refused(InstallError::Changing) => {
                    return Outcome::Parked;
                }
                Installed::Refused(error) => {
                    self.fail_install(fault, error);
                    return Outcome::Done;
                }
            }
        }
        self.counters.handed_over.add(1);
        shard.hand_over(Job::Fault(fault));
        Outcome::Done
    }
}
