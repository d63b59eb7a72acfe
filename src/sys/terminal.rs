//! The terminal in raw mode: each key goes to a guest as it is typed.
//!
//! Guarantee: the terminal gets the settings that it had back when the [`Terminal`] is dropped (so also
//! by a panic that unwinds), before the process is stopped by SIGTSTP
//! ([`job_control`](super::job_control)), and at the first signal that asks the process to stop, in its
//! handler ([`StopNotice`](super::signal::StopNotice)). Settings are changed only while the process is in
//! the terminal's foreground: what the shell does with its terminal stays. Only a process that is
//! killed or stopped outright (SIGKILL, SIGSTOP) leaves it raw; `reset` or `stty sane` mends that.

use std::io::{self, IsTerminal, Stdin};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

use nix::errno::Errno;
use nix::sys::termios::{self, LocalFlags, OutputFlags, SetArg, Termios};

use super::job_control::with_signal;
use super::signal;

/// What the terminal had before: for the handler of a signal, which can take no lock. Each that was set
/// once stays, as a handler may be reading it: one more only if the user changes the settings.
static SAVED: AtomicPtr<Saved> = AtomicPtr::new(ptr::null_mut());
/// Whether it is to get that back.
static IS_RAW: AtomicBool = AtomicBool::new(false);

struct Saved {
    descriptor: libc::c_int,
    settings: libc::termios,
}

/// Proof that standard input is a terminal; raw while [`Terminal::take`] says so.
#[derive(Debug)]
pub struct Terminal {
    stdin: Stdin,
}

impl Terminal {
    /// The terminal at standard input, if there is one; nothing is changed yet.
    #[must_use]
    pub fn at_stdin() -> Option<Self> {
        let stdin = io::stdin();
        stdin.is_terminal().then_some(Self { stdin })
    }

    /// Makes the terminal raw if this process is in its foreground; false if another's is, or the process
    /// has been asked to stop. Again is harmless: after a stop the settings may be any.
    ///
    /// # Errors
    /// The errno of `tcgetattr` or `tcsetattr`.
    pub fn take(&self) -> io::Result<bool> {
        if !is_ours(self.stdin.as_fd()) || signal::is_stop_asked() {
            return Ok(false);
        }
        let found = termios::tcgetattr(&self.stdin)?;
        let was_saved = !SAVED.load(Ordering::Acquire).is_null();
        let others = LocalFlags::ICANON | LocalFlags::ISIG | LocalFlags::IEXTEN;
        // Without any of these it is raw from us, by way of a stop that nobody could do anything about.
        if !was_saved || found.local_flags.intersects(others) {
            save(self.stdin.as_fd(), &found);
        }
        let mut raw = found;
        termios::cfmakeraw(&mut raw);
        // Lines of our own begin at the left, too. A guest's carriage returns are not in the way.
        raw.output_flags.insert(OutputFlags::OPOST | OutputFlags::ONLCR);
        debug_assert!(!raw.local_flags.contains(LocalFlags::ISIG), "Ctrl-C is the guest's");
        // Before the change: a signal that comes between the two restores what is there already.
        // Release pairs with the Acquire in `restore`.
        IS_RAW.store(true, Ordering::Release);
        // From the background this would stop the process, as it does any other, until it is in the
        // foreground.
        termios::tcsetattr(&self.stdin, SetArg::TCSANOW, &raw)?;
        // And after it: a signal between the first time and the change has undone nothing.
        IS_RAW.store(true, Ordering::Release);
        if signal::is_stop_asked() {
            restore();
            return Ok(false);
        }
        Ok(true)
    }

    /// Gives the terminal its settings back, if it was made raw and is still ours.
    pub fn give_back(&self) {
        restore();
    }

    /// Whether this process is in the terminal's foreground.
    #[must_use]
    pub fn is_ours(&self) -> bool {
        is_ours(self.stdin.as_fd())
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        restore();
    }
}

/// Notes what the terminal is to get back, unless it is that already.
fn save(terminal: BorrowedFd<'_>, found: &Termios) {
    let settings: libc::termios = found.clone().into();
    let known = SAVED.load(Ordering::Acquire);
    // SAFETY: what SAVED points to was leaked by this function and is never changed.
    if unsafe { known.as_ref() }.is_some_and(|known| known.settings == settings) {
        return;
    }
    let saved = Saved { descriptor: terminal.as_raw_fd(), settings };
    // Release pairs with the Acquire loads here and in `restore`.
    SAVED.store(Box::leak(Box::new(saved)), Ordering::Release);
}

/// Safe in a signal handler.
fn is_ours(terminal: BorrowedFd<'_>) -> bool {
    match nix::unistd::tcgetpgrp(terminal) {
        Ok(group) => group == nix::unistd::getpgrp(),
        // A terminal that is not the process's controlling one has no foreground that counts.
        Err(errno) => errno == Errno::ENOTTY,
    }
}

/// See [`Terminal::give_back`]. Safe in a signal handler.
pub(super) fn restore() {
    if !IS_RAW.swap(false, Ordering::AcqRel) {
        return;
    }
    // SAFETY: what SAVED points to was leaked and is never changed.
    let Some(saved) = (unsafe { SAVED.load(Ordering::Acquire).as_ref() }) else { return };
    // SAFETY: standard input, which nobody here closes; on one that is closed the calls fail.
    if !is_ours(unsafe { BorrowedFd::borrow_raw(saved.descriptor) }) {
        return;
    }
    // Without SIGTTOU: who has just been put into the background must not be stopped when it is to end.
    let _ = with_signal(libc::SIG_BLOCK, libc::SIGTTOU, || {
        // SAFETY: `settings` is a complete termios as `tcgetattr` gave it; on a descriptor that is no
        // terminal any more the call fails.
        unsafe { libc::tcsetattr(saved.descriptor, libc::TCSANOW, &raw const saved.settings) };
    });
}

#[cfg(test)]
#[path = "terminal_tests.rs"]
mod tests;
