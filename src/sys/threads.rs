//! The end of threads that have been told to end.

use std::thread::{JoinHandle, Result};
use std::time::Duration;

use super::signal;

/// Time between looks whether a thread has ended.
const TICK: Duration = Duration::from_millis(1);

/// Waits for the thread's end. Once a stop was asked for, patience [ends](signal::is_patience_over):
/// then a thread that is still in the middle of something is left behind, with what it shares in, and
/// this is `None`.
pub fn join<T>(thread: JoinHandle<T>) -> Option<Result<T>> {
    while !thread.is_finished() {
        if signal::is_patience_over() {
            return None;
        }
        std::thread::sleep(TICK);
    }
    Some(thread.join())
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn a_thread_that_does_not_end_is_left_behind_once_patience_is_over() {
        let (sender, receiver) = mpsc::channel::<u8>();
        let stuck = std::thread::spawn(move || receiver.recv().is_ok());
        {
            let _stop = signal::pretended::Stop::after(3);
            assert!(join(stuck).is_none());
        }
        drop(sender);
        let ends = std::thread::spawn(|| 5);
        assert_eq!(join(ends).map(Result::unwrap), Some(5));
    }
}
