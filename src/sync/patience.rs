//! How long something may take, in time that this process ran.
//!
//! Guarantee: a process that was stopped (by a signal, a debugger, a frozen cgroup, a host that gave
//! it no processor) has waited no longer for it than before: what is awaited may have come meanwhile,
//! and is looked at before the time is up.
//!
//! The kernel does not tell a process when it was stopped, so whoever waits does so in slices, and
//! no more than [`MOST_SLICES`] of them count for one: of a longer time, the rest was not this thread's.

use std::time::{Duration, Instant};

/// Longest time to wait in one go.
const SLICE: Duration = Duration::from_millis(20);
/// Slices that count for one. A processor that others use as well makes a thread late by some.
const MOST_SLICES: u32 = 2;

/// See the module's documentation.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    left: Duration,
    last: Instant,
}

impl Patience {
    /// From now on.
    #[must_use]
    pub fn new(limit: Duration) -> Self {
        Self::at(limit, Instant::now())
    }

    /// From `now` on: for tests, which make their own time.
    #[must_use]
    pub const fn at(limit: Duration, now: Instant) -> Self {
        Self { left: limit, last: now }
    }

    /// How long to wait at most before the next look; `None` once the time is up.
    pub fn slice(&mut self) -> Option<Duration> {
        self.slice_at(Instant::now())
    }

    /// As [`slice`](Self::slice), in the caller's own time.
    pub fn slice_at(&mut self, now: Instant) -> Option<Duration> {
        let passed = now.saturating_duration_since(self.last).min(MOST_SLICES * SLICE);
        self.last = now;
        self.left = self.left.saturating_sub(passed);
        (!self.left.is_zero()).then(|| self.left.min(SLICE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(1);

    /// Waits as callers do; `late` is added to each wait. Returns what passed, and the number of looks.
    fn wait_out(limit: Duration, mut late: impl FnMut(u32) -> Duration) -> (Duration, u32) {
        let begun = Instant::now();
        let mut now = begun;
        let mut patience = Patience::at(limit, now);
        let mut looks = 0;
        while let Some(slice) = patience.slice_at(now) {
            now += slice + late(looks);
            looks += 1;
        }
        (now - begun, looks)
    }

    #[test]
    fn a_process_that_runs_waits_as_long_as_is_said() {
        assert_eq!(wait_out(LIMIT, |_| Duration::ZERO).0, LIMIT);
        assert_eq!(wait_out(Duration::from_millis(7), |_| Duration::ZERO).0.as_millis(), 7);
        assert_eq!(wait_out(Duration::ZERO, |_| Duration::ZERO), (Duration::ZERO, 0));
        // A little late each time, as on a busy processor: no longer for that.
        let (passed, _) = wait_out(LIMIT, |_| SLICE);
        assert!(passed <= LIMIT + SLICE, "{passed:?}");
    }

    #[test]
    fn time_in_which_the_process_was_stopped_does_not_count() {
        let hour = Duration::from_secs(3600);
        for stopped_at in [0, 1, 10, 40] {
            let late = |look| if look == stopped_at { hour } else { Duration::ZERO };
            let (passed, looks) = wait_out(LIMIT, late);
            // One slice more may be gone, and the rest is still there.
            assert!(looks + MOST_SLICES >= 50 && looks <= 50, "{looks}");
            assert!(passed >= hour + LIMIT - MOST_SLICES * SLICE, "{passed:?}");
        }
    }
}
