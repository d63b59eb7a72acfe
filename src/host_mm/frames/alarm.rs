//! Frames are short: who is told, and sleeps until then.

use std::sync::{Condvar, Mutex};

use crate::sync::lock;

/// Wakes and stops the thread of background reclaim.
#[derive(Debug, Default)]
pub(in crate::host_mm) struct Alarm {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    woken: bool,
    stopped: bool,
}

impl Alarm {
    pub(in crate::host_mm) fn wake(&self) {
        let mut state = lock(&self.state);
        if !state.woken {
            state.woken = true;
            self.changed.notify_one();
        }
    }

    pub(in crate::host_mm) fn stop(&self) {
        lock(&self.state).stopped = true;
        self.changed.notify_one();
    }

    pub(in crate::host_mm) fn is_stopped(&self) -> bool {
        lock(&self.state).stopped
    }

    /// Sleeps until woken; `false` when it is time to end.
    pub(in crate::host_mm) fn wait(&self) -> bool {
        let mut state = lock(&self.state);
        while !state.woken && !state.stopped {
            state = self.changed.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        state.woken = false;
        !state.stopped
    }
}
