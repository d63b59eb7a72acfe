//! Standard output and error that may go away (`gnomon boot | head -1`).
//!
//! Guarantee: a reader that closed its end, or a full disk behind a redirection, loses output and
//! nothing else: no panic, no signal, and the run goes on. In the end [`conclude`] says so in a
//! sentence, and a code that would have been 0 is that of a failure.

use std::fmt;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};

use super::EXIT_FAILURE;
use crate::sync::lock;
use crate::sys::stdio;

/// A line of what the user asked for, on standard output.
pub(crate) fn print(text: impl fmt::Display) {
    printed(writeln!(io::stdout().lock(), "{text}"));
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
    let Some(error) = lacking else { return code };
    note(format_args!(
        "cannot write all of its output to standard output: {error}; redirect it to where there is room and a reader, or to /dev/null"
    ));
    if code == 0 { EXIT_FAILURE } else { code }
}

/// A line about the run itself, on standard error.
pub(crate) fn note(text: impl fmt::Display) {
    let _ = writeln!(io::stderr().lock(), "gnomon: {text}");
}

/// How long a console waits for a reader before it looks whether that is still wanted.
const CONSOLE_PATIENCE_MS: u16 = 50;

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
        loop {
            let mut fds = [PollFd::new(stdout.as_fd(), PollFlags::POLLOUT)];
            match poll(&mut fds, CONSOLE_PATIENCE_MS) {
                Err(Errno::EINTR) => {}
                Ok(0) if self.given_up.load(Ordering::Relaxed) => {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                Ok(0) => {}
                // One byte finds room, or an error that says why not; more might have to wait.
                _ => match nix::unistd::write(stdout.as_fd(), &bytes[..bytes.len().min(1)]) {
                    Err(Errno::EINTR) => {}
                    Ok(count) => return Ok(count),
                    Err(errno) => {
                        printed(Err(errno.into()));
                        return Err(errno.into());
                    }
                },
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Most bytes of console output that a [`Tail`] keeps.
const TAIL_BYTES: usize = 8 << 10;

/// The last few KiB of a guest's console, to be shown if the run ends badly.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tail(Arc<Mutex<Vec<u8>>>);

impl Tail {
    /// The lines that are kept; the first may be an incomplete one.
    pub(crate) fn lines(&self) -> Vec<String> {
        let kept = lock(&self.0);
        let text = String::from_utf8_lossy(&kept);
        text.lines().map(|line| line.trim_end().to_owned()).collect()
    }
}

impl Write for Tail {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut kept = lock(&self.0);
        kept.extend_from_slice(bytes);
        // Shortened only now and then, so that a byte does not cost a move of the whole.
        if kept.len() > 2 * TAIL_BYTES {
            let surplus = kept.len() - TAIL_BYTES;
            kept.drain(..surplus);
        }
        Ok(bytes.len())
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
    fn a_tail_keeps_the_end_and_is_bounded() {
        let tail = Tail::default();
        let mut console = tail.clone();
        for line in 0..100_000 {
            writeln!(console, "line {line}\r").unwrap();
        }
        let lines = tail.lines();
        assert_eq!(lines.last().map(String::as_str), Some("line 99999"));
        assert!(lock(&tail.0).len() <= 2 * TAIL_BYTES + 16);
        assert!(lines.len() > 100);
    }

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        assert_eq!(printable("a\x1b[2Jb\tc"), "a\\u{1b}[2Jb c");
    }
}
