//! The run of a guest under `gnomon boot`, whatever kind of guest it is: its start, the wait for its end, the
//! checks, and how all that is told.
//!
//! Guarantee: a signal, or the user at the console, ends the guest whatever it does; what can be checked is
//! checked then, and what cannot is said; the exit code is the guest's own, or says that it was ended by a
//! signal or that something is wrong.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::ending::{self, Ending, TICK};
use super::output::{self, StdoutConsole, printable};
use super::{EXIT_FAILURE, exit_code_of_signal};
use crate::host_mm::{HostMm, MemoryObject};
use crate::lab::text::human_count;
use crate::lab::{Injected, Violations, cut_short, wait_for};
use crate::vmm::Outcome;

/// Time for vCPU threads to end after a kill.
const KILL_TIMEOUT: Duration = Duration::from_secs(30);
/// Violations that are shown in full.
const SHOWN: usize = 20;

/// A guest with all that belongs to its run.
pub(crate) trait Guest {
    /// Starts it, and whatever is to happen beside it.
    ///
    /// # Errors
    /// If a thread cannot be started.
    fn start(&mut self) -> anyhow::Result<()>;

    /// Waits for its end for so long. Called again and again.
    fn wait(&mut self, timeout: Duration) -> Option<Outcome>;

    /// Ends it. Does not wait.
    fn kill(&mut self);

    /// What is to be done between two looks for its end.
    fn tend(&mut self) {}

    /// Whether the user has ended it at its console.
    fn is_ended_by_user(&self) -> bool {
        false
    }

    /// It is over: whatever happens beside it is to stop. A vCPU that hangs (`is_at_rest` is false) may do
    /// so in a device.
    fn settle(&mut self, _is_at_rest: bool) {}

    /// Everything that the checks have found; all of it if it is at rest.
    fn check(&self, is_at_rest: bool) -> Violations;

    /// Its host memory.
    fn host_mm(&self) -> &Arc<HostMm>;

    /// Its own memory.
    fn memory(&self) -> impl Iterator<Item = &Arc<MemoryObject>>;

    /// How it went, in figures: a line for each.
    fn figures(&self) -> Vec<String>;

    /// What else there was: a line for each.
    fn troubles(&self) -> Vec<String> {
        Vec::new()
    }

    /// Bytes of its console that could not be written.
    fn lost_console_bytes(&self) -> u64;
}

/// How a run ended.
pub(crate) enum End {
    /// By the guest, or by something that went wrong.
    Outcome(Outcome),
    /// By a signal.
    Signal(i32),
    /// By the user at the console.
    Typed,
    /// A vCPU did not stop; the signal that asked for the end, if one did.
    Stuck(Option<i32>),
}

/// Starts the guest, stays with it to its end and tells how it went; returns the exit code.
///
/// # Errors
/// If it cannot be started.
pub(crate) fn to_the_end(
    mut guest: impl Guest,
    ending: &Ending,
    screen: &StdoutConsole,
) -> anyhow::Result<u8> {
    let begun = Instant::now();
    guest.start()?;
    ending.phase("running the guest");
    let give_up = || {
        ending.phase("waiting for the vCPUs to stop");
        screen.give_up();
    };
    let end = wait(&mut guest, || ending.signal(), give_up);
    let elapsed = begun.elapsed();
    guest.settle(!end.is_stuck());
    ending.phase("checking what is left");

    let mut found = guest.check(!end.is_stuck());
    let injected = conclude(&end, guest.host_mm(), guest.memory(), &mut found);
    let told = [summary(&end, elapsed, guest.figures()), injected, guest.troubles()];
    told.into_iter().flatten().for_each(output::note);
    let lost = guest.lost_console_bytes();
    complaints(&found, lost, ending.signal()).into_iter().for_each(output::note);
    ending::let_go(guest);
    Ok(end.exit_code(&found))
}

/// Waits for the end of the guest, a signal, or the user's word, before whose execution `give_up` is called.
fn wait(guest: &mut impl Guest, signal: impl Fn() -> Option<i32>, give_up: impl FnOnce()) -> End {
    loop {
        guest.tend();
        if let Some(outcome) = guest.wait(TICK) {
            return End::Outcome(outcome);
        }
        let asked = match signal() {
            Some(signal) => End::Signal(signal),
            None if guest.is_ended_by_user() => End::Typed,
            None => continue,
        };
        give_up();
        guest.kill();
        return match wait_for(KILL_TIMEOUT, |tick| guest.wait(tick)) {
            Some(Outcome::Killed) => asked,
            // It was faster.
            Some(outcome) => End::Outcome(outcome),
            None => End::Stuck(signal()),
        };
    }
}

impl End {
    fn sentence(&self) -> String {
        match self {
            Self::Outcome(outcome) => how_it_ended(outcome),
            Self::Signal(signal) => format!("the guest was ended by signal {signal}"),
            Self::Typed => "the guest was ended by Ctrl-A x".to_owned(),
            Self::Stuck(Some(signal)) => {
                format!("the guest was ended by signal {signal}, before all its vCPUs had stopped")
            }
            Self::Stuck(None) => {
                format!("a vCPU did not stop within {} s of being killed", KILL_TIMEOUT.as_secs())
            }
        }
    }

    fn is_stuck(&self) -> bool {
        matches!(self, Self::Stuck(_))
    }

    /// Whether it was not the guest's own end: it may have had no time for what was asked for.
    fn is_early(&self) -> bool {
        !matches!(
            self,
            Self::Outcome(Outcome::PoweredOff | Outcome::Rebooted | Outcome::Halted)
                | Self::Outcome(Outcome::GuestExit(_))
        )
    }

    pub(super) fn exit_code(&self, found: &Violations) -> u8 {
        let code = match self {
            Self::Outcome(outcome) => outcome.exit_code(),
            Self::Signal(signal) | Self::Stuck(Some(signal)) => {
                return exit_code_of_signal(*signal);
            }
            Self::Typed => 0,
            Self::Stuck(None) => EXIT_FAILURE,
        };
        if code == 0 && found.total > 0 { EXIT_FAILURE } else { code }
    }
}

/// How it ended, and how it went until then.
pub(super) fn summary(end: &End, elapsed: Duration, figures: Vec<String>) -> Vec<String> {
    let ended = format!("{} after {:.2} s", end.sentence(), elapsed.as_secs_f64());
    std::iter::once(ended).chain(figures).collect()
}

fn how_it_ended(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Killed => "the guest was ended".to_owned(),
        Outcome::PoweredOff => "the guest powered off".to_owned(),
        Outcome::Rebooted => "the guest rebooted, which ends it".to_owned(),
        Outcome::GuestExit(code) => format!("the guest ended with exit code {code}"),
        Outcome::Halted => "every vCPU halted".to_owned(),
        Outcome::Failed(error) => format!("the guest was ended: {}", printable(&error.to_string())),
    }
}

/// Ends the injection: what is to be told of it. What is wrong is added to `found`. Nothing of it if a
/// vCPU still runs.
pub(super) fn conclude<'a>(
    end: &End,
    mm: &HostMm,
    memory: impl IntoIterator<Item = &'a Arc<MemoryObject>>,
    found: &mut Violations,
) -> Vec<String> {
    if end.is_stuck() {
        return Vec::new();
    }
    let Some(injected) = Injected::conclude(mm, memory) else {
        return Vec::new();
    };
    injected.add_violations(found, end.is_early());
    injected.lines()
}

fn complaints(found: &Violations, lost_console_bytes: u64, signal: Option<i32>) -> Vec<String> {
    let sentence = signal.and_then(|signal| cut_short(signal, &found.unchecked));
    let mut lines: Vec<String> = sentence.into_iter().collect();
    if lost_console_bytes > 0 {
        lines.push(format!(
            "{} bytes of the guest's console could not be written to standard output",
            human_count(lost_console_bytes)
        ));
    }
    if found.total > 0 {
        lines.push(format!("violations: {}", human_count(found.total)));
    }
    let shown = found.first.iter().take(SHOWN);
    lines.extend(shown.map(|violation| printable(&violation.text)));
    lines
}

#[cfg(test)]
#[path = "run_tests.rs"]
mod tests;
