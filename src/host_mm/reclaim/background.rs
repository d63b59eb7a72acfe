//! The reclaim thread: from below the low watermark of free frames up to the high one.

use std::io;
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::thread::JoinHandle;

use crate::host_mm::HostMm;
use crate::sync::lock;

/// Wakes and stops the thread.
#[derive(Debug, Default)]
pub(super) struct Signal {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    woken: bool,
    stopped: bool,
}

impl Signal {
    pub(super) fn wake(&self) {
        let mut state = lock(&self.state);
        if !state.woken {
            state.woken = true;
            self.changed.notify_one();
        }
    }

    pub(super) fn stop(&self) {
        lock(&self.state).stopped = true;
        self.changed.notify_one();
    }

    fn is_stopped(&self) -> bool {
        lock(&self.state).stopped
    }

    /// Sleeps until woken; `false` when it is time to end.
    fn wait(&self) -> bool {
        let mut state = lock(&self.state);
        while !state.woken && !state.stopped {
            state = self.changed.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        state.woken = false;
        !state.stopped
    }
}

pub(super) fn spawn(mm: &Arc<HostMm>, signal: &Arc<Signal>) -> io::Result<JoinHandle<()>> {
    // Weak: the thread must not keep alive what it works for.
    let (mm, signal) = (Arc::downgrade(mm), signal.clone());
    std::thread::Builder::new().name("gnomon-reclaim".to_owned()).spawn(move || {
        while signal.wait() {
            let Some(mm) = Weak::upgrade(&mm) else { return };
            refill(&mm, &signal);
        }
    })
}

/// Reclaims until the high watermark is reached, or a round gets nothing: then it is for the fault
/// that needs a frame to find out why.
fn refill(mm: &HostMm, signal: &Signal) {
    while !signal.is_stopped() {
        let missing = mm.free.missing() as usize;
        if missing == 0 {
            return;
        }
        mm.counters.background_reclaims.add(1);
        if mm.reclaim(missing).frames == 0 {
            return;
        }
    }
}
