//! When a thread is at work. It wakes who waits for a page before it is done with all that belongs to
//! the fault: pages read ahead, counters.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::sys::signal;

/// The turns of one thread: their number is odd while one is under way.
#[derive(Debug, Default)]
pub(super) struct Turns(AtomicU64);

/// A turn that is under way; it ends with this.
pub(super) struct Turn<'a>(&'a Turns);

impl Turns {
    /// By the one thread whose turns they are.
    pub(super) fn begin(&self) -> Turn<'_> {
        // Before anybody is woken in this turn: whoever is woken by the kernel comes after it.
        self.0.fetch_add(1, Ordering::SeqCst);
        Turn(self)
    }

    /// Waits for the end of the turn that is under way, if one is; not for those that follow, and not
    /// beyond the [end of patience](signal::is_patience_over). Not for the thread itself.
    pub(super) fn await_end(&self) {
        // Acquire pairs with the Release of the end: what the turn did is seen.
        let now = self.0.load(Ordering::Acquire);
        while !now.is_multiple_of(2)
            && self.0.load(Ordering::Acquire) == now
            && !signal::is_patience_over()
        {
            std::thread::yield_now();
        }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.0.fetch_add(1, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;

    #[test]
    fn a_turn_that_is_under_way_is_waited_for() {
        let (turns, done) = (Turns::default(), AtomicBool::new(false));
        turns.await_end();
        let turn = turns.begin();
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| {
                turns.await_end();
                done.load(Ordering::Relaxed)
            });
            std::thread::sleep(std::time::Duration::from_millis(20));
            done.store(true, Ordering::Relaxed);
            drop(turn);
            assert!(waiter.join().unwrap());
        });
        turns.await_end();
    }
}
