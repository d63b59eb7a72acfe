//! How long something may take, in time that this process ran.
//!
//! Guarantee: a process that was stopped (by a signal, a debugger, a frozen cgroup, a host that gave
//! it no processor) has waited no longer for it than before: what is awaited may have come meanwhile,
//! and is looked at before the time is up.
//!
//! The kernel does not tell a process when it was stopped, so whoever waits does so in slices, and
//! no more than [`MOST_SLICES`] of them count for one: of a longer time, the rest was not this thread's.
//! For one who has work to do between two looks, which counts, that is [`MOST_WORK`].

use std::time::{Duration, Instant};

/// Longest time to wait in one go.
const SLICE: Duration = Duration::from_millis(20);
/// Slices that count for one. A processor that others use as well makes a thread late by some.
const MOST_SLICES: u32 = 2;
/// Longest time between two looks that counts where there is work to do: a fraction of what such a one
/// waits for, and more than the work takes.
const MOST_WORK: Duration = Duration::from_secs(2);

/// How long something may take, in time that this process ran: a stop by a signal, a debugger or a frozen
/// group of processes does not count.
///
/// ```
/// use std::sync::mpsc;
/// use std::time::Duration;
///
/// use gnomon_sys::Patience;
///
/// let (sender, receiver) = mpsc::channel();
/// std::thread::spawn(move || sender.send("answer"));
/// let mut patience = Patience::new(Duration::from_secs(60));
/// let answer = loop {
///     let Some(slice) = patience.slice() else { break None };
///     if let Ok(answer) = receiver.recv_timeout(slice) {
///         break Some(answer);
///     }
/// };
/// assert_eq!(answer, Some("answer"));
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    left: Duration,
    last: Instant,
    /// Longest time between two looks that counts.
    most: Duration,
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
        Self { left: limit, last: now, most: SLICE.saturating_mul(MOST_SLICES) }
    }

    /// From `now` on, for one who works between looks.
    #[must_use]
    pub const fn at_work(limit: Duration, now: Instant) -> Self {
        Self { left: limit, last: now, most: MOST_WORK }
    }

    /// How long to wait at most before the next look; `None` once the time is up.
    pub fn slice(&mut self) -> Option<Duration> {
        self.slice_at(Instant::now())
    }

    /// As [`slice`](Self::slice), in the caller's own time.
    pub fn slice_at(&mut self, now: Instant) -> Option<Duration> {
        let passed = now.saturating_duration_since(self.last).min(self.most);
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
    fn wait_out(limit: Duration, late: impl FnMut(u32) -> Duration) -> (Duration, u32) {
        let now = Instant::now();
        wait_out_of(Patience::at(limit, now), now, late)
    }

    fn wait_out_of(
        mut patience: Patience,
        begun: Instant,
        mut late: impl FnMut(u32) -> Duration,
    ) -> (Duration, u32) {
        let mut now = begun;
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
    fn what_is_done_between_looks_counts_and_a_stop_hardly_does() {
        let now = Instant::now();
        let limit = Duration::from_secs(60);
        let at_work = || Patience::at_work(limit, now);
        // A second of work at each look.
        let work = Duration::from_secs(1);
        let (passed, _) = wait_out_of(at_work(), now, |_| work);
        assert!((limit..=limit + work + SLICE).contains(&passed), "{passed:?}");
        let hour = Duration::from_secs(3600);
        let (passed, looks) =
            wait_out_of(at_work(), now, |look| if look == 3 { hour } else { Duration::ZERO });
        assert!(passed >= hour + limit - MOST_WORK, "{passed:?}");
        assert!(u128::from(looks) * SLICE.as_millis() >= (limit - MOST_WORK).as_millis());
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
