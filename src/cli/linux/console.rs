//! The guest's console at standard input: a terminal in raw mode, or whatever else there is.
//!
//! Guarantee: nothing that was typed or pasted is lost, or read before there is room for it. The
//! terminal is as it was when the [`Console`] is dropped, and while the process is stopped or in the
//! background it is the shell's; once it is in the foreground it is raw, and its keys are the guest's. At a
//! terminal Ctrl-A x ends the guest, also while the guest reads nothing, unless [`KEYS_AHEAD`] of others
//! wait before it; what comes from elsewhere goes to the guest as it is, and its end is no end of the
//! guest.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::escape::Escape;
use super::keys::Keys;
use crate::sys::Patience;
use crate::sys::job_control::{self, ContinueNotice};
use crate::sys::terminal::Terminal;
use crate::sys::threads;

/// Keys that are read at a time.
const CHUNK_BYTES: usize = 4096;
/// How long the reader may take to end. One whose input another process took away between poll and
/// read waits on, and holds nothing.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often a process in the background looks whether the terminal has become its own: a shell that
/// puts a job which runs into the foreground does not tell it.
const BACKGROUND_POLL_MS: u16 = 100;

/// Keys of a terminal that may wait for the guest: more than anyone pastes, as a Ctrl-A x is behind them.
const KEYS_AHEAD: usize = 16 << 20;
/// The same from a file or a pipe, which waits for the guest.
const BYTES_AHEAD: usize = 4096;

/// See the module's documentation. Dropped once the machine is over.
pub(super) struct Console {
    is_ended: Arc<AtomicBool>,
    close: Arc<EventFd>,
    keys: Arc<Keys>,
    threads: Vec<JoinHandle<()>>,
    terminal: Option<Arc<Terminal>>,
}

impl Console {
    /// Begins to read, as soon as the terminal is this process's own, and to hand what was read to `send`,
    /// which waits until the guest has room for it, and returns false at the end.
    ///
    /// # Errors
    /// If the terminal cannot be made raw, or the host has no thread left.
    pub(super) fn open(send: impl Fn(&[u8]) -> bool + Send + 'static) -> anyhow::Result<Self> {
        Self::open_with(send, KEYS_AHEAD)
    }

    fn open_with(
        send: impl Fn(&[u8]) -> bool + Send + 'static,
        keys_ahead: usize,
    ) -> anyhow::Result<Self> {
        let terminal = Terminal::at_stdin().map(Arc::new);
        let most = if terminal.is_some() { keys_ahead } else { BYTES_AHEAD };
        let mut console = Self {
            is_ended: Arc::default(),
            close: Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?),
            keys: Arc::new(Keys::new(most)?),
            threads: Vec::new(),
            terminal: terminal.clone(),
        };
        let tty = terminal.map(Tty::new).transpose()?;
        let (keys, close) = (console.keys.clone(), console.close.clone());
        let reader = Reader { keys, tty, is_ended: console.is_ended.clone(), close };
        let keys = console.keys.clone();
        let what = "the console";
        let passing = threads::start("console-keys", what, move || pass_on(&keys, send))?;
        console.threads.push(passing);
        console.threads.push(threads::start("console", what, move || reader.read())?);
        Ok(console)
    }

    /// Whether Ctrl-A x was typed.
    pub(super) fn is_ended(&self) -> bool {
        // Relaxed: nothing else is told by it.
        self.is_ended.load(Ordering::Relaxed)
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        // An eventfd takes far more than one.
        let _ = self.close.write(1);
        self.keys.close();
        let mut patience = Patience::new(PATIENCE);
        let is_left = |threads: &[JoinHandle<()>]| threads.iter().any(|it| !it.is_finished());
        while is_left(&self.threads) && patience.slice().is_some() {
            std::thread::sleep(Duration::from_millis(1));
        }
        // Also if the reader was left behind.
        if let Some(terminal) = &self.terminal {
            terminal.give_back();
        }
    }
}

/// Has the guest read the keys, in its own time.
fn pass_on(keys: &Keys, send: impl Fn(&[u8]) -> bool) {
    while let Some(some) = keys.take() {
        if !send(&some) {
            break;
        }
    }
    keys.close();
}

/// A terminal, shared with a shell.
struct Tty {
    terminal: Arc<Terminal>,
    continued: ContinueNotice,
    escape: Escape,
    /// It was made raw, and the process has neither been stopped nor in the background since.
    is_raw: bool,
}

impl Tty {
    /// Takes the terminal at once if it is ours.
    fn new(terminal: Arc<Terminal>) -> io::Result<Self> {
        let continued = ContinueNotice::install()?;
        let is_raw = terminal.take()?;
        Ok(Self { terminal, continued, escape: Escape::default(), is_raw })
    }

    /// Whether keys are ours, and raw.
    fn is_taken(&mut self) -> bool {
        self.is_raw &= !self.continued.take() && self.terminal.is_ours();
        // One that cannot be made raw is gone: what hangs up says so by a signal, too.
        self.is_raw = self.is_raw || self.terminal.take().unwrap_or(false);
        self.is_raw
    }
}

/// What a wait has come to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ready {
    /// There may be input, and there is room for it.
    Input,
    /// Something else has changed.
    Again,
    /// The console is to be closed.
    Close,
}

struct Reader {
    keys: Arc<Keys>,
    /// At a terminal only.
    tty: Option<Tty>,
    is_ended: Arc<AtomicBool>,
    close: Arc<EventFd>,
}

impl Reader {
    fn read(mut self) {
        job_control::fail_reads_in_background();
        // Not locked for good: the lock is the process's.
        let stdin = io::stdin();
        let mut buffer = [0; CHUNK_BYTES];
        loop {
            let room = self.keys.room().min(CHUNK_BYTES);
            match self.wait(&stdin, room) {
                Ready::Close => return,
                Ready::Again => continue,
                Ready::Input => {}
            }
            match read_some(&stdin, &mut buffer[..room]) {
                Ok(0) | Err(_) if self.is_over(&stdin) => return,
                Ok(read) => {
                    if !self.take(&buffer[..read]) {
                        return;
                    }
                }
                // Another's terminal, from one moment to the next.
                Err(_) => {}
            }
        }
    }

    /// Waits for input, if there is room for it.
    fn wait(&mut self, stdin: &io::Stdin, room: usize) -> Ready {
        let is_taken = self.tty.as_mut().is_none_or(Tty::is_taken);
        let polled = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut fds = vec![polled(self.close.as_fd())];
        if is_taken {
            fds.push(if room > 0 { polled(stdin.as_fd()) } else { polled(self.keys.room_made()) });
        }
        if let Some(tty) = &self.tty {
            fds.push(polled(tty.continued.as_fd()));
        }
        let timeout =
            if is_taken { PollTimeout::NONE } else { PollTimeout::from(BACKGROUND_POLL_MS) };
        match poll(&mut fds, timeout) {
            Err(Errno::EINTR) => Ready::Again,
            Err(_) => Ready::Close,
            Ok(_) if fds[0].any().unwrap_or(true) => Ready::Close,
            Ok(_) if is_taken && room > 0 && fds[1].any().unwrap_or(true) => Ready::Input,
            Ok(_) => Ready::Again,
        }
    }

    /// Whether a read that brought nothing was the last: at the end of a file, or of a terminal that hung
    /// up. One that has become another's may come back.
    fn is_over(&self, stdin: &io::Stdin) -> bool {
        let mut fds = [PollFd::new(stdin.as_fd(), PollFlags::empty())];
        self.tty.is_none()
            || poll(&mut fds, PollTimeout::ZERO).is_err()
            || fds[0].any().unwrap_or(true)
    }

    /// False if there is nothing more to read for.
    fn take(&mut self, keys: &[u8]) -> bool {
        let Some(tty) = &mut self.tty else { return self.keys.put(keys) };
        let typed = tty.escape.sort(keys);
        if typed.ends {
            self.is_ended.store(true, Ordering::Relaxed);
        }
        self.keys.put(&typed.keys) && !typed.ends
    }
}

/// What there is, past the buffer of the standard library: what is in that is not polled for.
fn read_some(stdin: &io::Stdin, keys: &mut [u8]) -> io::Result<usize> {
    loop {
        match nix::unistd::read(stdin.as_fd(), keys) {
            Err(Errno::EINTR) => {}
            other => return Ok(other?),
        }
    }
}

#[cfg(test)]
#[path = "console_tests.rs"]
mod tests;
