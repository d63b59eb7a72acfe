//! System calls under fire of signals.
//!
//! Linux finishes reads and writes of regular files, and `madvise`, before it looks at a signal,
//! unless it is a deadly one; network and user-space file systems do not. So a call that is struck
//! is made while real signals come in, and then returns `EINTR` even where the kernel would not
//! have: all of these calls may be repeated.

use std::io;
use std::time::Duration;

use nix::errno::Errno;

use super::EINTR;
use gnomon_export_rmap::lab::Lab;
use gnomon_sys::signal::{KickSignal, KickTimer};

/// When the first signal comes: in the middle of a call of a few microseconds.
const FIRST_SIGNAL: Duration = Duration::from_micros(1);
/// Then so often.
const SIGNALS: Duration = Duration::from_micros(100);

/// Makes the system call, interrupted if an item strikes. The call must be one that can be repeated.
pub(crate) fn interrupted_or<T>(lab: &Lab, call: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    if !lab.strikes(EINTR) {
        return call();
    }
    let timer =
        KickSignal::install().and_then(|signal| KickTimer::start(signal, FIRST_SIGNAL, SIGNALS));
    let result = call();
    // Without a timer the call was not under fire, but it is interrupted all the same.
    drop(timer);
    result.and(Err(Errno::EINTR.into()))
}
