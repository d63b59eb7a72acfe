//! Job control: a process that is stopped and goes on, by the user's shell or by signals.
//!
//! Guarantee: at SIGTSTP the terminal gets its settings back before the process stops, so the shell that
//! takes over has a terminal as it left it; whoever holds a [`ContinueNotice`] is told each time that the
//! process goes on. SIGSTOP cannot be caught: after it the shell has the terminal as it is.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{SigSet, Signal};

use super::signal::{is_ignored, keeping_errno, set_action};

/// Readable once the process has gone on. Never closed.
static EVENT: OnceLock<EventFd> = OnceLock::new();
/// [`EVENT`]'s descriptor for the handlers, which may not wait for a `OnceLock`; -1 before.
static DESCRIPTOR: AtomicI32 = AtomicI32::new(-1);

/// How often it has gone on.
static CONTINUES: AtomicU64 = AtomicU64::new(0);

/// Tells that the process went on after it was stopped.
#[derive(Clone, Copy, Debug)]
pub struct ContinueNotice {
    event: &'static EventFd,
}

impl ContinueNotice {
    /// Takes over SIGTSTP, unless that is ignored, and SIGCONT, for the whole process.
    ///
    /// # Errors
    ///
    /// The errno of `eventfd` or `sigaction`.
    pub fn install() -> io::Result<Self> {
        let event = match EVENT.get() {
            Some(event) => event,
            None => {
                let new = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
                EVENT.get_or_init(|| new)
            }
        };
        // Pairs with the Acquire load in tell.
        DESCRIPTOR.store(event.as_fd().as_raw_fd(), Ordering::Release);
        // SA_RESTART: a stop is no error for whoever is in a system call.
        let restart = libc::SA_RESTART;
        set_action(libc::SIGCONT, on_continue as *const () as libc::sighandler_t, restart)?;
        if !is_ignored(libc::SIGTSTP)? {
            set_action(libc::SIGTSTP, on_suspend as *const () as libc::sighandler_t, restart)?;
        }
        Ok(Self { event })
    }

    /// Whether it went on since anybody last asked this, or may have.
    #[must_use]
    pub fn take(self) -> bool {
        self.event.read().is_ok()
    }

    /// How often it has gone on.
    #[must_use]
    pub fn count(self) -> u64 {
        // Relaxed: the number is all there is to know.
        CONTINUES.load(Ordering::Relaxed)
    }
}

/// Readable once the process went on: for a poll of several things.
impl AsFd for ContinueNotice {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

/// Has reads from a terminal that is another's at the moment fail with `EIO` in the calling thread,
/// instead of stopping the process (SIGTTIN).
pub fn fail_reads_in_background() {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTTIN);
    // Fails only for a set that is none.
    let _ = signals.thread_block();
}

/// Safe in a signal handler.
fn tell() {
    // Acquire pairs with the Release store in ContinueNotice::install.
    let descriptor = DESCRIPTOR.load(Ordering::Acquire);
    let one = 1u64;
    // SAFETY: writes 8 bytes from a local variable to an eventfd that is never closed (or to -1:
    // EBADF).
    let _ = unsafe { libc::write(descriptor, ptr::from_ref(&one).cast(), size_of::<u64>()) };
}

extern "C" fn on_continue(_signal: libc::c_int) {
    CONTINUES.fetch_add(1, Ordering::Relaxed);
    keeping_errno(tell);
}

/// Only calls that are safe in a signal handler. Stops the process as SIGTSTP does where nobody catches
/// it: not if there is no shell that could let it go on (an orphaned group).
extern "C" fn on_suspend(signal: libc::c_int) {
    keeping_errno(|| {
        super::terminal::restore();
        let _ = set_action(signal, libc::SIG_DFL, 0);
        // To this thread, in which alone it is let through: the stop is over when this returns, and
        // not at some time after the handler was set again.
        let _ = with_signal(libc::SIG_UNBLOCK, signal, || {
            // SAFETY: both calls take integers only.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), libc::gettid(), signal) };
        });
        let _ = set_action(signal, on_suspend as *const () as libc::sighandler_t, libc::SA_RESTART);
        // A stop that did not happen is followed by no SIGCONT, and the terminal is not raw any more.
        tell();
    });
}

/// Calls `work` with the calling thread's mask changed by one signal, as `how` says. Safe in a signal
/// handler if `work` is.
pub(super) fn with_signal(
    how: libc::c_int,
    signal: libc::c_int,
    work: impl FnOnce(),
) -> Result<(), Errno> {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    let mut before = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initialises `set`, of which only then a pointer is used; pthread_sigmask
    // initialises `before` if it succeeds, and its failure is returned before that is used.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), signal);
        match libc::pthread_sigmask(how, set.as_ptr(), before.as_mut_ptr()) {
            0 => {}
            errno => return Err(Errno::from_raw(errno)),
        }
    }
    work();
    // SAFETY: `before` was initialised above.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), ptr::null_mut()) };
    Ok(())
}
