//! Standard output and error that may go away (`gnomon boot | head -1`).
//!
//! Guarantee: a reader that closed its end, or a full disk behind a redirection, loses output and
//! nothing else: no panic, no signal, and the run goes on. In the end [`conclude`] says so in a
//! sentence, and a code that would have been 0 is that of a failure; so it is where a line could not be
//! written to standard error, as with GNU's tools (`close_stdout`): what would have been told there may be
//! what a script has to know. Who wants none of it says `2>/dev/null`, or closes his end. One that has stopped to read holds
//! a run up, but not the end that a signal asks for.

use std::fmt;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};

use super::EXIT_FAILURE;
use crate::sync::lock;
use crate::sys::{signal, stdio};

/// A line of what the user asked for, on standard output.
pub(crate) fn print(text: impl fmt::Display) {
    let mut stdout = io::stdout().lock();
    // What is in the buffer came first.
    let result = stdout.flush();
    printed(result.and_then(|()| write_patiently(stdout.as_fd(), &format!("{text}\n"))));
}

/// Why standard output lacks something: the first that could not be written to it.
static LACKING: Mutex<Option<io::Error>> = Mutex::new(None);

/// Something was written to standard output, or could not be.
pub(crate) fn printed(result: io::Result<()>) {
    let result = match stdio::stdout_was_closed() {
        true => Err(Errno::EBADF.into()),
        false => result,
    };
    if let Err(error) = result {
        lock(&LACKING).get_or_insert(error);
    }
}

/// Writes out what standard output still holds, and says whether all of it could be written; returns
/// the exit code of a run that would end with `code`.
pub(crate) fn conclude(code: u8) -> u8 {
    let flushed = io::stdout().lock().flush();
    let lacking = lock(&LACKING).take().or(flushed.err());
    if let Some(error) = &lacking {
        note(format_args!(
            "cannot write all of its output to standard output: {error}; redirect it to where there is room and a reader, or to /dev/null"
        ));
    }
    // Relaxed: it is this thread's, or that of one that has ended.
    let is_told = lacking.is_none() && !UNTOLD.load(Ordering::Relaxed);
    if code == 0 && !is_told { EXIT_FAILURE } else { code }
}

/// Whether a line could not be written to standard error.
static UNTOLD: AtomicBool = AtomicBool::new(false);

/// A line about the run itself, on standard error.
pub(crate) fn note(text: impl fmt::Display) {
    let written = write_patiently(io::stderr().lock().as_fd(), &format!("gnomon: {text}\n"));
    // What nobody read by the time that patience ended is the signal's, which has its own exit code; and
    // a reader that went away has read what it wanted.
    let is_choice = |kind| matches!(kind, io::ErrorKind::TimedOut | io::ErrorKind::BrokenPipe);
    if written.is_err_and(|error| !is_choice(error.kind())) {
        // Relaxed: see `conclude`.
        UNTOLD.store(true, Ordering::Relaxed);
    }
}

/// The last line on standard error before the process ends by force: waits for no lock and no reader.
pub(crate) fn last_word(text: impl fmt::Display) {
    let line = format!("gnomon: {text}\n");
    // Not locked: whoever holds the lock may be waiting for a reader.
    let stderr = io::stderr();
    let _ = write_some(stderr.as_fd(), line.as_bytes(), line.len(), || true);
}

/// Whether something was not written since nobody read it by the time that patience ended.
static GAVE_UP: AtomicBool = AtomicBool::new(false);

/// Whether something was not told because of the signal that asked for the end.
pub(crate) fn gave_up() -> bool {
    GAVE_UP.load(Ordering::Relaxed)
}

/// Bytes that a pipe or a terminal with room for any takes without waiting.
const CHUNK_BYTES: usize = 256;

/// Writes all of it, until [patience ends](signal::is_patience_over).
fn write_patiently(to: BorrowedFd<'_>, text: &str) -> io::Result<()> {
    let mut bytes = text.as_bytes();
    while !bytes.is_empty() {
        let written = write_some(to, bytes, CHUNK_BYTES, signal::is_patience_over);
        if written.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::TimedOut) {
            // Relaxed: nothing else is told by it.
            GAVE_UP.store(true, Ordering::Relaxed);
        }
        bytes = &bytes[written?..];
    }
    Ok(())
}

/// Writes some of it, at most `most` bytes, once there is room; `TimedOut` if there is none and
/// `give_up` says so.
fn write_some(
    to: BorrowedFd<'_>,
    bytes: &[u8],
    most: usize,
    give_up: impl Fn() -> bool,
) -> io::Result<usize> {
    loop {
        let mut fds = [PollFd::new(to, PollFlags::POLLOUT)];
        match poll(&mut fds, PATIENCE_MS) {
            Err(Errno::EINTR) => {}
            Ok(0) if give_up() => return Err(io::ErrorKind::TimedOut.into()),
            Ok(0) => {}
            _ => match nix::unistd::write(to, &bytes[..bytes.len().min(most)]) {
                Err(Errno::EINTR) => {}
                other => return Ok(other?),
            },
        }
    }
}

/// How long a writer waits for a reader before it looks whether that is still wanted.
const PATIENCE_MS: u16 = 50;

/// The guest's console on standard output: each write shows at once. A reader that has stopped to
/// read (`gnomon boot | less`, Ctrl-S) holds up a guest that prints, but not its end.
#[derive(Clone, Debug, Default)]
pub(crate) struct StdoutConsole {
    given_up: Arc<AtomicBool>,
}

impl StdoutConsole {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// From now on what standard output does not take at once is lost: the guest is to end. For all
    /// clones.
    pub(crate) fn give_up(&self) {
        // Relaxed: nothing else is told by it.
        self.given_up.store(true, Ordering::Relaxed);
    }
}

impl Write for StdoutConsole {
    // Past the standard library's buffer: who waits here holds no lock of the process's.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if stdio::stdout_was_closed() {
            printed(Ok(()));
            return Err(Errno::EBADF.into());
        }
        let stdout = io::stdout();
        // One byte finds room, or an error that says why not; more might have to wait.
        let written =
            write_some(stdout.as_fd(), bytes, 1, || self.given_up.load(Ordering::Relaxed));
        if let Err(error) = &written
            && error.kind() != io::ErrorKind::TimedOut
        {
            // What a reader who has stopped to read did not get at the end is counted as lost.
            printed(Err(error
                .raw_os_error()
                .map_or(error.kind().into(), io::Error::from_raw_os_error)));
        }
        written
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Text from a guest or a file as it may go to a terminal: control characters are spelled out.
pub(crate) fn printable(text: &str) -> String {
    text.chars()
        .flat_map(|c| match c {
            '\t' => vec![' '],
            c if c.is_control() => c.escape_default().collect(),
            c => vec![c],
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        assert_eq!(printable("a\x1b[2Jb\tc"), "a\\u{1b}[2Jb c");
    }
}
