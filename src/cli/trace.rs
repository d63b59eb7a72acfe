//! The tracepoints of a run, written to a file as JSON lines (`--trace`).
//!
//! Guarantee: a run with a trace ends as it would without; what of the trace could not be written is told
//! once, at the end, and by the exit code.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::sync::Arc;

use tracing_subscriber::fmt::{MakeWriter, time};

use super::config::UsageError;
use super::{EXIT_FAILURE, output};
use crate::sync::{Mutex, lock};

/// Carries out `run` with its tracepoints written to the file, if there is one.
///
/// # Errors
/// If the file cannot be made, or as `run`.
pub(crate) fn traced(
    path: Option<&Path>,
    run: impl FnOnce() -> anyhow::Result<u8>,
) -> anyhow::Result<u8> {
    let Some(path) = path else { return run() };
    let told = |error| format!("cannot write the trace to {} (--trace): {error}", path.display());
    let lines = Lines::new(File::create(path).map_err(|error| UsageError(told(error)))?);
    let subscriber = tracing_subscriber::fmt()
        .json()
        .flatten_event(true)
        .with_max_level(tracing::Level::TRACE)
        .with_level(false)
        .with_target(false)
        .with_thread_names(true)
        .with_timer(time::uptime())
        .with_writer(lines.clone())
        .finish();
    tracing::subscriber::set_global_default(subscriber)?;
    let code = run();
    match lines.finish() {
        Ok(()) => code,
        Err(error) => {
            output::note(told(error));
            code.map(|code| if code == 0 { EXIT_FAILURE } else { code })
        }
    }
}

/// The file, and the first thing that went wrong with it: nothing is written after that.
#[derive(Clone)]
struct Lines(Arc<Mutex<Sink>>);

struct Sink {
    file: BufWriter<File>,
    failed: Option<io::Error>,
}

impl Lines {
    fn new(file: File) -> Self {
        Self(Arc::new(Mutex::new(Sink { file: BufWriter::new(file), failed: None })))
    }

    /// Writes what is left, and says what went wrong.
    fn finish(&self) -> io::Result<()> {
        let mut sink = lock(&self.0);
        match sink.failed.take() {
            Some(error) => Err(error),
            None => sink.file.flush(),
        }
    }
}

/// A line comes in one piece.
impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut sink = lock(&self.0);
        if sink.failed.is_none() {
            sink.failed = sink.file.write_all(line).err();
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_thing_that_goes_wrong_is_kept_and_told() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let mut lines = Lines::new(full);
        for _ in 0..10_000 {
            lines.write_all(b"a line of some length\n").unwrap();
        }
        assert_eq!(lines.finish().unwrap_err().raw_os_error(), Some(libc::ENOSPC));

        let file = tempfile::NamedTempFile::new().unwrap();
        let mut lines = Lines::new(file.reopen().unwrap());
        lines.write_all(b"one\n").unwrap();
        lines.finish().unwrap();
        assert_eq!(std::fs::read(file.path()).unwrap(), b"one\n");
    }
}
