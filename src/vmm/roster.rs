//! Which vCPUs run, which are parked, and when the VM is over.
//!
//! Guarantee: a vCPU is started at most once per parking; when the last running vCPU parks, the
//! VM ends as halted; the first outcome stands, whatever follows it; and once every vCPU has
//! exited, waiters are told.
//!
//! While a [`Census`] lives, every vCPU is parked, or has said how to go on from where it is and
//! waits: what all of them said, together with the guest's memory, is the machine at one moment.

use std::time::{Duration, Instant};

use crate::sync::{Condvar, Mutex, MutexGuard, lock};

use super::error::VmError;
use super::gate::{Gate, Hold};
use super::real_state::RealState;
use super::vm::Outcome;

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

/// How a vCPU is to begin.
#[derive(Clone, Debug)]
pub(super) struct StartRequest {
    /// The state it begins with.
    pub(super) cpu: super::cpu::GuestCpu,
    /// For one that goes on from where another one was, the real processor's part of it.
    pub(super) real: Option<Box<RealState>>,
}

/// What a vCPU says for a census: how to go on from where it is.
type Account = Result<StartRequest, VmError>;

/// Why a start was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StartRefused {
    NoSuchVcpu,
    AlreadyRunning,
}

struct State {
    vcpus: Vec<VcpuState>,
    starts: Vec<Option<StartRequest>>,
    outcome: Option<Outcome>,
    /// What the vCPUs have said so far, while a census is taken.
    census: Option<Vec<Option<Account>>>,
    /// Number of censuses that are over.
    censuses: u64,
}

impl State {
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

/// See the module's documentation.
pub(super) struct Roster {
    state: Mutex<State>,
    changed: Condvar,
}

impl Roster {
    /// `vcpus` parked vCPUs.
    pub(super) fn new(vcpus: usize) -> Self {
        let state = State {
            vcpus: vec![VcpuState::Parked; vcpus],
            starts: vec![None; vcpus],
            outcome: None,
            census: None,
            censuses: 0,
        };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Starts a parked vCPU.
    pub(super) fn start(&self, vcpu: usize, request: StartRequest) -> Result<(), StartRefused> {
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
    pub(super) fn wait_for_start(&self, vcpu: usize) -> Option<StartRequest> {
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
    pub(super) fn park(&self, vcpu: usize) -> bool {
        let mut state = lock(&self.state);
        if let Some(life) = state.vcpus.get_mut(vcpu) {
            *life = VcpuState::Parked;
        }
        // A census may be waiting for this one.
        self.changed.notify_all();
        !state.vcpus.contains(&VcpuState::Running)
    }

    /// Has every vCPU stop at the gate and say how to go on; `None` if the VM is over. Another
    /// census is waited for.
    pub(super) fn census<'a>(&'a self, gate: &'a Gate) -> Option<Census<'a>> {
        let mut state = lock(&self.state);
        while state.census.is_some() {
            state = self.wait(state);
        }
        state.census = Some(state.vcpus.iter().map(|_| None).collect());
        drop(state);
        // From here on its drop undoes all.
        let mut census = Census { roster: self, hold: Some(gate.hold()), accounts: Vec::new() };
        let mut state = lock(&self.state);
        while !state.is_counted() && !state.is_over() {
            state = self.wait(state);
        }
        if state.is_over() {
            drop(state);
            return None;
        }
        let given = state.census.as_mut().map(std::mem::take).unwrap_or_default();
        let pending = state.starts.iter().cloned();
        census.accounts = given.into_iter().zip(pending).map(|(a, b)| a.or(b.map(Ok))).collect();
        drop(state);
        Some(census)
    }

    /// Vcpu `vcpu`, which the gate has sent away, gives its account, and waits for the end of the
    /// census.
    pub(super) fn give_account(&self, vcpu: usize, account: Account) {
        let mut state = lock(&self.state);
        let round = state.censuses;
        // Otherwise the census is over.
        if let Some(slot) = state.census.as_mut().and_then(|given| given.get_mut(vcpu)) {
            *slot = Some(account);
        }
        self.changed.notify_all();
        while state.census.is_some() && state.censuses == round && state.outcome.is_none() {
            state = self.wait(state);
        }
    }

    /// Sets the outcome if there is none yet.
    pub(super) fn end(&self, outcome: Outcome) {
        let mut state = lock(&self.state);
        state.outcome.get_or_insert(outcome);
        drop(state);
        self.changed.notify_all();
    }

    /// Vcpu `vcpu`'s thread is done.
    pub(super) fn exited(&self, vcpu: usize) {
        let mut state = lock(&self.state);
        if let Some(life) = state.vcpus.get_mut(vcpu) {
            *life = VcpuState::Exited;
        }
        drop(state);
        self.changed.notify_all();
    }

    /// State of each vCPU by index.
    pub(super) fn states(&self) -> Vec<VcpuState> {
        lock(&self.state).vcpus.clone()
    }

    /// Waits until there is an outcome and every vCPU in `threads` has exited; false when
    /// `timeout` passes first.
    pub(super) fn wait_for_exit(&self, threads: usize, timeout: Option<Duration>) -> bool {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut state = lock(&self.state);
        loop {
            let exited = state.vcpus.iter().filter(|life| **life == VcpuState::Exited).count();
            if state.outcome.is_some() && exited >= threads {
                return true;
            }
            state = match deadline {
                None => self.wait(state),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return false;
                    }
                    let waited = self.changed.wait_timeout(state, left);
                    waited.unwrap_or_else(|poisoned| poisoned.into_inner()).0
                }
            };
        }
    }

    /// Takes the outcome out, once.
    pub(super) fn take_outcome(&self) -> Option<Outcome> {
        lock(&self.state).outcome.take()
    }
}

/// See the module's documentation. The vCPUs go on when it is dropped.
#[must_use]
pub(super) struct Census<'a> {
    roster: &'a Roster,
    hold: Option<Hold<'a>>,
    accounts: Vec<Option<Account>>,
}

impl Census<'_> {
    /// How each vCPU that is not parked is to go on, by index.
    pub(super) fn take(&mut self) -> Result<Vec<Option<StartRequest>>, VmError> {
        std::mem::take(&mut self.accounts).into_iter().map(Option::transpose).collect()
    }
}

impl Drop for Census<'_> {
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
    use super::*;
    use crate::addr::Gpa;
    use crate::vmm::cpu::{Features, GuestCpu};

    fn request() -> StartRequest {
        let features = Features { phys_bits: 48, nx: true, fsgsbase: false, xsave: false };
        StartRequest { cpu: GuestCpu::at_boot(Gpa::new(0x9000), features), real: None }
    }

    #[test]
    fn a_vcpu_starts_once_until_it_parks() {
        let roster = Roster::new(2);
        assert_eq!(roster.start(2, request()), Err(StartRefused::NoSuchVcpu));
        assert_eq!(roster.start(0, request()), Ok(()));
        assert_eq!(roster.start(0, request()), Err(StartRefused::AlreadyRunning));
        assert!(roster.wait_for_start(0).is_some());
        assert_eq!(roster.start(1, request()), Ok(()));
        assert!(!roster.park(0), "vCPU 1 runs");
        assert_eq!(roster.start(0, request()), Ok(()), "a halted vCPU may be started again");
        assert!(!roster.park(0));
        assert!(roster.park(1), "the last one parked");
    }

    #[test]
    fn the_first_outcome_stands_and_wakes_waiters() {
        let roster = Roster::new(1);
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| roster.wait_for_start(0));
            roster.end(Outcome::GuestExit(3));
            roster.end(Outcome::Killed);
            assert!(waiter.join().unwrap().is_none());
        });
        assert!(!roster.wait_for_exit(1, Some(Duration::from_millis(1))), "its thread still lives");
        roster.exited(0);
        assert!(roster.wait_for_exit(1, None));
        assert!(matches!(roster.take_outcome(), Some(Outcome::GuestExit(3))));
    }

    fn gate() -> Gate {
        struct Nobody;
        impl crate::vmm::kick::Kick for Nobody {
            fn kick(&self) {}
            fn rearm(&self) {}
        }
        Gate::new(vec![std::sync::Arc::new(Nobody), std::sync::Arc::new(Nobody)])
    }

    fn account(rip: u64) -> Account {
        let mut account = request();
        account.cpu.rip = rip;
        Ok(account)
    }

    fn rips(census: &mut Census<'_>) -> Vec<Option<u64>> {
        let accounts = census.take().unwrap();
        accounts.into_iter().map(|one| one.map(|start| start.cpu.rip)).collect()
    }

    #[test]
    fn a_census_waits_for_who_runs_and_takes_a_pending_start_as_it_is() {
        let (roster, gate) = (Roster::new(2), gate());
        roster.start(0, account(1).unwrap()).unwrap();
        assert_eq!(rips(&mut roster.census(&gate).unwrap()), [Some(1), None]);
        assert!(roster.wait_for_start(0).is_some());
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for rip in [2, 3] {
                    while gate.enter(0).is_ok() {
                        std::thread::yield_now();
                    }
                    roster.give_account(0, account(rip));
                }
                assert!(!roster.park(0), "vCPU 1 is about to run");
            });
            let mut census = roster.census(&gate).unwrap();
            assert_eq!(rips(&mut census), [Some(2), None]);
            assert!(gate.enter(1).is_err(), "nobody gets in meanwhile");
            drop(census);
            roster.start(1, account(9).unwrap()).unwrap();
            assert_eq!(rips(&mut roster.census(&gate).unwrap()), [Some(3), Some(9)]);
        });
        assert_eq!(rips(&mut roster.census(&gate).unwrap()), [None, Some(9)], "vCPU 0 is parked");
    }

    #[test]
    fn no_census_of_a_vm_that_is_over_or_ends_meanwhile() {
        let (roster, gate) = (Roster::new(1), gate());
        roster.start(0, request()).unwrap();
        assert!(roster.wait_for_start(0).is_some());
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while gate.enter(0).is_ok() {
                    std::thread::yield_now();
                }
                roster.end(Outcome::Killed);
            });
            assert!(roster.census(&gate).is_none());
        });
        roster.exited(0);
        assert!(gate.enter(0).is_ok(), "the gate is open again");
        assert!(roster.take_outcome().is_some());
        assert!(roster.census(&gate).is_none());
    }
}
