//! What this host allows, and what a run needs of it: compared in one place, before anything starts.
//!
//! Guarantee: [`shortages`] says what cannot be had, one sentence each with the limit, where it is
//! set, how much it would have to be, and what else can be done. `boot` and `stress` refuse with the
//! first of them; `doctor` shows all that `boot` would meet.

mod behind;
mod folder;
mod groups;
mod needs;
mod process;
mod rules;

use std::fs;

use crate::sys::small_pages::PageCost;
use process::kib;

pub(crate) use behind::behind;
pub(crate) use folder::Folder;
#[cfg(test)]
pub(crate) use groups::GroupLimit;
pub(crate) use groups::Groups;
pub(crate) use needs::{Needs, Shape, SwapInMemory};
#[cfg(test)]
pub(crate) use process::Bounded;
pub(crate) use process::ProcessLimits;
pub(crate) use rules::{Limited, Shortage, shortages};

/// What the host allows; `None` where it does not say (the run itself then finds out).
#[derive(Clone, Debug, Default)]
pub(crate) struct HostLimits {
    /// Most vCPUs that KVM runs in one VM.
    pub(crate) max_vcpus: Option<usize>,
    /// Bytes of memory that could be had without swapping.
    pub(crate) available_bytes: Option<u64>,
    /// Bytes of the host's own swap that are free.
    pub(crate) free_swap_bytes: u64,
    pub(crate) groups: Groups,
    pub(crate) process: ProcessLimits,
    /// What a page of a memfd costs.
    pub(crate) page_cost: Option<PageCost>,
    /// Whether threads are started to see that they can be.
    pub(crate) tries_threads: bool,
    /// The directory of the swap file; where it is `None` it is looked at once it is known.
    pub(crate) swap_folder: Option<Folder>,
}

impl HostLimits {
    /// Asks the host.
    pub(crate) fn probe() -> Self {
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        Self {
            max_vcpus: kvm_ioctls::Kvm::new().ok().map(|kvm| kvm.get_max_vcpus()),
            available_bytes: kib(&meminfo, "MemAvailable:"),
            free_swap_bytes: kib(&meminfo, "SwapFree:").unwrap_or(0),
            groups: Groups::probe(),
            process: ProcessLimits::probe(),
            page_cost: PageCost::measure().ok(),
            tries_threads: true,
            swap_folder: None,
        }
    }

    /// Asks it what this process has come up against: of what can be told so, the most that it ever had
    /// is what is taken. Nothing is tried.
    pub(crate) fn at_worst() -> Self {
        let process = ProcessLimits::at_worst();
        Self { groups: Groups::probe(), process, ..Self::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_says_what_it_has() {
        assert!(HostLimits::probe().available_bytes.is_some_and(|bytes| bytes > 0));
    }
}
