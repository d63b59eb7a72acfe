//! Standard output and error that may go away (`gnomon boot | head -1`).
//!
//! Guarantee: a reader that closed its end, or a full disk behind a redirection, loses output and
//! nothing else: no panic, no signal, no change of the exit code.

use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::sync::{Arc, Mutex};

use crate::sync::lock;

/// A line of what the user asked for, on standard output.
pub(crate) fn print(text: impl fmt::Display) {
    // See the module's guarantee.
    let _ = writeln!(io::stdout().lock(), "{text}");
}

/// A line about the run itself, on standard error.
pub(crate) fn note(text: impl fmt::Display) {
    let _ = writeln!(io::stderr().lock(), "gnomon: {text}");
}

/// Writes out what standard output still holds.
pub(crate) fn flush() {
    let _ = io::stdout().lock().flush();
}

/// The guest's console on standard output. On a terminal each write shows at once; elsewhere, line
/// by line.
#[derive(Debug)]
pub(crate) struct StdoutConsole {
    at_once: bool,
}

impl StdoutConsole {
    pub(crate) fn new() -> Self {
        Self { at_once: io::stdout().is_terminal() }
    }
}

impl Write for StdoutConsole {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut stdout = io::stdout().lock();
        let written = stdout.write(bytes)?;
        if self.at_once {
            stdout.flush()?;
        }
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stdout().lock().flush()
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
