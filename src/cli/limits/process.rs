//! What the host allows this process, and how much of it is taken already.

use std::fs;
use std::io;

use nix::sys::resource::{Resource, getrlimit};

use super::behind::threads_of_user;
use crate::addr::PAGE_SIZE_U64;
use crate::sync::{Mutex, lock};

/// A limit, and how much is in use of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bounded {
    pub(crate) limit: u64,
    pub(crate) used: u64,
}

impl Bounded {
    pub(crate) fn room(self) -> u64 {
        self.limit.saturating_sub(self.used)
    }
}

/// `None` where there is no limit, or the host does not say.
#[derive(Clone, Debug, Default)]
pub(crate) struct ProcessLimits {
    /// Bytes of one file (RLIMIT_FSIZE).
    pub(crate) file_bytes: Option<u64>,
    /// Bytes mapped (RLIMIT_AS).
    pub(crate) address: Option<Bounded>,
    /// Bytes of private memory (RLIMIT_DATA).
    pub(crate) data: Option<Bounded>,
    /// Open files (RLIMIT_NOFILE).
    pub(crate) descriptors: Option<Bounded>,
    /// Threads of this user (RLIMIT_NPROC), which others use, too.
    pub(crate) threads: Option<u64>,
    /// Threads that this user has; only where somebody has come up against it.
    pub(crate) threads_used: Option<u64>,
    /// Whether that limit is none for this user.
    pub(crate) is_superuser: bool,
    /// Threads of the whole machine (kernel.threads-max).
    pub(crate) kernel_threads: Option<Bounded>,
    /// Mappings (vm.max_map_count).
    pub(crate) mappings: Option<Bounded>,
    /// Bytes that may be promised (vm.overcommit_memory=2).
    pub(crate) commit: Option<Bounded>,
}

impl ProcessLimits {
    pub(crate) fn probe() -> Self {
        let status = read("/proc/self/status");
        let meminfo = read("/proc/meminfo");
        let bounded = |limit: Option<u64>, used: Option<u64>| {
            limit.map(|limit| Bounded { limit, used: used.unwrap_or(0) })
        };
        let promised = || kib(&meminfo, "CommitLimit:");
        Self {
            file_bytes: soft(Resource::RLIMIT_FSIZE),
            address: bounded(soft(Resource::RLIMIT_AS), kib(&status, "VmSize:")),
            data: bounded(soft(Resource::RLIMIT_DATA), kib(&status, "VmData:")),
            descriptors: bounded(
                soft(Resource::RLIMIT_NOFILE),
                fs::read_dir("/proc/self/fd").ok().map(|entries| entries.count() as u64),
            ),
            threads: soft(Resource::RLIMIT_NPROC),
            threads_used: None,
            is_superuser: nix::unistd::getuid().is_root(),
            kernel_threads: bounded(
                read("/proc/sys/kernel/threads-max").trim().parse().ok(),
                running_threads(&read("/proc/loadavg")),
            ),
            mappings: bounded(
                read("/proc/sys/vm/max_map_count").trim().parse().ok(),
                Some(read("/proc/self/maps").lines().count() as u64),
            ),
            commit: bounded(
                (read("/proc/sys/vm/overcommit_memory").trim() == "2").then(promised).flatten(),
                kib(&meminfo, "Committed_AS:"),
            ),
        }
    }
}

impl ProcessLimits {
    /// As [`probe`](Self::probe), once something could not be had: what has been given back meanwhile
    /// counts where the kernel remembers it.
    pub(crate) fn at_worst() -> Self {
        let peak = kib(&read("/proc/self/status"), "VmPeak:").unwrap_or(0);
        let mut limits = Self::probe();
        limits.address = limits.address.map(|now| Bounded { used: now.used.max(peak), ..now });
        limits.threads_used = threads_of_user();
        limits
    }
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn soft(resource: Resource) -> Option<u64> {
    let (soft, _) = getrlimit(resource).ok()?;
    (soft != libc::RLIM_INFINITY).then_some(soft)
}

/// The number of all threads in /proc/loadavg: `0.20 0.18 0.12 1/80 11206` has 80.
fn running_threads(loadavg: &str) -> Option<u64> {
    loadavg.split(' ').nth(3)?.split_once('/')?.1.parse().ok()
}

/// The value of a line `NAME: 123 kB` of /proc/meminfo or /proc/PID/status, in bytes.
pub(super) fn kib(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// Bytes that a thread's stack takes of the address space, with the page that guards it.
pub(super) const STACK_BYTES: u64 = (2 << 20) + PAGE_SIZE_U64;

/// Starts so many threads that live at the same time, and ends them.
///
/// # Errors
/// How many could be started, and why no more.
pub(crate) fn try_threads(count: u64) -> Result<(), (u64, io::Error)> {
    let gate = Mutex::new(());
    std::thread::scope(|scope| {
        // Let go at the end, whatever it is: until then all of them wait.
        let _closed = lock(&gate);
        for started in 0..count {
            let wait = || drop(lock(&gate));
            let spawned = std::thread::Builder::new().spawn_scoped(scope, wait);
            spawned.map_err(|error| (started, error))?;
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_read_in_kib() {
        let meminfo = "MemTotal:       100 kB\nMemAvailable:    2048 kB\n";
        assert_eq!(kib(meminfo, "MemAvailable:"), Some(2 << 20));
        assert_eq!(kib("MemTotal: 1 kB\n", "MemAvailable:"), None);
        assert_eq!(kib("MemAvailable: lots\n", "MemAvailable:"), None);
        assert_eq!(kib("MemAvailable: 18446744073709551615 kB\n", "MemAvailable:"), None);
    }

    #[test]
    fn threads_of_the_machine_are_behind_the_slash() {
        assert_eq!(running_threads("0.20 0.18 0.12 1/80 11206\n"), Some(80));
        assert_eq!(running_threads(""), None);
    }

    #[test]
    fn this_process_has_used_some_of_everything() {
        let limits = ProcessLimits::probe();
        for bounded in [limits.descriptors, limits.mappings, limits.kernel_threads] {
            assert!(bounded.is_none_or(|one| one.used > 0 && one.limit >= one.used), "{limits:?}");
        }
        assert!(try_threads(8).is_ok());
    }
}
