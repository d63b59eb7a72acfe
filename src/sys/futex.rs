//! Sleeping on a word of this process's memory.
//!
//! Guarantee: a [`wake`] after the word was changed ends every [`wait`] that began with the old
//! value. A wait may also end for no reason: callers look at the word again, in a loop.

use std::sync::atomic::AtomicU32;

/// Sleeps until a [`wake`] on the word, unless it does not hold `expected`. The kernel compares and
/// goes to sleep as one step with regard to `wake`, so a change made before a wake is never missed.
/// May return without cause.
pub fn wait(word: &AtomicU32, expected: u32) {
    // SAFETY: the borrow keeps the word valid while the kernel reads it, which it does atomically.
    // A null timeout means none. The other arguments are not used by FUTEX_WAIT.
    let _ = unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
            expected,
            std::ptr::null::<libc::timespec>(),
        )
    };
    // The result is not needed: EAGAIN (another value) and EINTR are the spurious wake that the
    // contract allows, and a valid, aligned word has no other.
}

/// Wakes at most `count` of the threads that sleep on the word. Returns how many.
pub fn wake(word: &AtomicU32, count: u32) -> usize {
    let count = i32::try_from(count).unwrap_or(i32::MAX);
    // SAFETY: FUTEX_WAKE with the private flag takes the address as a key and does not access it.
    let woken = unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG,
            count,
        )
    };
    // Fails only for an invalid address.
    usize::try_from(woken).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::Ordering;

    #[test]
    fn wait_returns_at_once_when_the_value_differs() {
        wait(&AtomicU32::new(1), 0);
    }

    #[test]
    fn wake_without_sleepers_wakes_none() {
        assert_eq!(wake(&AtomicU32::new(0), u32::MAX), 0);
    }

    /// Two threads hand a turn back and forth; a lost wake would hang the test.
    #[test]
    fn no_wake_is_lost() {
        const TURNS: u32 = 2000;
        let turn = Arc::new(AtomicU32::new(0));
        let play = |mine: u32, turn: Arc<AtomicU32>| {
            move || {
                while {
                    let now = turn.load(Ordering::Acquire);
                    if now < TURNS && now % 2 == mine {
                        turn.store(now + 1, Ordering::Release);
                        wake(&turn, 1);
                    } else if now < TURNS {
                        wait(&turn, now);
                    }
                    now < TURNS
                } {}
            }
        };
        let other = std::thread::spawn(play(1, Arc::clone(&turn)));
        play(0, Arc::clone(&turn))();
        other.join().unwrap();
        assert_eq!(turn.load(Ordering::Relaxed), TURNS);
    }

    #[test]
    fn wake_reaches_all_sleepers() {
        let word = Arc::new(AtomicU32::new(0));
        let sleepers: Vec<_> = (0..3)
            .map(|_| {
                let word = Arc::clone(&word);
                std::thread::spawn(move || {
                    while word.load(Ordering::Acquire) == 0 {
                        wait(&word, 0);
                    }
                })
            })
            .collect();
        word.store(1, Ordering::Release);
        wake(&word, u32::MAX);
        for sleeper in sleepers {
            sleeper.join().unwrap();
        }
    }
}
