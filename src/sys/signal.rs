//! Signals: the kick that takes a thread out of a blocking system call, and the user's wish to
//! stop.
//!
//! Guarantees: a kick interrupts a blocking call of the thread (it returns `EINTR`) and does
//! nothing else. It is not remembered: a thread that has not yet entered its call is missed, so the
//! kicker sets a flag first (for a vCPU: `immediate_exit`). The first SIGINT, SIGTERM, SIGHUP,
//! SIGQUIT, or any other signal that would end the process and is no fault of its own, is noted and
//! stays noted; a second one of the four, which comes at least [`SECOND_AFTER`] later, ends the
//! process at once, whatever its threads are in. What comes sooner is the same request, delivered again,
//! and changes nothing. Each of them gives a terminal that was made raw its settings back first, and the
//! second removes what would be [left over](super::names).

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

/// What a thread is kicked with. Not one of the real-time signals: those are queued, and when the
/// queue, which all processes of a user share, is full (RLIMIT_SIGPENDING), they are refused. One that
/// is left over does no harm anywhere: by default it is ignored.
pub const KICK: libc::c_int = libc::SIGURG;

/// Proof that the kick signal ([`KICK`]) has its handler, without which it would interrupt nothing.
#[derive(Clone, Copy, Debug)]
pub struct KickSignal(());

impl KickSignal {
    /// Sets the handler, for the whole process; again is harmless.
    ///
    /// # Errors
    ///
    /// The errno of `sigaction`.
    pub fn install() -> io::Result<Self> {
        // No SA_RESTART: the interruption is what the signal is for.
        set_action(KICK, on_kick as *const () as libc::sighandler_t, 0)?;
        Ok(Self(()))
    }

    /// A handle to kick the calling thread with.
    #[must_use]
    pub fn this_thread(self) -> KickTarget {
        // SAFETY: gettid has no arguments and cannot fail.
        KickTarget { thread: unsafe { libc::gettid() } }
    }
}

/// A thread of this process that can be kicked.
///
/// It names the thread by its kernel id and not by `pthread_t`, whose use after the thread's end
/// would be undefined: here it is an error, or, if the id was given to another thread of this
/// process since, one `EINTR` more there.
#[derive(Clone, Copy, Debug)]
pub struct KickTarget {
    thread: libc::pid_t,
}

impl KickTarget {
    /// The kernel's id of the thread.
    #[must_use]
    pub fn thread_id(self) -> libc::pid_t {
        self.thread
    }

    /// Interrupts the thread's blocking system call, if it is in one.
    ///
    /// # Errors
    ///
    /// `ESRCH` if the thread has ended.
    pub fn kick(self) -> io::Result<()> {
        // SAFETY: tgkill takes integers only. It reaches threads of this process alone, and the
        // handler of the signal does nothing (a KickSignal made this value).
        let result = unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), self.thread, KICK) };
        Errno::result(result)?;
        Ok(())
    }
}

extern "C" fn on_kick(_signal: libc::c_int) {}

/// Kicks the thread that started it again and again until it is dropped, whatever system call the
/// thread is in.
#[derive(Debug)]
pub struct KickTimer {
    timer: libc::timer_t,
}

impl KickTimer {
    /// The first kick comes after `first`, the others every `interval` from there (at least 1 ns
    /// each, below one second).
    ///
    /// # Errors
    ///
    /// `EAGAIN` if the kernel has no timer left for this user (RLIMIT_SIGPENDING).
    pub fn start(signal: KickSignal, first: Duration, interval: Duration) -> io::Result<Self> {
        // SAFETY: sigevent is a C structure of integers and pointers: all zeros is a value of it.
        let mut event: libc::sigevent = unsafe { MaybeUninit::zeroed().assume_init() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = KICK;
        event.sigev_notify_thread_id = signal.this_thread().thread;
        let mut timer: libc::timer_t = ptr::null_mut();
        // SAFETY: both pointers are to local variables of the types that timer_create wants. The
        // signal has its harmless handler (a KickSignal says so).
        let made =
            unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer) };
        Errno::result(made)?;
        let this = Self { timer };
        let timespec = |time: Duration| libc::timespec {
            tv_sec: 0,
            tv_nsec: i64::from(time.subsec_nanos().max(1)),
        };
        let times = libc::itimerspec { it_interval: timespec(interval), it_value: timespec(first) };
        // SAFETY: the timer was made above and is deleted only by `drop`; `times` is a complete
        // itimerspec, and the old value is not asked for.
        let set = unsafe { libc::timer_settime(timer, 0, &raw const times, ptr::null_mut()) };
        Errno::result(set)?;
        Ok(this)
    }
}

impl Drop for KickTimer {
    fn drop(&mut self) {
        // SAFETY: the timer was made by `start`, and only this deletes it.
        unsafe { libc::timer_delete(self.timer) };
    }
}

/// Makes writing beyond the size that files may have (RLIMIT_FSIZE) an error, `EFBIG`, where the
/// kernel would end the process.
///
/// # Errors
///
/// The errno of `sigaction`.
pub fn ignore_file_size_signal() -> io::Result<()> {
    Ok(set_action(libc::SIGXFSZ, libc::SIG_IGN, 0)?)
}

/// What asks a process to stop: the user, the system, the terminal that goes away, the user again.
const STOP_SIGNALS: [libc::c_int; 4] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT];
/// What would end the process without a word and is no fault of its own: a limit on processor time, power
/// that fails, timers, and what anybody may send for reasons of his own. Each is a first request to stop,
/// and never a second: the kernel sends SIGXCPU every second, and timers go off again. (SIGPIPE is
/// ignored by the standard library, SIGXFSZ by [`ignore_file_size_signal`].)
const OTHER_ENDS: [libc::c_int; 9] = [
    libc::SIGXCPU,
    libc::SIGPWR,
    libc::SIGALRM,
    libc::SIGVTALRM,
    libc::SIGPROF,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGIO,
    libc::SIGSTKFLT,
];
/// What comes of a fault of our own. The process ends by it, with its core, once the terminal has its
/// settings back. (SIGSEGV and SIGBUS are the standard library's, which tells a stack that overflowed, and
/// then aborts.)
const FAULTS: [libc::c_int; 5] =
    [libc::SIGABRT, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP, libc::SIGSYS];
/// The first of [`STOP_SIGNALS`] or [`OTHER_ENDS`] that came; 0 if none.
static STOP_SIGNAL: AtomicI32 = AtomicI32::new(0);
/// Readable once a stop was asked for. Never read, never closed.
static STOP_EVENT: OnceLock<EventFd> = OnceLock::new();
/// [`STOP_EVENT`]'s descriptor for the handler, which may not wait for a `OnceLock`; -1 before.
static STOP_DESCRIPTOR: AtomicI32 = AtomicI32::new(-1);

/// When [`STOP_SIGNAL`] came, in nanoseconds of the monotonic clock; 0 before.
static STOP_TIME: AtomicU64 = AtomicU64::new(0);

/// Whether the process was asked to stop: then the end is to be quick. Whoever goes through all memory
/// only to compare, to count or to tidy up asks this as he goes, and leaves off; what he has to tell
/// then says nothing of the rest, and whoever asked for it looks here, too, and says so.
#[must_use]
pub fn is_stop_asked() -> bool {
    #[cfg(feature = "testing")]
    if let Some(is_asked) = pretended::look() {
        return is_asked;
    }
    // Acquire pairs with the AcqRel in `on_stop`, for the sake of the time.
    STOP_SIGNAL.load(Ordering::Acquire) != 0
}

/// Time from the first signal on in which another one is the same request once more: `timeout` signals
/// its child and then the child's group, and a terminal that closes sends SIGHUP more than once.
pub const SECOND_AFTER: Duration = Duration::from_millis(200);

/// Whether a signal is a second request, by the times of the first one and of this, in nanoseconds.
const fn is_second(first: u64, now: u64) -> bool {
    now.saturating_sub(first) as u128 >= SECOND_AFTER.as_nanos()
}

/// How long after the signal that asked for a stop anything is waited for.
pub const STOP_PATIENCE: Duration = Duration::from_secs(1);

/// Whether a stop was asked for so long ago that nothing is to be waited for any more.
#[must_use]
pub fn is_patience_over() -> bool {
    #[cfg(feature = "testing")]
    if let Some(is_asked) = pretended::look() {
        return is_asked;
    }
    is_stop_asked() && since_stop() >= STOP_PATIENCE
}

/// Time since the signal that asked for a stop; none has any meaning before.
fn since_stop() -> Duration {
    // Relaxed: it was set before the signal was, and whoever asks has seen that.
    let then = STOP_TIME.load(Ordering::Relaxed);
    Duration::from_nanos(monotonic_nanos().saturating_sub(then))
}

/// Ends the process without a further word: nothing is unwound, flushed or waited for. A terminal that
/// was made raw gets its settings back.
pub fn exit_now(code: u8) -> ! {
    super::terminal::restore();
    // SAFETY: _exit takes an integer and does not return.
    unsafe { libc::_exit(code.into()) }
}

/// Tells whether the process was asked to stop by SIGINT, SIGTERM, SIGHUP or SIGQUIT, or by one of the
/// other signals that would end it.
#[derive(Clone, Copy, Debug)]
pub struct StopNotice {
    event: &'static EventFd,
}

impl StopNotice {
    /// Takes over those signals for the whole process. The first of any is noted; the second
    /// ([`SECOND_AFTER`] later) ends a process that does not stop by itself. A SIGHUP that is ignored
    /// stays so (`nohup`), and so does any of the others but SIGINT, SIGTERM and SIGQUIT.
    ///
    /// # Errors
    ///
    /// The errno of `eventfd` or `sigaction`.
    pub fn install() -> io::Result<Self> {
        let event = match STOP_EVENT.get() {
            Some(event) => event,
            None => {
                let new = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
                STOP_EVENT.get_or_init(|| new)
            }
        };
        // Pairs with the Acquire load in on_stop.
        STOP_DESCRIPTOR.store(event.as_fd().as_raw_fd(), Ordering::Release);
        let notice = Self { event };
        if notice.signal().is_some() {
            // The user has asked once.
            return Ok(notice);
        }
        for signal in FAULTS {
            set_action(signal, on_fault as *const () as libc::sighandler_t, libc::SA_ONSTACK)?;
        }
        for signal in OTHER_ENDS.into_iter().chain(STOP_SIGNALS) {
            let may_be_ignored = signal == libc::SIGHUP || OTHER_ENDS.contains(&signal);
            if may_be_ignored && is_ignored(signal)? {
                continue;
            }
            // SA_RESTART: the notice is for who looks, not an error for whoever is in a system
            // call.
            set_action(signal, on_stop as *const () as libc::sighandler_t, libc::SA_RESTART)?;
        }
        Ok(notice)
    }

    /// The signal that asked for the stop (its number), if one has come.
    #[must_use]
    pub fn signal(self) -> Option<i32> {
        // Acquire pairs with the AcqRel in `on_stop`, for the sake of the time.
        Some(STOP_SIGNAL.load(Ordering::Acquire)).filter(|&signal| signal != 0)
    }

    /// Time since the signal came; `None` if none has.
    #[must_use]
    pub fn since(self) -> Option<Duration> {
        self.signal().map(|_| since_stop())
    }

    /// Waits until a stop is asked for or `timeout` (`None`: none) is over; returns whether it was
    /// asked for.
    ///
    /// # Errors
    ///
    /// The errno of `poll`.
    pub fn wait(self, timeout: Option<Duration>) -> io::Result<bool> {
        let timeout = match timeout {
            None => PollTimeout::NONE,
            Some(limit) => PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX),
        };
        loop {
            let mut fds = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, timeout) {
                Ok(ready) => return Ok(ready > 0),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

/// Readable once a stop was asked for: for a poll of several things. Do not read from it.
impl AsFd for StopNotice {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

/// The body of a signal handler, which has to leave errno as it was.
pub(super) fn keeping_errno(body: impl FnOnce()) {
    // SAFETY: the location of this thread's errno is always valid.
    let errno = unsafe { *libc::__errno_location() };
    body();
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

extern "C" fn on_stop(signal: libc::c_int) {
    keeping_errno(|| note_stop(signal, monotonic_nanos()));
}

/// Only calls that are safe in a signal handler: atomics, clock_gettime, tcgetpgrp, tcsetattr,
/// pthread_sigmask, write, and what [`end_now`] calls.
fn note_stop(signal: libc::c_int, now: u64) {
    super::terminal::restore();
    let time = STOP_TIME.compare_exchange(0, now, Ordering::Relaxed, Ordering::Relaxed);
    // AcqRel: whoever sees the signal sees its time.
    if STOP_SIGNAL.compare_exchange(0, signal, Ordering::AcqRel, Ordering::Relaxed).is_err() {
        // Two may be noted at the same moment by two threads: then either may have set the time.
        let may_end = STOP_SIGNALS.contains(&signal);
        if may_end && time.is_err_and(|first| is_second(first, now)) {
            end_now(signal);
        }
        return;
    }
    // Acquire pairs with the Release store in StopNotice::install.
    let descriptor = STOP_DESCRIPTOR.load(Ordering::Acquire);
    let one = 1u64;
    // SAFETY: writes 8 bytes from a local variable to an eventfd that is never closed (or to -1:
    // EBADF).
    let _ = unsafe { libc::write(descriptor, ptr::from_ref(&one).cast(), size_of::<u64>()) };
}

/// The second signal: ends the process by the signal's default action, which a waiting parent is told.
fn end_now(signal: libc::c_int) -> ! {
    // First of all: where the file system hangs, a third one ends it.
    for signal in STOP_SIGNALS {
        if !(signal == libc::SIGHUP && is_ignored(signal).unwrap_or(false)) {
            let _ = set_action(signal, libc::SIG_DFL, 0);
        }
    }
    super::names::remove_all();
    die_by(signal)
}

/// A fault of our own: only calls that are safe in a signal handler.
extern "C" fn on_fault(signal: libc::c_int) {
    super::terminal::restore();
    let _ = set_action(signal, libc::SIG_DFL, 0);
    die_by(signal)
}

/// Ends the process by a signal whose action is the default one. Safe in a signal handler.
fn die_by(signal: libc::c_int) -> ! {
    // SAFETY: a sigset_t is integers, initialised by sigemptyset before use; the calls change this
    // thread's mask and send it a signal.
    unsafe {
        let mut set: libc::sigset_t = MaybeUninit::zeroed().assume_init();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, signal);
        // It is blocked while its handler runs.
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, ptr::null_mut());
        libc::raise(signal);
        // The first process of a container does not get the default action.
        libc::_exit(128 + signal)
    }
}

/// The monotonic clock. Safe in a signal handler.
fn monotonic_nanos() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: fills in a local timespec.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    let [seconds, nanos] = [time.tv_sec, time.tv_nsec].map(i64::unsigned_abs);
    seconds.saturating_mul(1_000_000_000).saturating_add(nanos)
}

/// Whether a signal is ignored. Safe in a signal handler.
pub(super) fn is_ignored(signal: libc::c_int) -> Result<bool, Errno> {
    // SAFETY: sigaction is a C structure of integers and an optional function pointer: all zeros is
    // a value of it.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    // SAFETY: `action` is a local sigaction, which is filled in; nothing is set.
    Errno::result(unsafe { libc::sigaction(signal, ptr::null(), &raw mut action) })?;
    Ok(action.sa_sigaction == libc::SIG_IGN)
}

/// `sigaction` with an empty mask. Safe in a signal handler.
pub(super) fn set_action(
    signal: libc::c_int,
    handler: libc::sighandler_t,
    flags: libc::c_int,
) -> Result<(), Errno> {
    // SAFETY: sigaction is a C structure of integers and an optional function pointer: all zeros is
    // a value of it, with an empty mask.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    action.sa_sigaction = handler;
    action.sa_flags = flags;
    // SAFETY: `action` is a complete sigaction; the handlers that this module passes are SIG_DFL or
    // functions of the type that sigaction wants without SA_SIGINFO, and they make only
    // async-signal-safe calls.
    let result = unsafe { libc::sigaction(signal, &raw const action, ptr::null_mut()) };
    Errno::result(result)?;
    Ok(())
}

/// For tests of what leaves off when a stop is asked for: signals are the whole process's, and so
/// are not for them.
#[cfg(feature = "testing")]
#[doc(hidden)]
pub mod pretended {
    use std::cell::Cell;

    thread_local! {
        static LOOKS_LEFT: Cell<Option<u32>> = const { Cell::new(None) };
    }

    /// As long as it lives, this thread finds that a stop was asked for.
    #[must_use]
    #[derive(Debug)]
    pub struct Stop(());

    impl Stop {
        /// From the look after so many.
        pub fn after(looks: u32) -> Self {
            LOOKS_LEFT.set(Some(looks));
            Self(())
        }
    }

    impl Drop for Stop {
        fn drop(&mut self) {
            LOOKS_LEFT.set(None);
        }
    }

    /// Whether a stop is pretended to be asked for; `None` if nothing is pretended.
    pub(super) fn look() -> Option<bool> {
        let left = LOOKS_LEFT.get()?;
        LOOKS_LEFT.set(Some(left.saturating_sub(1)));
        Some(left == 0)
    }
}

#[cfg(test)]
#[path = "signal_tests.rs"]
mod tests;
