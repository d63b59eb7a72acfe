//! The guest's console at standard input: a terminal in raw mode, or whatever else there is.
//!
//! Guarantee: the terminal is as it was when the [`Console`] is dropped. At a terminal Ctrl-A x ends
//! the guest; what comes from elsewhere goes to the guest as it is, and its end is no end of the guest.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, TrySendError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::escape::Escape;
use crate::sys::terminal::{Input, RawTerminal};
use crate::vmm::linux::LinuxInput;

/// Keys that are read at a time.
const CHUNK_BYTES: usize = 256;
/// How long the reader may take to end. One whose input another process took away between poll and
/// read waits on, and holds nothing.
const PATIENCE: Duration = Duration::from_secs(1);

/// Keys that wait for the guest to read them; more than that a terminal's are lost.
const WAITING_KEYS: usize = 4096;

/// See the module's documentation. Dropped once the machine is over.
pub(super) struct Console {
    is_ended: Arc<AtomicBool>,
    close: Arc<EventFd>,
    threads: Vec<JoinHandle<()>>,
    terminal: Option<RawTerminal>,
}

impl Console {
    /// Begins to read, unless standard input is a terminal that is another's at the moment.
    ///
    /// # Errors
    /// If the terminal cannot be made raw, or the host has no thread left.
    pub(super) fn open(input: LinuxInput) -> io::Result<Self> {
        let mut console = Self {
            is_ended: Arc::default(),
            close: Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?),
            threads: Vec::new(),
            terminal: None,
        };
        let escape = match RawTerminal::enter()? {
            Input::Others => return Ok(console),
            Input::NoTerminal => None,
            Input::Raw(terminal) => {
                console.terminal = Some(terminal);
                Some(Escape::default())
            }
        };
        let (keys, typed) = mpsc::sync_channel(WAITING_KEYS);
        let (is_ended, close) = (console.is_ended.clone(), console.close.clone());
        let reader = Reader { keys, escape, is_ended, close };
        let thread = |name: &str| std::thread::Builder::new().name(name.to_owned());
        console.threads.push(thread("console-keys").spawn(move || pass_on(&typed, &input))?);
        console.threads.push(thread("console").spawn(move || reader.read())?);
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
        let deadline = Instant::now() + PATIENCE;
        let is_left = |threads: &[JoinHandle<()>]| threads.iter().any(|it| !it.is_finished());
        while is_left(&self.threads) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Has the guest read the keys, in its own time.
fn pass_on(typed: &mpsc::Receiver<u8>, input: &LinuxInput) {
    while let Ok(first) = typed.recv() {
        let keys: Vec<u8> = std::iter::once(first).chain(typed.try_iter()).collect();
        if !input.send(&keys) {
            return;
        }
    }
}

struct Reader {
    keys: mpsc::SyncSender<u8>,
    /// At a terminal only.
    escape: Option<Escape>,
    is_ended: Arc<AtomicBool>,
    close: Arc<EventFd>,
}

impl Reader {
    fn read(mut self) {
        // Not locked for good: the lock is the process's.
        let stdin = io::stdin();
        while wait(stdin.as_fd(), &self.close) {
            let mut keys = [0; CHUNK_BYTES];
            let keys = match read_some(&stdin, &mut keys) {
                Ok(0) | Err(_) => return,
                Ok(read) => &keys[..read],
            };
            if !self.take(keys) {
                return;
            }
        }
    }

    /// False if there is nothing more to read for.
    fn take(&mut self, keys: &[u8]) -> bool {
        let Some(escape) = &mut self.escape else {
            // A file or a pipe waits until the guest has read.
            return keys.iter().all(|&key| self.keys.send(key).is_ok());
        };
        let typed = escape.sort(keys);
        if typed.ends {
            self.is_ended.store(true, Ordering::Relaxed);
        }
        // A guest that reads no keys must not hold up the next Ctrl-A.
        let is_over = |key| matches!(self.keys.try_send(key), Err(TrySendError::Disconnected(_)));
        !typed.ends && !typed.keys.into_iter().any(is_over)
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

/// Waits for input; false if the console is to be closed.
fn wait(stdin: std::os::fd::BorrowedFd<'_>, close: &EventFd) -> bool {
    loop {
        let mut fds =
            [PollFd::new(stdin, PollFlags::POLLIN), PollFd::new(close.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) if fds[1].any().unwrap_or(true) => return false,
            Ok(_) => return true,
            Err(Errno::EINTR) => {}
            Err(_) => return false,
        }
    }
}
