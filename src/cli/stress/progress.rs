//! The line that tells how a run goes: on a terminal it changes in place, elsewhere there is a new
//! one every few seconds.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::cli::output;
use crate::lab::Status;
use crate::lab::text::{human_bytes, human_count};

/// Time between lines where standard error is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(5);
/// Changes a second on a terminal.
const REDRAWS_PER_SECOND: u8 = 5;

/// What is told of a run that is to take so long before its last sweep.
fn line(status: &Status, duration: Duration) -> String {
    format!(
        "{:.0} of {:.0} s{}: {} accesses verified, {} faults, {} evictions, {} resident, {} violations",
        status.elapsed.as_secs_f64(),
        duration.as_secs_f64(),
        if status.sweeping { ", last sweep" } else { "" },
        human_count(status.verified),
        human_count(status.faults),
        human_count(status.evictions),
        human_bytes(status.resident_bytes),
        human_count(status.violations),
    )
}

/// See the module's documentation.
pub(super) struct Progress {
    duration: Duration,
    /// `None` without a terminal.
    bar: Option<ProgressBar>,
    /// When the next line is due where there is no terminal.
    next_line: Duration,
}

impl Progress {
    /// Of a run that is to take so long before its last sweep.
    pub(super) fn new(duration: Duration) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| bar(duration));
        Self { duration, bar, next_line: LINE_INTERVAL }
    }

    /// Shows the status, if it is time to.
    pub(super) fn show(&mut self, status: &Status) {
        match &self.bar {
            Some(bar) => {
                bar.set_position(millis(status.elapsed.min(self.duration)));
                bar.set_message(line(status, self.duration));
            }
            None if status.elapsed >= self.next_line => {
                self.next_line = status.elapsed + LINE_INTERVAL;
                output::note(line(status, self.duration));
            }
            None => {}
        }
    }

    /// Takes the line away.
    pub(super) fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn bar(duration: Duration) -> ProgressBar {
    let target = ProgressDrawTarget::stderr_with_hz(REDRAWS_PER_SECOND);
    let bar = ProgressBar::with_draw_target(Some(millis(duration)), target);
    // The template is a constant; were it not one, the default style would do.
    if let Ok(style) = ProgressStyle::with_template("{bar:24} {wide_msg}") {
        bar.set_style(style);
    }
    bar
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_tells_time_work_and_violations() {
        let mut status = Status {
            elapsed: Duration::from_secs(12),
            verified: 1_234_567,
            faults: 89,
            evictions: 5,
            resident_bytes: 128 << 20,
            violations: 1,
            sweeping: false,
        };
        let told = line(&status, Duration::from_secs(30));
        assert_eq!(
            told,
            "12 of 30 s: 1,234,567 accesses verified, 89 faults, 5 evictions, 128 MiB resident, 1 violations"
        );
        status.sweeping = true;
        status.elapsed = Duration::from_secs(31);
        let told = line(&status, Duration::from_secs(30));
        assert!(told.starts_with("31 of 30 s, last sweep: "), "{told}");
    }
}
