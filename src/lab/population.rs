//! How many VMs there are in a stress run: clones of the first once that works, and then, with
//! `--churn`, one that ends and one that is cloned at a time.
//!
//! Guarantee: a VM is ended or cloned at most once an interval, without a later burst; every second
//! one is asked to make its last checks, the others are killed; and at most one that was asked is
//! there in addition to the number wanted.

use std::time::{Duration, Instant};

use super::course::PhaseEnd;
use super::fleet::Fate;
use super::judge::Judge;
use super::plan::Plan;
use super::setup::Setup;
use super::violations::Violation;
use crate::vmm::{Contract, VmError};

/// Time between two comparisons of reverse maps with what is mapped. After each, a VM's shadow pages are
/// taken back: it faults anew on everything, which takes it a fraction of this.
const CHECK_INTERVAL: Duration = Duration::from_secs(2);

/// What came of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct PopulationCount {
    /// Clones made.
    pub cloned: u64,
    /// Clones that failed for want of swap, as injected, or since what was to be cloned waited for a disk
    /// or a peer.
    pub failed: u64,
    /// VMs killed in the middle of their work.
    pub killed: u64,
    /// VMs asked to finish in the middle of the run.
    pub asked: u64,
}

/// See the module's documentation.
pub(super) struct Population {
    wanted: usize,
    churn: Option<Duration>,
    /// When the next change is due; `None` while there are too few.
    due: Option<Instant>,
    turn: usize,
    judge: Judge,
    /// When reverse maps are compared, and shadow pages taken back, the next time.
    check_due: Option<Instant>,
    checks: usize,
    pub(super) count: PopulationCount,
}

impl Population {
    pub(super) fn new(plan: &Plan, judge: Judge) -> Self {
        Self {
            wanted: plan.vms,
            churn: plan.churn,
            due: None,
            turn: 0,
            judge,
            check_due: None,
            checks: 0,
            count: PopulationCount::default(),
        }
    }

    /// Whether there have been as many VMs as there were to be.
    pub(super) fn was_complete(&self) -> bool {
        self.wanted == 1 || self.due.is_some()
    }

    /// Does what is due.
    ///
    /// # Errors
    /// How the run ends, if a VM cannot be cloned for a reason that is neither a lack of swap nor
    /// injected.
    pub(super) fn tend(
        &mut self,
        setup: &mut Setup<impl Contract>,
        now: Instant,
    ) -> Result<(), PhaseEnd> {
        self.let_go(setup);
        self.check(setup, now)?;
        match (self.due, self.churn) {
            (None, _) if self.wanted > 1 && setup.fleet.is_working() => {
                while setup.fleet.members.len() < self.wanted {
                    if !self.clone_one(setup, 0)? {
                        return Ok(());
                    }
                }
                self.due = Some(now + self.churn.unwrap_or_default());
                Ok(())
            }
            (Some(due), Some(interval)) if now >= due => {
                self.due = Some(now + interval);
                self.change(setup)
            }
            _ => Ok(()),
        }
    }

    /// Compares reverse maps and takes shadow pages back, now and then.
    fn check(&mut self, setup: &mut Setup<impl Contract>, now: Instant) -> Result<(), PhaseEnd> {
        let due = *self.check_due.get_or_insert(now + CHECK_INTERVAL);
        if now < due || !setup.fleet.is_working() {
            return Ok(());
        }
        self.check_due = Some(now + CHECK_INTERVAL);
        self.checks += 1;
        let checked = setup.fleet.check_and_recycle(self.checks);
        checked.map_err(|error| self.end(&error, Violation::of_failure(&error)))
    }

    /// Those that have ended, as they were to.
    fn let_go(&self, setup: &mut Setup<impl Contract>) {
        let mut index = 0;
        while let Some(member) = setup.fleet.members.get(index) {
            match member.has_ended {
                true => setup.fleet.retire(index, &setup.mm),
                false => index += 1,
            }
        }
    }

    fn change<P: Contract>(&mut self, setup: &mut Setup<P>) -> Result<(), PhaseEnd> {
        let of_fate = |setup: &Setup<P>, fate| -> Vec<usize> {
            let members = setup.fleet.members.iter().enumerate();
            let chosen = members.filter(|(_, member)| member.fate == fate && !member.has_ended);
            chosen.map(|(index, _)| index).collect()
        };
        let working = of_fate(setup, Fate::Works);
        self.turn += 1;
        let nth = |turn: usize| working.get(turn % working.len().max(1)).copied();
        // Two different ones, if there are two; members stay in their places here.
        let (Some(leaving), Some(source)) = (nth(self.turn), nth(self.turn + 1)) else {
            return Ok(());
        };
        let somebody_was_asked = !of_fate(setup, Fate::Asked).is_empty();
        if !self.clone_one(setup, source)? {
            return Ok(());
        }
        let Some(member) = setup.fleet.members.get_mut(leaving) else {
            return Ok(());
        };
        if self.turn.is_multiple_of(2) && !somebody_was_asked {
            member.fate = Fate::Asked;
            member.vm.request_stop();
            self.count.asked += 1;
        } else {
            member.fate = Fate::Killed;
            member.vm.kill();
            self.count.killed += 1;
        }
        Ok(())
    }

    /// Clones a member; false if that was not to be had now.
    fn clone_one(
        &mut self,
        setup: &mut Setup<impl Contract>,
        source: usize,
    ) -> Result<bool, PhaseEnd> {
        match setup.fleet.clone_member(source) {
            Ok(()) => {
                self.count.cloned += 1;
                Ok(true)
            }
            Err(VmError::Host(error)) if self.judge.is_expected(&error) => {
                self.count.failed += 1;
                Ok(false)
            }
            // A disk or a peer keeps it.
            Err(VmError::NotInTime) => {
                self.count.failed += 1;
                Ok(false)
            }
            // It ends just now; what that means is looked at where its outcome is.
            Err(VmError::NotRunning) => Ok(false),
            Err(error) => {
                let violation = Violation::of_run(format!("a VM could not be cloned: {error}"));
                Err(self.end(&error, violation))
            }
        }
    }

    /// What ends the run: a limit of the host, if that is what the error is, or else the violation.
    fn end(&self, error: &VmError, violation: Violation) -> PhaseEnd {
        self.judge.host_limit(error).map_or(PhaseEnd::Bad(violation), PhaseEnd::HostLimit)
    }
}
