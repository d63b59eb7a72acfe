//! A VM with its host memory, made from a validated configuration, and its figures at a moment.

use std::io::Write;
use std::sync::{Arc, OnceLock};

use super::config::{MachineConfig, UsageError};
use crate::addr::{Gfn, PAGE_SIZE_U64};
use crate::host_mm::swap::{SwapError, SwapOpenError};
use crate::host_mm::{HostMm, MmError, MmStats};
use crate::shadow_mmu::ShadowStats;
use crate::vmm::{GuestCounters, VcpuCounts, Vm, VmError, VmObserver};

/// A VM, ready to start.
pub(crate) struct Machine {
    pub(crate) mm: Arc<HostMm>,
    pub(crate) vm: Vm,
    watch: Arc<GuestWatch>,
}

/// Told of the pages that the guest's oracle watches: their number from the first.
type OnWatched = Box<dyn Fn(Gfn, u64) + Send + Sync>;

/// Hears from the guest which pages its oracle watches.
///
/// Sabotage is limited to them: what is found is then a page, not a guest kernel that fell over
/// itself.
struct GuestWatch {
    mm: Arc<HostMm>,
    on_watched: OnceLock<OnWatched>,
}

impl VmObserver for GuestWatch {
    fn phase(&self, _phase: u64, first: Gfn, count: u64) {
        self.mm.limit_sabotage(first, count);
        if let Some(on_watched) = self.on_watched.get() {
            on_watched(first, count);
        }
    }
}

impl Machine {
    /// Reserves host memory, opens swap, makes the VM and loads its kernel.
    ///
    /// # Errors
    /// A [`UsageError`] if it is the configuration's fault, otherwise what the host refused.
    pub(crate) fn new(
        config: &MachineConfig,
        console: Box<dyn Write + Send>,
    ) -> anyhow::Result<Self> {
        let mm = HostMm::new(config.host.clone()).map_err(from_mm)?;
        let mut vm_config = config.vm.clone();
        mm.limit_sabotage(Gfn::new(0), 0);
        let watch = Arc::new(GuestWatch { mm: mm.clone(), on_watched: OnceLock::new() });
        vm_config.observer = Some(watch.clone());
        let vm = Vm::new_assuming(config.assume_host, &vm_config, &mm, console).map_err(from_vm)?;
        mm.start_background_reclaim().map_err(from_mm)?;
        Ok(Self { mm, vm, watch })
    }

    /// Calls `on_watched` with the pages that the guest's oracle watches, when the guest says so. Only
    /// the first call counts.
    pub(crate) fn on_watched(&self, on_watched: impl Fn(Gfn, u64) + Send + Sync + 'static) {
        let _ = self.watch.on_watched.set(Box::new(on_watched));
    }

    /// What has happened so far.
    pub(crate) fn figures(&self) -> Figures {
        Figures {
            guest: self.vm.guest_counters(),
            vcpus: self.vm.counts(),
            shadow: self.vm.shadow().stats(),
            host: self.mm.stats(),
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // The last to hold host memory removes the swap file; that must be this thread.
        self.mm.stop_background_reclaim();
    }
}

/// All counters at one moment.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Figures {
    pub(crate) guest: GuestCounters,
    pub(crate) vcpus: VcpuCounts,
    pub(crate) shadow: ShadowStats,
    pub(crate) host: MmStats,
}

impl Figures {
    /// Most bytes of frames that were ever in use.
    pub(crate) fn peak_frame_bytes(&self) -> u64 {
        self.host.peak_frames_in_use.saturating_mul(PAGE_SIZE_U64)
    }
}

/// Whose fault it is that host memory cannot be set up.
fn from_mm(error: MmError) -> anyhow::Error {
    match &error {
        MmError::BadHostMemory { .. } => {
            UsageError(format!("--host-memory: {error}; choose another size")).into()
        }
        MmError::Swap(SwapError::Open(open)) => from_swap(open),
        MmError::Uffd(uffd) => anyhow::anyhow!("--paranoid: {uffd}"),
        _ => error.into(),
    }
}

fn from_swap(error: &SwapOpenError) -> anyhow::Error {
    let advice = match error {
        SwapOpenError::Exists { .. } => return UsageError(error.to_string()).into(),
        SwapOpenError::TooLarge { .. } => "choose less with --swap-size",
        SwapOpenError::Create { .. } => "name another place with --swap-file",
        SwapOpenError::CreateTemporary { .. } => {
            "name a place with --swap-file, or a directory in TMPDIR"
        }
        SwapOpenError::Resize { .. } | SwapOpenError::FileSizeLimit { .. } => {
            "choose less with --swap-size, or another place with --swap-file"
        }
    };
    UsageError(format!("{error}; {advice}")).into()
}

/// Whose fault it is that a VM cannot be made.
fn from_vm(error: VmError) -> anyhow::Error {
    match error {
        VmError::Boot(boot) => UsageError(format!("cannot boot the guest: {boot}")).into(),
        VmError::MemorySize { .. } | VmError::VcpuCount { .. } | VmError::ShadowPages { .. } => {
            UsageError(error.to_string()).into()
        }
        VmError::MachineSpace { .. } => {
            UsageError(format!("{error}; choose less --memory or --host-memory")).into()
        }
        VmError::Host(host) => from_mm(host),
        VmError::Kvm(kvm) => anyhow::anyhow!("{kvm} (gnomon doctor tells more)"),
        _ => error.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::KvmError;
    use crate::vmm::boot::BootError;

    #[test]
    fn what_the_user_can_change_is_a_usage_error() {
        let usage: [anyhow::Error; 4] = [
            from_vm(VmError::Boot(BootError::NoSegments)),
            from_vm(VmError::VcpuCount { vcpus: 9, max: 8 }),
            from_vm(VmError::MachineSpace { end: 1 << 40, phys_bits: 39 }),
            from_mm(MmError::Swap(SwapError::Open(SwapOpenError::Exists { path: "swap".into() }))),
        ];
        for error in &usage {
            assert!(error.is::<UsageError>(), "{error}");
        }
        let host = from_vm(VmError::Kvm(KvmError::Missing));
        assert!(!host.is::<UsageError>());
        assert!(host.to_string().contains("gnomon doctor"), "{host}");
    }

    #[test]
    fn a_swap_that_cannot_be_made_says_where_else() {
        let error = from_mm(MmError::Swap(SwapError::Open(SwapOpenError::FileSizeLimit {
            bytes: 10,
            limit_bytes: 5,
        })));
        assert!(error.to_string().contains("--swap-file"), "{error}");
    }
}
