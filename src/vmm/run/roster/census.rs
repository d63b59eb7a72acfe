//! What all vCPUs are at one moment.
//!
//! Guarantee: while a [`Census`] lives, every vCPU is parked, or has said how to go on from where it
//! is and waits: what all of them said, together with the guest's memory, is the machine at one
//! moment. They go on when it is dropped.

use crate::sync::lock;
use crate::vmm::error::VmError;
use crate::vmm::run::brief_wait::BriefWait;
use crate::vmm::run::gate::{Gate, Hold};

use super::{Roster, State, VcpuState};

/// What a vCPU says: how to go on from where it is.
pub(in crate::vmm) type Account<S> = Result<S, VmError>;

impl<S> State<S> {
    /// Whether every vCPU that runs has given its account or is yet to begin.
    fn is_counted(&self) -> bool {
        let given = self.census.iter().flatten().map(Option::is_some);
        let all = self.vcpus.iter().zip(&self.starts).zip(given);
        all.into_iter()
            .all(|((life, start), given)| *life != VcpuState::Running || start.is_some() || given)
    }

    fn is_over(&self) -> bool {
        self.outcome.is_some() || self.vcpus.contains(&VcpuState::Exited)
    }
}

impl<S: Clone> Roster<S> {
    /// Has every vCPU stop at the gate and say how to go on, for as long as the caller waits. Another
    /// census is waited for.
    ///
    /// # Errors
    /// [`VmError::NotRunning`] if the VM is over; [`VmError::NotInTime`], and then all go on.
    pub(in crate::vmm) fn census<'a>(
        &'a self,
        gate: &'a Gate,
        brief: &mut BriefWait,
    ) -> Result<Census<'a, S>, VmError> {
        let mut state = lock(&self.state);
        while state.census.is_some() {
            state = brief.wait(&self.changed, state).ok_or(VmError::NotInTime)?;
        }
        state.census = Some(state.vcpus.iter().map(|_| None).collect());
        drop(state);
        // From here on its drop undoes all.
        let mut census = Census { roster: self, hold: Some(gate.hold()), accounts: Vec::new() };
        let mut state = lock(&self.state);
        while !state.is_counted() && !state.is_over() {
            state = brief.wait(&self.changed, state).ok_or(VmError::NotInTime)?;
        }
        if state.is_over() {
            drop(state);
            return Err(VmError::NotRunning);
        }
        let given = state.census.as_mut().map(std::mem::take).unwrap_or_default();
        let pending = state.starts.iter().cloned();
        census.accounts = given.into_iter().zip(pending).map(|(a, b)| a.or(b.map(Ok))).collect();
        drop(state);
        Ok(census)
    }

    /// Vcpu `vcpu`, which the gate has sent away, gives its account, and waits for the end of the
    /// census.
    pub(in crate::vmm) fn give_account(&self, vcpu: usize, account: Account<S>) {
        let mut state = lock(&self.state);
        let round = state.censuses;
        // Otherwise the census is over, or has heard this vCPU's pending start.
        if let Some(slot) = state.census.as_mut().and_then(|given| given.get_mut(vcpu)) {
            *slot = Some(account);
        }
        self.changed.notify_all();
        while state.census.is_some() && state.censuses == round && state.outcome.is_none() {
            state = self.wait(state);
        }
    }
}

/// See the module's documentation. The vCPUs go on when it is dropped.
#[must_use]
pub(in crate::vmm) struct Census<'a, S> {
    roster: &'a Roster<S>,
    hold: Option<Hold<'a>>,
    accounts: Vec<Option<Account<S>>>,
}

impl<S> Census<'_, S> {
    /// How each vCPU that is not parked is to go on, by index.
    pub(in crate::vmm) fn take(&mut self) -> Result<Vec<Option<S>>, VmError> {
        std::mem::take(&mut self.accounts).into_iter().map(Option::transpose).collect()
    }
}

impl<S> Drop for Census<'_, S> {
    fn drop(&mut self) {
        // The gate first: who is told that the census is over finds it open.
        self.hold = None;
        let mut state = lock(&self.roster.state);
        state.census = None;
        state.censuses += 1;
        drop(state);
        self.roster.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::sys::signal;
    use crate::vmm::run::outcome::Outcome;

    fn gate() -> Gate {
        struct Nobody;
        impl crate::vmm::run::kick::Kick for Nobody {
            fn kick(&self) {}
            fn rearm(&self) {}
        }
        Gate::new(vec![std::sync::Arc::new(Nobody), std::sync::Arc::new(Nobody)])
    }

    /// What is told at a start, and accounted for: a RIP.
    fn rips(census: &mut Census<'_, u64>) -> Vec<Option<u64>> {
        census.take().unwrap()
    }

    #[test]
    fn a_census_waits_for_who_runs_and_takes_a_pending_start_as_it_is() {
        let (roster, gate) = (Roster::new(2), gate());
        roster.start(0, 1).unwrap();
        assert_eq!(
            rips(&mut roster.census(&gate, &mut BriefWait::begin()).unwrap()),
            [Some(1), None]
        );
        assert!(roster.wait_for_start(0).is_some());
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for rip in [2, 3] {
                    while gate.enter(0).is_ok() {
                        std::thread::yield_now();
                    }
                    roster.give_account(0, Ok(rip));
                }
                assert!(!roster.park(0), "vCPU 1 is about to run");
            });
            let mut census = roster.census(&gate, &mut BriefWait::begin()).unwrap();
            assert_eq!(rips(&mut census), [Some(2), None]);
            assert!(gate.enter(1).is_err(), "nobody gets in meanwhile");
            drop(census);
            roster.start(1, 9).unwrap();
            assert_eq!(
                rips(&mut roster.census(&gate, &mut BriefWait::begin()).unwrap()),
                [Some(3), Some(9)]
            );
        });
        assert_eq!(
            rips(&mut roster.census(&gate, &mut BriefWait::begin()).unwrap()),
            [None, Some(9)],
            "vCPU 0 is parked"
        );
    }

    #[test]
    fn no_census_of_a_vm_that_is_over_or_ends_meanwhile() {
        let (roster, gate) = (Roster::new(1), gate());
        roster.start(0, 1).unwrap();
        assert!(roster.wait_for_start(0).is_some());
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while gate.enter(0).is_ok() {
                    std::thread::yield_now();
                }
                roster.end(Outcome::Killed);
            });
            assert!(matches!(
                roster.census(&gate, &mut BriefWait::begin()),
                Err(VmError::NotRunning)
            ));
        });
        roster.exited(0);
        assert!(gate.enter(0).is_ok(), "the gate is open again");
        assert!(roster.take_outcome().is_some());
        assert!(matches!(roster.census(&gate, &mut BriefWait::begin()), Err(VmError::NotRunning)));
    }

    #[test]
    fn a_vcpu_that_does_not_come_is_waited_for_until_a_stop_or_for_a_while() {
        let (roster, gate) = (Roster::new(2), gate());
        for vcpu in 0..2 {
            roster.start(vcpu, 1).unwrap();
            assert!(roster.wait_for_start(vcpu).is_some());
        }
        let given_up = |limit| {
            let refused = roster.census(&gate, &mut BriefWait::of(limit));
            assert!(matches!(refused, Err(VmError::NotInTime)));
            assert!(gate.enter(0).is_ok(), "the gate is open again");
        };
        std::thread::scope(|scope| {
            // The other one comes, says how to go on, and does so when nobody asks any more.
            let other = scope.spawn(|| roster.give_account(1, Ok(7)));
            {
                let _stop = signal::pretended::Stop::after(3);
                given_up(Duration::from_secs(3600));
            }
            given_up(Duration::from_millis(1));
            other.join().unwrap();
        });
        // Both are there the next time.
        std::thread::scope(|scope| {
            for vcpu in 0..2 {
                let (roster, gate) = (&roster, &gate);
                scope.spawn(move || {
                    while gate.enter(vcpu).is_ok() {
                        std::thread::yield_now();
                    }
                    roster.give_account(vcpu, Ok(vcpu as u64));
                });
            }
            let mut census = roster.census(&gate, &mut BriefWait::begin()).unwrap();
            assert_eq!(rips(&mut census), [Some(0), Some(1)]);
        });
    }
}
