//! What stands in for KVM in the tests of this room.

use std::sync::mpsc;
use std::time::Duration;

use crate::sync::{Condvar, Mutex, lock};

use super::kick::Kick;

/// A vCPU without KVM: "guest mode" is waiting until kicked.
#[derive(Default)]
pub(super) struct FakeKick {
    kicked: Mutex<bool>,
    changed: Condvar,
    attached: Mutex<bool>,
}

impl Kick for FakeKick {
    fn kick(&self) {
        *lock(&self.kicked) = true;
        self.changed.notify_all();
    }

    fn rearm(&self) {
        *lock(&self.kicked) = false;
    }

    fn attach(&self) {
        *lock(&self.attached) = true;
    }

    fn detach(&self) {
        *lock(&self.attached) = false;
    }
}

impl FakeKick {
    pub(super) fn run_until_kicked(&self) {
        let mut kicked = lock(&self.kicked);
        while !*kicked {
            kicked = self.changed.wait(kicked).unwrap();
        }
    }

    /// Whether a kick is yet to be answered.
    pub(super) fn is_kicked(&self) -> bool {
        *lock(&self.kicked)
    }

    /// Whether a thread gets the kicks.
    pub(super) fn is_attached(&self) -> bool {
        *lock(&self.attached)
    }
}

/// Fails the test, rather than hang it, if `body` deadlocks.
pub(super) fn within_a_minute(body: impl FnOnce() + Send + 'static) {
    let (done, wait) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        body();
        let _ = done.send(());
    });
    if wait.recv_timeout(Duration::from_secs(60)) == Err(mpsc::RecvTimeoutError::Timeout) {
        panic!("deadlock");
    }
    thread.join().unwrap();
}
