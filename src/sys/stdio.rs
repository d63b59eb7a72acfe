//! Descriptors that the process was given: whether standard output was one of them, and others by their
//! numbers.
//!
//! The standard library opens `/dev/null` for each of the first three descriptors that is closed, so
//! that no file of the program gets its number. What is printed then vanishes without an error, and
//! whoever closed it by mistake is told nothing. So this looks before that.

use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

static STDOUT_WAS_CLOSED: AtomicBool = AtomicBool::new(false);

extern "C" fn look() {
    // SAFETY: F_GETFD reads a flag of a descriptor, if there is one.
    let flags = unsafe { libc::fcntl(libc::STDOUT_FILENO, libc::F_GETFD) };
    // Relaxed: no other thread exists yet.
    STDOUT_WAS_CLOSED.store(flags == -1, Ordering::Relaxed);
}

// SAFETY: the C library calls what stands in this section before `main`, and so before the standard
// library's own beginning. `look` needs nothing of either: it makes a system call and stores a bool.
#[used]
#[unsafe(link_section = ".init_array")]
static LOOK: extern "C" fn() = look;

/// Whether it was closed. What is written to it goes nowhere.
#[must_use]
pub fn stdout_was_closed() -> bool {
    STDOUT_WAS_CLOSED.load(Ordering::Relaxed)
}

/// Another descriptor for what is open under `number`, with the same offset.
///
/// # Errors
/// If nothing is.
pub fn duplicate(number: RawFd) -> io::Result<File> {
    // SAFETY: makes a new descriptor, and changes nothing of the one that it is asked about.
    let new = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) };
    if new == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it was made just now, and nobody else knows of it.
    Ok(unsafe { File::from_raw_fd(new) })
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt;
    use std::process::{Command, Stdio};

    use super::*;

    /// Set for this test in a process of its own, which has no standard output.
    const OTHER_HALF: &str = "GNOMON_TEST_WITHOUT_STDOUT";

    #[test]
    fn it_is_seen_from_before_main() {
        if std::env::var_os(OTHER_HALF).is_some() {
            std::process::exit(if stdout_was_closed() { 42 } else { 0 });
        }
        let mut without = Command::new(std::env::current_exe().unwrap());
        without.args(["--exact", "stdio::tests::it_is_seen_from_before_main"]);
        without.env(OTHER_HALF, "").stderr(Stdio::null());
        let close = || {
            // SAFETY: closes a descriptor of the child's, between fork and exec.
            unsafe { libc::close(libc::STDOUT_FILENO) };
            Ok(())
        };
        // SAFETY: `close` makes a system call and nothing else.
        unsafe { without.pre_exec(close) };
        assert_eq!(without.status().unwrap().code(), Some(42));
        let mut with = Command::new(std::env::current_exe().unwrap());
        with.args(["--exact", "stdio::tests::it_is_seen_from_before_main"]);
        with.env(OTHER_HALF, "").stdout(Stdio::null());
        assert_eq!(with.status().unwrap().code(), Some(0), "it is open there");
    }
}
