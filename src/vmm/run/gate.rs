//! The gate that every `KVM_RUN` lies behind, and the pause of all vCPUs.
//!
//! Guarantee: while the closure given to [`Gate::pause_all`] runs, no vCPU is between
//! [`Gate::enter`] and the drop of its [`Pass`], and none gets in; afterwards the epoch has
//! changed, so each vCPU that enters knows that what it kept from before is void. [`Gate::stop`]
//! turns everybody away for good. None of them waits for a thread that waits for it: a pauser
//! must not hold a pass, a second pauser waits outside for the first, finds the epoch changed and
//! leaves the work undone. A pauser that is no vCPU waits for a [while](BriefWait) only, as a vCPU may
//! wait for a disk or a peer; when it gives up, the gate is open as if it had not come.
//!
//! A [`Hold`] is the other way to have nobody inside: while it lives, whoever comes to the gate is
//! sent away to give an account of itself, and comes again. It changes no epoch, as it makes
//! nothing void, and it keeps no pause from coming first.
//!
//! Kicks are not lost: the flag that keeps a vCPU out of `KVM_RUN` is cleared only in `enter`,
//! under the lock, while the gate is open; a closer closes under the same lock before it kicks.

use std::sync::Arc;

use crate::sync::{Condvar, Mutex, MutexGuard, lock};

use super::brief_wait::BriefWait;
use super::kick::Kick;

/// Where a vCPU is with respect to the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Position {
    /// Not trying to run.
    Outside,
    /// Wants to run, the gate is closed.
    Paused,
    /// May be in guest mode.
    Inside,
}

struct State {
    is_closed: bool,
    is_held: bool,
    is_stopping: bool,
    epoch: u64,
    positions: Vec<Position>,
}

impl State {
    fn set(&mut self, vcpu: usize, position: Position) {
        if let Some(slot) = self.positions.get_mut(vcpu) {
            *slot = position;
        }
    }

    fn someone_inside(&self) -> bool {
        self.positions.contains(&Position::Inside)
    }
}

/// See the module's documentation.
pub(in crate::vmm) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
    kicks: Vec<Arc<dyn Kick>>,
}

/// What became of a request to pause everybody.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::vmm) enum Paused<T> {
    /// The closure ran; here is its result.
    Done(T),
    /// Somebody else paused everybody since the given epoch: the work is done.
    AlreadyDone,
    /// The VM is stopping.
    Stopping,
    /// Somebody did not come out in time. Nothing has changed.
    GivenUp,
}

/// Why a vCPU does not get in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::vmm) enum Refused {
    /// The VM is stopping.
    Stopping,
    /// There is a [`Hold`]. The vCPU has been kicked: its next `KVM_RUN` returns at once.
    Held,
}

/// Sends vCPUs away from the gate, until dropped.
#[must_use]
pub(in crate::vmm) struct Hold<'a> {
    gate: &'a Gate,
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        lock(&self.gate.state).is_held = false;
        self.gate.changed.notify_all();
    }
}

/// Permission to be in guest mode, until dropped.
pub(in crate::vmm) struct Pass<'a> {
    gate: &'a Gate,
    vcpu: usize,
    /// The epoch at entry, which cannot change while the pass is held.
    pub(in crate::vmm) epoch: u64,
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        lock(&self.gate.state).set(self.vcpu, Position::Outside);
        self.gate.changed.notify_all();
    }
}

impl Gate {
    /// A gate for the vCPUs that `kicks` kick, in order of their indices.
    pub(in crate::vmm) fn new(kicks: Vec<Arc<dyn Kick>>) -> Self {
        let positions = vec![Position::Outside; kicks.len()];
        let state =
            State { is_closed: false, is_held: false, is_stopping: false, epoch: 0, positions };
        Self { state: Mutex::new(state), changed: Condvar::new(), kicks }
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// As [`wait`](Self::wait), if there is still time; without `brief` there always is.
    fn wait_in_time<'a>(
        &self,
        state: MutexGuard<'a, State>,
        brief: &mut Option<BriefWait>,
    ) -> Option<MutexGuard<'a, State>> {
        match brief {
            Some(brief) => brief.wait(&self.changed, state),
            None => Some(self.wait(state)),
        }
    }

    /// Waits until the gate is open and goes in.
    pub(in crate::vmm) fn enter(&self, vcpu: usize) -> Result<Pass<'_>, Refused> {
        let mut state = lock(&self.state);
        loop {
            if state.is_stopping {
                state.set(vcpu, Position::Outside);
                return Err(Refused::Stopping);
            }
            if state.is_held {
                state.set(vcpu, Position::Paused);
                if let Some(kick) = self.kicks.get(vcpu) {
                    kick.kick();
                }
                return Err(Refused::Held);
            }
            if !state.is_closed {
                break;
            }
            state.set(vcpu, Position::Paused);
            state = self.wait(state);
        }
        state.set(vcpu, Position::Inside);
        if let Some(kick) = self.kicks.get(vcpu) {
            kick.rearm();
        }
        Ok(Pass { gate: self, vcpu, epoch: state.epoch })
    }

    /// Holds the gate, and kicks out those that are inside. Does not wait. One at a time: the end
    /// of one hold is the end of all.
    pub(in crate::vmm) fn hold(&self) -> Hold<'_> {
        let mut state = lock(&self.state);
        state.is_held = true;
        self.kick_inside(&state);
        drop(state);
        self.changed.notify_all();
        Hold { gate: self }
    }

    /// Runs `work` while no vCPU is inside, unless that happened already after `since`. The
    /// caller must not hold a [`Pass`]. A vCPU, which cannot go on without, waits without limit (`brief`
    /// is `None`): whoever ends the VM ends that, too.
    pub(in crate::vmm) fn pause_all<T>(
        &self,
        since: u64,
        mut brief: Option<BriefWait>,
        work: impl FnOnce() -> T,
    ) -> Paused<T> {
        let mut state = lock(&self.state);
        loop {
            if state.is_stopping {
                return Paused::Stopping;
            }
            if state.epoch != since {
                return Paused::AlreadyDone;
            }
            if !state.is_closed {
                break;
            }
            let Some(waited) = self.wait_in_time(state, &mut brief) else {
                return Paused::GivenUp;
            };
            state = waited;
        }
        state.is_closed = true;
        let _opener = Opener { gate: self };
        self.kick_inside(&state);
        // Who still comes out of a VM that stops is not waited for here.
        while state.someone_inside() && !state.is_stopping {
            let Some(waited) = self.wait_in_time(state, &mut brief) else {
                return Paused::GivenUp;
            };
            state = waited;
        }
        if state.is_stopping {
            drop(state);
            return Paused::Stopping;
        }
        // From here on nothing that was kept is valid, even if `work` fails half-way.
        state.epoch += 1;
        drop(state);
        Paused::Done(work())
    }

    /// Who kicks each vCPU, by index.
    pub(super) fn kicks(&self) -> &[Arc<dyn Kick>] {
        &self.kicks
    }

    /// How often everybody was paused.
    pub(in crate::vmm) fn epoch(&self) -> u64 {
        lock(&self.state).epoch
    }

    /// Turns every vCPU away from now on, and kicks out those that are inside. Does not wait.
    pub(in crate::vmm) fn stop(&self) {
        let mut state = lock(&self.state);
        state.is_stopping = true;
        self.kick_inside(&state);
        drop(state);
        self.changed.notify_all();
    }

    /// Where each vCPU is, by index.
    pub(in crate::vmm) fn positions(&self) -> Vec<Position> {
        lock(&self.state).positions.clone()
    }

    fn kick_inside(&self, state: &State) {
        for (kick, position) in self.kicks.iter().zip(&state.positions) {
            if *position == Position::Inside {
                kick.kick();
            }
        }
    }
}

/// Opens the gate again, also when the work panics.
struct Opener<'a> {
    gate: &'a Gate,
}

impl Drop for Opener<'_> {
    fn drop(&mut self) {
        lock(&self.gate.state).is_closed = false;
        self.gate.changed.notify_all();
    }
}

#[cfg(test)]
#[path = "gate_tests.rs"]
mod tests;
