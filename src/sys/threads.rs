//! Threads: the start of those that the host may refuse, and the end of those that were told to end.

use std::io;
use std::thread::{Builder, JoinHandle, Result};
use std::time::Duration;

use super::signal;

/// Time between looks whether a thread has ended.
const TICK: Duration = Duration::from_millis(1);

/// A thread could not be started.
#[derive(Debug, thiserror::Error)]
#[error("cannot start a thread for {what}: {source}")]
pub struct NotStarted {
    /// What it was to do, as the rest of a sentence.
    what: &'static str,
    /// What the kernel said.
    source: io::Error,
}

/// Starts a thread, which is for `what`.
///
/// # Errors
/// If the host refuses it.
pub fn start<T: Send + 'static>(
    name: impl Into<String>,
    what: &'static str,
    body: impl FnOnce() -> T + Send + 'static,
) -> std::result::Result<JoinHandle<T>, NotStarted> {
    let thread = Builder::new().name(name.into());
    thread.spawn(body).map_err(|source| NotStarted { what, source })
}

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
