//! Which vCPUs run, which are parked, and when the VM is over.
//!
//! Guarantee: a vCPU is started at most once per parking; when the last running vCPU parks, the
//! VM ends as halted; the first outcome stands, whatever follows it; and once every vCPU has
//! exited, waiters are told.

mod census;

use crate::sync::{Condvar, Mutex, MutexGuard, lock};
use crate::sys::Patience;

use super::outcome::Outcome;
use census::Account;
pub(in crate::vmm) use census::Census;

/// Life of a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VcpuState {
    /// Never started, or halted: waits for a start.
    Parked,
    /// Runs guest code, or is about to, or its exit is being handled.
    Running,
    /// Its thread is done; final.
    Exited,
}

/// Why a start was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StartRefused {
    NoSuchVcpu,
    AlreadyRunning,
}

struct State<S> {
    vcpus: Vec<VcpuState>,
    starts: Vec<Option<S>>,
    outcome: Option<Outcome>,
    /// What the vCPUs have said so far, while a census is taken.
    census: Option<Vec<Option<Account<S>>>>,
    /// Number of censuses that are over.
    censuses: u64,
}

/// See the module's documentation. `S` is what a vCPU is told at its start.
pub(in crate::vmm) struct Roster<S> {
    state: Mutex<State<S>>,
    changed: Condvar,
}

impl<S> Roster<S> {
    /// `vcpus` parked vCPUs.
    pub(in crate::vmm) fn new(vcpus: usize) -> Self {
        let state = State {
            vcpus: vec![VcpuState::Parked; vcpus],
            starts: (0..vcpus).map(|_| None).collect(),
            outcome: None,
            census: None,
            censuses: 0,
        };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State<S>>) -> MutexGuard<'a, State<S>> {
        self.changed.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Starts a parked vCPU.
    pub(in crate::vmm) fn start(&self, vcpu: usize, request: S) -> Result<(), StartRefused> {
        let mut guard = lock(&self.state);
        let state = &mut *guard;
        let (Some(life), Some(start)) = (state.vcpus.get_mut(vcpu), state.starts.get_mut(vcpu))
        else {
            return Err(StartRefused::NoSuchVcpu);
        };
        if *life != VcpuState::Parked {
            return Err(StartRefused::AlreadyRunning);
        }
        *life = VcpuState::Running;
        *start = Some(request);
        drop(guard);
        self.changed.notify_all();
        Ok(())
    }

    /// A vCPU thread waits for its start; `None` when the VM is over.
    pub(in crate::vmm) fn wait_for_start(&self, vcpu: usize) -> Option<S> {
        let mut state = lock(&self.state);
        loop {
            if state.outcome.is_some() {
                return None;
            }
            if let Some(request) = state.starts.get_mut(vcpu).and_then(Option::take) {
                return Some(request);
            }
            state = self.wait(state);
        }
    }

    /// Vcpu `vcpu` has halted. True when that was the last running one: the VM is over.
    pub(in crate::vmm) fn park(&self, vcpu: usize) -> bool {
        let mut state = lock(&self.state);
        if let Some(life) = state.vcpus.get_mut(vcpu) {
            *life = VcpuState::Parked;
        }
        // A census may be waiting for this one.
        self.changed.notify_all();
        !state.vcpus.contains(&VcpuState::Running)
    }

    /// Sets the outcome if there is none yet.
    pub(in crate::vmm) fn end(&self, outcome: Outcome) {
        let mut state = lock(&self.state);
        state.outcome.get_or_insert(outcome);
        drop(state);
        self.changed.notify_all();
    }

    /// Vcpu `vcpu`'s thread is done.
    pub(in crate::vmm) fn exited(&self, vcpu: usize) {
        let mut state = lock(&self.state);
        if let Some(life) = state.vcpus.get_mut(vcpu) {
            *life = VcpuState::Exited;
        }
        drop(state);
        self.changed.notify_all();
    }

    /// State of each vCPU by index.
    pub(in crate::vmm) fn states(&self) -> Vec<VcpuState> {
        lock(&self.state).vcpus.clone()
    }

    /// Waits until there is an outcome and every vCPU in `threads` has exited; false when
    /// the patience, if there is any limit to it, runs out first.
    pub(in crate::vmm) fn wait_for_exit(
        &self,
        threads: usize,
        patience: &mut Option<Patience>,
    ) -> bool {
        let mut state = lock(&self.state);
        loop {
            let exited = state.vcpus.iter().filter(|life| **life == VcpuState::Exited).count();
            if state.outcome.is_some() && exited >= threads {
                return true;
            }
            state = match patience {
                None => self.wait(state),
                Some(patience) => {
                    let Some(slice) = patience.slice() else { return false };
                    let waited = self.changed.wait_timeout(state, slice);
                    waited.unwrap_or_else(|poisoned| poisoned.into_inner()).0
                }
            };
        }
    }

    /// Takes the outcome out, once.
    pub(in crate::vmm) fn take_outcome(&self) -> Option<Outcome> {
        lock(&self.state).outcome.take()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_vcpu_starts_once_until_it_parks() {
        let roster = Roster::new(2);
        assert_eq!(roster.start(2, 0x1000), Err(StartRefused::NoSuchVcpu));
        assert_eq!(roster.start(0, 0x1000), Ok(()));
        assert_eq!(roster.start(0, 0x1000), Err(StartRefused::AlreadyRunning));
        assert!(roster.wait_for_start(0).is_some());
        assert_eq!(roster.start(1, 0x1000), Ok(()));
        assert!(!roster.park(0), "vCPU 1 runs");
        assert_eq!(roster.start(0, 0x1000), Ok(()), "a halted vCPU may be started again");
        assert!(!roster.park(0));
        assert!(roster.park(1), "the last one parked");
    }

    #[test]
    fn the_first_outcome_stands_and_wakes_waiters() {
        let roster = Roster::<u64>::new(1);
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| roster.wait_for_start(0));
            roster.end(Outcome::GuestExit(3));
            roster.end(Outcome::Killed);
            assert!(waiter.join().unwrap().is_none());
        });
        assert!(
            !roster.wait_for_exit(1, &mut Some(Patience::new(Duration::from_millis(1)))),
            "its thread still lives"
        );
        roster.exited(0);
        assert!(roster.wait_for_exit(1, &mut None));
        assert!(matches!(roster.take_outcome(), Some(Outcome::GuestExit(3))));
    }
}
