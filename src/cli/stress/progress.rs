//! The line that tells how a run goes: on a terminal it changes in place, elsewhere there is a new
//! one every few seconds.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::cli::output;
use crate::cli::values::{human_bytes, human_count};

/// Time between lines where standard error is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(5);
/// Changes a second on a terminal.
const REDRAWS_PER_SECOND: u8 = 5;

/// What the line tells.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Status {
    /// Whether the last sweep has begun.
    pub(crate) sweeping: bool,
    /// Page accesses that the guest has checked.
    pub(crate) verified: u64,
    /// Shadow faults fixed.
    pub(crate) faults: u64,
    /// Pages evicted.
    pub(crate) evictions: u64,
    /// Bytes that frames take up.
    pub(crate) resident_bytes: u64,
    /// Violations found.
    pub(crate) violations: u64,
}

impl Status {
    fn line(&self, elapsed: Duration, duration: Duration) -> String {
        format!(
            "{:.0} of {:.0} s{}: {} accesses verified, {} faults, {} evictions, {} resident, {} violations",
            elapsed.as_secs_f64(),
            duration.as_secs_f64(),
            if self.sweeping { ", last sweep" } else { "" },
            human_count(self.verified),
            human_count(self.faults),
            human_count(self.evictions),
            human_bytes(self.resident_bytes),
            human_count(self.violations),
        )
    }
}

/// See the module's documentation.
pub(crate) struct Progress {
    begun: Instant,
    duration: Duration,
    /// `None` without a terminal.
    bar: Option<ProgressBar>,
    next_line: Instant,
}

impl Progress {
    /// Begins now.
    pub(crate) fn new(duration: Duration) -> Self {
        let begun = Instant::now();
        let bar = std::io::stderr().is_terminal().then(|| bar(duration));
        Self { begun, duration, bar, next_line: begun + LINE_INTERVAL }
    }

    /// Shows the status, if it is time to.
    pub(crate) fn show(&mut self, status: &Status) {
        let now = Instant::now();
        let elapsed = now - self.begun;
        match &self.bar {
            Some(bar) => {
                bar.set_position(millis(elapsed.min(self.duration)));
                bar.set_message(status.line(elapsed, self.duration));
            }
            None if now >= self.next_line => {
                self.next_line = now + LINE_INTERVAL;
                output::note(status.line(elapsed, self.duration));
            }
            None => {}
        }
    }

    /// Takes the line away.
    pub(crate) fn end(&self) {
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
            verified: 1_234_567,
            faults: 89,
            evictions: 5,
            resident_bytes: 128 << 20,
            violations: 1,
            sweeping: false,
        };
        let line = status.line(Duration::from_secs(12), Duration::from_secs(30));
        assert_eq!(
            line,
            "12 of 30 s: 1,234,567 accesses verified, 89 faults, 5 evictions, 128 MiB resident, 1 violations"
        );
        status.sweeping = true;
        let line = status.line(Duration::from_secs(31), Duration::from_secs(30));
        assert!(line.starts_with("31 of 30 s, last sweep: "), "{line}");
    }
}
