//! The guest's console at standard input: a terminal in raw mode, or whatever else there is.
//!
//! Guarantee: the terminal is as it was when the [`Console`] is dropped. At a terminal Ctrl-A x ends
//! the guest; what comes from elsewhere goes to the guest as it is, and its end is no end of the guest.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::escape::Escape;
use crate::sys::terminal::RawTerminal;
use crate::vmm::linux::LinuxInput;

/// Keys that are read at a time.
const CHUNK_BYTES: usize = 256;
/// How long the reader may take to end. One whose input another process took away between poll and
/// read waits on, and holds nothing.
const PATIENCE: Duration = Duration::from_secs(1);

/// See the module's documentation. Dropped once the machine is over.
pub(super) struct Console {
    is_ended: Arc<AtomicBool>,
    close: Arc<EventFd>,
    thread: JoinHandle<()>,
    _terminal: Option<RawTerminal>,
}

impl Console {
    /// Begins to read.
    ///
    /// # Errors
    /// If the terminal cannot be made raw, or the host has no thread left.
    pub(super) fn open(input: LinuxInput) -> io::Result<Self> {
        let terminal = RawTerminal::enter()?;
        let escape = terminal.is_some().then(Escape::default);
        let is_ended = Arc::<AtomicBool>::default();
        let close = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?);
        let reader = Reader { input, escape, is_ended: is_ended.clone(), close: close.clone() };
        let thread = std::thread::Builder::new().name("console".to_owned());
        let thread = thread.spawn(move || reader.read())?;
        Ok(Self { is_ended, close, thread, _terminal: terminal })
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
        while !self.thread.is_finished() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

struct Reader {
    input: LinuxInput,
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
            let (keys, ends) = match &mut self.escape {
                None => (keys.to_vec(), false),
                Some(escape) => {
                    let typed = escape.sort(keys);
                    (typed.keys, typed.ends)
                }
            };
            if ends {
                // At once: a guest that reads no keys cannot hold this up.
                self.is_ended.store(true, Ordering::Relaxed);
                return;
            }
            if !keys.is_empty() && !self.input.send(&keys) {
                return;
            }
        }
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
