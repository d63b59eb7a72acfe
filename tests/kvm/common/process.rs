//! Running the `gnomon` binary as a user would, within a time limit.
//!
//! The binary is `GNOMON_BIN` if that is set, else the one that cargo built for this test, else
//! whatever the shell would find: the suites also run where there is no cargo.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Time that any run may take, unless it says otherwise.
pub(crate) const MINUTES: Duration = Duration::from_secs(240);

/// Where the binary is.
pub(crate) fn gnomon() -> PathBuf {
    if let Some(path) = std::env::var_os("GNOMON_BIN") {
        return path.into();
    }
    let built = Path::new(env!("CARGO_BIN_EXE_gnomon"));
    if built.exists() { built.to_owned() } else { "gnomon".into() }
}

/// A run that is over.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Finished {
    /// The exit code; a signal that ended the process fails the trial.
    pub(crate) fn code(&self) -> i32 {
        match self.status.code() {
            Some(code) => code,
            None => panic!("ended by signal {:?}: {self:#?}", self.status.signal()),
        }
    }

    /// The exit code must be this one.
    pub(crate) fn with_code(self, code: i32) -> Self {
        assert_eq!(self.code(), code, "{self:#?}");
        assert!(!self.stderr.contains("panicked"), "{self:#?}");
        self
    }

    /// Standard error must have all these parts.
    pub(crate) fn says(self, parts: &[&str]) -> Self {
        for part in parts {
            assert!(self.stderr.contains(part), "no {part:?} in {self:#?}");
        }
        self
    }
}

/// A process that runs.
pub(crate) struct Running {
    child: Child,
    lines: Receiver<(Stream, String)>,
    readers: Vec<JoinHandle<()>>,
    stdout: String,
    stderr: String,
    deadline: Instant,
}

/// One of a process's outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stream {
    Stdout,
    Stderr,
}

/// Starts `gnomon` with these arguments.
pub(crate) fn start(arguments: &[&str]) -> Running {
    start_command(command(arguments), MINUTES)
}

/// `gnomon` with these arguments, to be started.
pub(crate) fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(gnomon());
    command.args(arguments);
    command
}

/// Starts a command; standard output is captured unless the command sends it elsewhere, which
/// `stdout` then says.
pub(crate) fn start_command(mut command: Command, within: Duration) -> Running {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    spawn(command, within)
}

/// Starts a command with its outputs as they are set.
pub(crate) fn spawn(mut command: Command, within: Duration) -> Running {
    let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let (sender, lines) = mpsc::channel();
    let mut readers = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        readers.push(read_lines(stdout, Stream::Stdout, sender.clone()));
    }
    if let Some(stderr) = child.stderr.take() {
        readers.push(read_lines(stderr, Stream::Stderr, sender));
    }
    Running {
        child,
        lines,
        readers,
        stdout: String::new(),
        stderr: String::new(),
        deadline: Instant::now() + within,
    }
}

/// Reads lines, their ends included, as they come.
fn read_lines(
    from: impl Read + Send + 'static,
    stream: Stream,
    to: Sender<(Stream, String)>,
) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut reader = BufReader::new(from);
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line).is_ok_and(|bytes| bytes > 0) {
            let text = String::from_utf8_lossy(&line).into_owned();
            line.clear();
            if to.send((stream, text)).is_err() {
                return;
            }
        }
    })
}

impl Running {
    /// Waits for a line that has this part, and returns it.
    pub(crate) fn wait_for(&mut self, stream: Stream, part: &str) -> String {
        loop {
            let (from, line) = match self.next_line() {
                Some(next) => next,
                None => panic!("it ended without {part:?}: {:#?}", (&self.stdout, &self.stderr)),
            };
            if from == stream && line.contains(part) {
                return line;
            }
        }
    }

    /// Its process number.
    #[allow(dead_code, reason = "not every suite asks for it")]
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).expect("a process number");
        kill(Pid::from_raw(pid), signal).expect("it still runs");
    }

    /// Kills it, unless it has ended.
    pub(crate) fn kill(&self) {
        let pid = i32::try_from(self.child.id()).expect("a process number");
        // Nobody has waited for it yet: the number is still its own.
        kill(Pid::from_raw(pid), Signal::SIGKILL).expect("our own child");
    }

    /// Waits for its end.
    pub(crate) fn finish(mut self) -> Finished {
        while self.next_line().is_some() {}
        // Both outputs are closed: it has ended, or is about to.
        let status = self.child.wait().expect("our own child");
        for reader in self.readers {
            reader.join().expect("readers do not panic");
        }
        Finished { status, stdout: self.stdout, stderr: self.stderr }
    }

    fn next_line(&mut self) -> Option<(Stream, String)> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        match self.lines.recv_timeout(left) {
            Ok((stream, line)) => {
                match stream {
                    Stream::Stdout => self.stdout.push_str(&line),
                    Stream::Stderr => self.stderr.push_str(&line),
                }
                Some((stream, line))
            }
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => {
                // The panic reaches the user, the process must not survive it.
                let _ = self.child.kill();
                let _ = self.child.wait();
                panic!("it did not end in time: {:#?}", (&self.stdout, &self.stderr));
            }
        }
    }
}

/// Runs `gnomon` with these arguments to its end.
pub(crate) fn run(arguments: &[&str]) -> Finished {
    start(arguments).finish()
}

/// The program's path if the shell would find it.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path: OsString = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(|file| file.is_file())
}
