//! The end of what a guest printed.

use std::io::{self, Write};
use std::sync::Arc;

use crate::sync::{Mutex, lock};

/// Most bytes of console output that a [`Tail`] keeps.
const TAIL_BYTES: usize = 8 << 10;

/// The last few KiB of a guest's console, to be shown if the run ends badly.
#[derive(Clone, Debug, Default)]
pub struct Tail(Arc<Mutex<Vec<u8>>>);

impl Tail {
    /// The lines that are kept; the first may be an incomplete one.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
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
}
