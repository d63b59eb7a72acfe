//! The terminal in raw mode: each key goes to a guest as it is typed.
//!
//! Guarantee: the terminal gets the settings that it had back when the [`RawTerminal`] is dropped (so
//! also by a panic that unwinds), and at the first signal that asks the process to stop, in its handler
//! ([`StopNotice`](super::signal::StopNotice)). Only a process that is killed outright (SIGKILL) leaves
//! it raw; `reset` or `stty sane` mends that.

use std::io::IsTerminal;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::sys::termios::{self, LocalFlags, OutputFlags, SetArg};

/// What the terminal had before: for the handler of a signal, which can take no lock. Set once: the
/// terminal of a process does not change.
static SAVED: OnceLock<Saved> = OnceLock::new();
/// Whether it is to get that back.
static IS_RAW: AtomicBool = AtomicBool::new(false);

struct Saved {
    descriptor: libc::c_int,
    settings: libc::termios,
}

/// What is at standard input.
#[derive(Debug)]
pub enum Input {
    /// A terminal, raw from now on.
    Raw(RawTerminal),
    /// A terminal that is another's at the moment: a process in the background that read it would be
    /// stopped (SIGTTIN).
    Others,
    /// Something else, or nothing.
    NoTerminal,
}

/// Proof that standard input is a terminal in raw mode.
#[derive(Debug)]
pub struct RawTerminal(());

impl RawTerminal {
    /// Makes the terminal at standard input raw, if there is one and it is ours.
    ///
    /// # Errors
    /// The errno of `tcgetattr` or `tcsetattr`.
    pub fn enter() -> std::io::Result<Input> {
        let stdin = std::io::stdin();
        if !stdin.is_terminal() {
            return Ok(Input::NoTerminal);
        }
        if !is_ours(stdin.as_fd()) {
            return Ok(Input::Others);
        }
        let before = termios::tcgetattr(&stdin)?;
        let descriptor = stdin.as_fd().as_raw_fd();
        let _ = SAVED.set(Saved { descriptor, settings: before.clone().into() });
        let mut raw = before;
        termios::cfmakeraw(&mut raw);
        // Lines of our own begin at the left, too. A guest's carriage returns are not in the way.
        raw.output_flags.insert(OutputFlags::OPOST | OutputFlags::ONLCR);
        debug_assert!(!raw.local_flags.contains(LocalFlags::ISIG), "Ctrl-C is the guest's");
        // Before the change: a signal that comes between the two restores what is there already.
        // Release pairs with the Acquire in `restore`.
        IS_RAW.store(true, Ordering::Release);
        let raw_terminal = Self(());
        termios::tcsetattr(&stdin, SetArg::TCSANOW, &raw)?;
        // And after it: a signal between the first time and the change has undone nothing.
        IS_RAW.store(true, Ordering::Release);
        Ok(Input::Raw(raw_terminal))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

/// Whether this process is in the terminal's foreground.
fn is_ours(terminal: BorrowedFd<'_>) -> bool {
    match nix::unistd::tcgetpgrp(terminal) {
        Ok(group) => group == nix::unistd::getpgrp(),
        // A terminal that is not the process's controlling one has no foreground that counts.
        Err(errno) => errno == Errno::ENOTTY,
    }
}

/// Gives the terminal its settings back, if it was made raw. Safe in a signal handler.
pub(super) fn restore() {
    if !IS_RAW.swap(false, Ordering::AcqRel) {
        return;
    }
    if let Some(Saved { descriptor, settings }) = SAVED.get() {
        // SAFETY: `settings` is a complete termios as `tcgetattr` gave it; on a descriptor that is no
        // terminal any more the call fails.
        unsafe { libc::tcsetattr(*descriptor, libc::TCSANOW, settings) };
    }
}

#[cfg(test)]
#[path = "terminal_tests.rs"]
mod tests;
