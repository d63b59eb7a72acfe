//! Waiting for room in the serial port's queue of input.
//!
//! Guarantee: room that was made after [`Room::generation`] was asked is not missed, and the end of
//! the machine ends every wait.

use std::time::Duration;

use crate::sync::{Condvar, Mutex, lock};

/// A guest that has its port in loopback mode reads input without emptying the queue: look again.
const PATIENCE: Duration = Duration::from_millis(100);

/// See the module's documentation.
#[derive(Default)]
pub(super) struct Room {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    generation: u64,
    is_over: bool,
}

impl Room {
    /// How often room was made so far; `None` once the machine is over.
    pub(super) fn generation(&self) -> Option<u64> {
        let state = lock(&self.state);
        (!state.is_over).then_some(state.generation)
    }

    /// The guest has read all input.
    pub(super) fn made(&self) {
        lock(&self.state).generation += 1;
        self.changed.notify_all();
    }

    /// The machine is over.
    pub(super) fn over(&self) {
        lock(&self.state).is_over = true;
        self.changed.notify_all();
    }

    /// Waits until room was made after `generation`, or it may be time to look again.
    pub(super) fn wait(&self, generation: u64) {
        let state = lock(&self.state);
        if state.generation == generation && !state.is_over {
            drop(self.changed.wait_timeout(state, PATIENCE));
        }
    }
}
