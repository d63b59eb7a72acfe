//! Whoever has asked for a run: may end it, and is told how it goes.

use std::time::Duration;

use super::judge::Advice;
use crate::sys::{Patience, signal};

/// See the module's documentation.
pub trait Watch {
    /// The signal that asks for the end, if one does. Asked many times a second.
    fn signal(&self) -> Option<i32>;

    /// What the run is at now, in words that follow "while".
    fn phase(&self, phase: &'static str);

    /// The first violation was found.
    fn note_failure(&self);

    /// How the run goes. Told many times a second.
    fn status(&self, status: &Status);

    /// What to say of an error that is the host's limit.
    fn advice(&self) -> Advice;
}

/// How a run goes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Status {
    /// Time since it began.
    pub elapsed: Duration,
    /// Whether the last sweep has begun.
    pub sweeping: bool,
    /// Page accesses that the guest has checked.
    pub verified: u64,
    /// Shadow faults fixed.
    pub faults: u64,
    /// Pages evicted.
    pub evictions: u64,
    /// Bytes that frames take up.
    pub resident_bytes: u64,
    /// Violations found.
    pub violations: u64,
}

/// Looks again and again, waiting a moment each time, until there is something or the time is over: after
/// `limit`, in which this process ran, or when patience ends after a signal.
pub fn wait_for<T>(limit: Duration, mut look: impl FnMut(Duration) -> Option<T>) -> Option<T> {
    let mut patience = Patience::new(limit);
    loop {
        let slice = patience.slice();
        let found = look(slice.unwrap_or_default());
        if found.is_some() || signal::is_patience_over() || slice.is_none() {
            return found;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_ends_with_the_limit_or_after_a_signal() {
        assert_eq!(wait_for(Duration::ZERO, Some), Some(Duration::ZERO), "one look there is");
        let mut looks = 0;
        let mut never = |_| -> Option<()> {
            looks += 1;
            None
        };
        assert_eq!(wait_for(Duration::ZERO, &mut never), None);
        {
            let _stop = signal::pretended::Stop::after(3);
            assert_eq!(wait_for(Duration::from_secs(3600), &mut never), None);
        }
        assert_eq!(looks, 1 + 4);
    }
}
