//! What this host allows, as far as a configuration is checked against it before anything starts.

use std::fs;
use std::path::Path;

use nix::sys::statfs::{TMPFS_MAGIC, statfs};

/// What the host allows; `None` where it does not say (the run itself then finds out).
#[derive(Clone, Debug, Default)]
pub(crate) struct HostLimits {
    /// Most vCPUs that KVM runs in one VM.
    pub(crate) max_vcpus: Option<usize>,
    /// Bytes of memory that could be had without swapping.
    pub(crate) available_bytes: Option<u64>,
}

impl HostLimits {
    /// Asks the host.
    pub(crate) fn probe() -> Self {
        Self {
            max_vcpus: kvm_ioctls::Kvm::new().ok().map(|kvm| kvm.get_max_vcpus()),
            available_bytes: available_bytes(),
        }
    }
}

/// `MemAvailable` of /proc/meminfo, in bytes.
pub(crate) fn available_bytes() -> Option<u64> {
    parse_available(&fs::read_to_string("/proc/meminfo").ok()?)
}

fn parse_available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// Whether files in that directory live in memory.
pub(crate) fn is_in_memory(dir: &Path) -> bool {
    statfs(dir).is_ok_and(|found| found.filesystem_type() == TMPFS_MAGIC)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn available_memory_is_read_in_kib() {
        let meminfo = "MemTotal:       100 kB\nMemAvailable:    2048 kB\n";
        assert_eq!(parse_available(meminfo), Some(2 << 20));
        assert_eq!(parse_available("MemTotal: 1 kB\n"), None);
        assert_eq!(parse_available("MemAvailable: lots\n"), None);
        assert_eq!(parse_available("MemAvailable: 18446744073709551615 kB\n"), None);
    }

    #[test]
    fn this_host_says_what_it_has() {
        assert!(available_bytes().is_some_and(|bytes| bytes > 0));
        assert!(!is_in_memory(Path::new("/proc")), "procfs is not tmpfs");
    }
}
