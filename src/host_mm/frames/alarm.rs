//! Frames are short: who is told and works until they are not, and who holds that back.
//!
//! Guarantee: no round of work begins while somebody has [quiet](Quiet), and none is under way any
//! more when they have got it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use gnomon_export_rmap::sync::{Condvar, Mutex, MutexGuard, lock};
use gnomon_sys::signal;

/// Time between looks whether patience is over.
const TICK: Duration = Duration::from_millis(1);

/// Wakes and ends the threads of background reclaim.
#[derive(Debug, Default)]
pub(crate) struct Alarm {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    woken: bool,
    /// Rounds of work under way.
    rounds: u32,
    /// Those who have quiet, or wait for it.
    held: u32,
}

impl Alarm {
    pub(crate) fn wake(&self) {
        let mut state = lock(&self.state);
        if !state.woken {
            state.woken = true;
            self.changed.notify_all();
        }
    }

    /// Ends those who look at `over`.
    pub(crate) fn end(&self, over: &AtomicBool) {
        // Under the lock, so that nobody misses it between a look and their sleep.
        let _state = lock(&self.state);
        over.store(true, Ordering::Relaxed);
        self.changed.notify_all();
    }

    /// Sleeps until there is work and nobody has quiet; `None` when it is time to end.
    pub(crate) fn round(&self, over: &AtomicBool) -> Option<Round<'_>> {
        let mut state = lock(&self.state);
        loop {
            if over.load(Ordering::Relaxed) {
                return None;
            }
            if let Some(round) = self.begin(&mut state) {
                return Some(round);
            }
            state = self.changed.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
    }

    fn begin(&self, state: &mut State) -> Option<Round<'_>> {
        if !state.woken || state.held > 0 {
            return None;
        }
        state.woken = false;
        state.rounds += 1;
        Some(Round { alarm: self })
    }

    /// Lets no round begin, and waits for those under way; not for ever, once a stop was asked for and
    /// [patience is over](signal::is_patience_over): then nobody compares anything any more.
    pub(crate) fn quiet(&self) -> Quiet<'_> {
        let mut state = lock(&self.state);
        state.held += 1;
        while state.rounds > 0 && !signal::is_patience_over() {
            state = self.wait_a_moment(state);
        }
        Quiet { alarm: self }
    }

    fn wait_a_moment<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait_timeout(state, TICK).unwrap_or_else(|poisoned| poisoned.into_inner()).0
    }
}

/// A round of work.
pub(crate) struct Round<'a> {
    alarm: &'a Alarm,
}

impl Round<'_> {
    /// Whether to go on: somebody may wait for the round's end.
    pub(crate) fn goes_on(&self, over: &AtomicBool) -> bool {
        !over.load(Ordering::Relaxed) && lock(&self.alarm.state).held == 0
    }
}

impl Drop for Round<'_> {
    fn drop(&mut self) {
        lock(&self.alarm.state).rounds -= 1;
        self.alarm.changed.notify_all();
    }
}

/// No background reclaim of one host memory, as long as this lives: pages stay where they are, but for
/// what faults and other sources do. What compares places asks for it as a proof.
#[derive(Debug)]
#[must_use = "background reclaim goes on when this is dropped"]
pub struct Quiet<'a> {
    alarm: &'a Alarm,
}

impl Quiet<'_> {
    pub(crate) fn is_of(&self, alarm: &Alarm) -> bool {
        std::ptr::eq(self.alarm, alarm)
    }
}

impl Drop for Quiet<'_> {
    fn drop(&mut self) {
        lock(&self.alarm.state).held -= 1;
        self.alarm.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_round_begins_while_somebody_has_quiet() {
        let alarm = Alarm::default();
        let begin = || {
            // Not to be dropped under the lock.
            let round = alarm.begin(&mut lock(&alarm.state));
            round.is_some()
        };
        assert!(!begin(), "nobody has woken it");
        alarm.wake();
        let (quiet, other) = (alarm.quiet(), alarm.quiet());
        assert!(!begin());
        drop(other);
        assert!(!begin());
        drop(quiet);
        assert!(begin() && !begin(), "once for one call");
    }

    #[test]
    fn a_round_is_told_of_who_waits_for_its_end_and_wakes_them() {
        let (alarm, over) = (Alarm::default(), AtomicBool::new(false));
        alarm.wake();
        let round = alarm.round(&over).unwrap();
        assert!(round.goes_on(&over));
        std::thread::scope(|scope| {
            let quiet = scope.spawn(|| alarm.quiet());
            while round.goes_on(&over) {
                std::thread::yield_now();
            }
            drop(round);
            let quiet = quiet.join().unwrap();
            alarm.wake();
            let next = scope.spawn(|| alarm.round(&over).is_some());
            drop(quiet);
            assert!(next.join().unwrap());
        });
    }

    #[test]
    fn who_is_to_end_ends_though_somebody_has_quiet() {
        let (alarm, over) = (Alarm::default(), AtomicBool::new(false));
        let _quiet = alarm.quiet();
        alarm.wake();
        std::thread::scope(|scope| {
            let sleeper = scope.spawn(|| alarm.round(&over).is_none());
            alarm.end(&over);
            assert!(sleeper.join().unwrap());
        });
    }

    /// It waits for the round as long as there is patience, and a thread that cannot end its round does
    /// not hold up an end that is to be quick.
    #[test]
    fn quiet_waits_for_the_round_under_way_until_patience_is_over() {
        let (alarm, over) = (Alarm::default(), AtomicBool::new(false));
        alarm.wake();
        let round = alarm.round(&over).unwrap();
        {
            let _stop = signal::pretended::Stop::after(3);
            drop(alarm.quiet());
            assert!(signal::is_patience_over(), "it waited for no less");
        }
        drop(round);
        let _stop = signal::pretended::Stop::after(1);
        drop(alarm.quiet());
        assert!(!signal::is_patience_over(), "there was nothing to wait for");
    }
}
