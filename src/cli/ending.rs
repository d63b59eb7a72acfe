//! The end of a run that a signal asks for.
//!
//! Guarantee: within [`LIMIT`] after the first signal the process is over, whatever its threads are in
//! (a disk that does not answer, a reader that does not read, a bug of ours), with the exit code that
//! the signal has; and what would be left over in the file system is gone. What has to be waited for is
//! given up before that, see [`STOP_PATIENCE`](signal::STOP_PATIENCE), so that a run tells itself what
//! it has come to. A second signal ([`SECOND_AFTER`](signal::SECOND_AFTER) later or more) ends the process
//! at once, without a word ([`StopNotice`]).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::{EXIT_FAILURE, exit_code_of_signal, output};
use crate::sync::{Mutex, lock};
use crate::sys::names;
use crate::sys::signal::{self, StopNotice};
use crate::sys::threads;

/// Time from the first signal to the end of the process.
pub(crate) const LIMIT: Duration = Duration::from_millis(1500);
/// The same while there is nothing yet that could be told: a large guest takes seconds to make.
const LIMIT_BEFORE: Duration = Duration::from_millis(200);

/// Time between looks for a signal while something is waited for.
pub(crate) const TICK: Duration = Duration::from_millis(50);

/// A run that a signal may end. Installed before anything is made that the end has to do with.
#[derive(Clone)]
pub(crate) struct Ending {
    stop: StopNotice,
    phase: Arc<Mutex<Option<&'static str>>>,
    has_failed: Arc<AtomicBool>,
}

impl Ending {
    /// Takes over the signals, and watches over the end from now on.
    ///
    /// # Errors
    /// If the signals cannot be taken over, or the host has no thread left.
    pub(crate) fn install() -> anyhow::Result<Self> {
        let stop = StopNotice::install()?;
        let ending = Self { stop, phase: Arc::default(), has_failed: Arc::default() };
        let watched = ending.clone();
        threads::start("end", "the end that a signal asks for", move || watched.watch())?;
        Ok(ending)
    }

    /// The signal that asked for the end, if one has.
    pub(crate) fn signal(&self) -> Option<i32> {
        self.stop.signal()
    }

    /// What the run is at now, in words that follow "while". Before the first it has not begun.
    pub(crate) fn phase(&self, phase: &'static str) {
        *lock(&self.phase) = Some(phase);
    }

    /// A violation was found: that is the exit code, also if there is no time to tell more.
    pub(crate) fn note_failure(&self) {
        // Relaxed: nothing else is told by it.
        self.has_failed.store(true, Ordering::Relaxed);
    }

    fn watch(&self) {
        // If it cannot be waited for, a second signal is left to the user.
        let Ok(true) = self.stop.wait(None) else { return };
        let phase = loop {
            let (phase, since) = (*lock(&self.phase), self.stop.since().unwrap_or_default());
            if since >= if phase.is_some() { LIMIT } else { LIMIT_BEFORE } {
                break phase;
            }
            std::thread::sleep(TICK);
        };
        let signal = self.stop.signal().unwrap_or_default();
        names::remove_all();
        output::last_word(match phase {
            None => format!("ended by signal {signal} before it had begun"),
            Some(phase) => format!(
                "ended by signal {signal}, and cut short {:.1} s after it while {phase}: nothing more is checked or told",
                LIMIT.as_secs_f64(),
            ),
        });
        signal::exit_now(match self.has_failed.load(Ordering::Relaxed) {
            true => EXIT_FAILURE,
            false => exit_code_of_signal(signal),
        });
    }
}

/// Drops what takes time in proportion to a guest's memory, unless the end is to be quick: the kernel
/// takes everything back by itself, and faster.
pub(crate) fn let_go<T>(what: T) {
    match signal::is_stop_asked() {
        true => std::mem::forget(what),
        false => drop(what),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_things_are_not_taken_apart_at_a_quick_end() {
        let shared = Arc::new(());
        let_go(shared.clone());
        assert_eq!(Arc::strong_count(&shared), 1);
        let _stop = signal::pretended::Stop::after(0);
        let_go(shared.clone());
        assert_eq!(Arc::strong_count(&shared), 2);
    }
}
