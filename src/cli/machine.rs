//! VMs with their host memory, made from a validated configuration, and their figures at a moment.

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use super::config::{MachineConfig, UsageError};
use super::fleet::{Done, Fleet, Member};
use super::paging::Paging;
use crate::abi;
use crate::addr::{Gfn, PAGE_SIZE_U64};
use crate::direct_mmu::DirectStats;
use crate::host_mm::swap::{SwapError, SwapOpenError};
use crate::host_mm::{HostMemory, HostMm, MmError, MmStats};
use crate::iotlb::IotlbStats;
use crate::shadow_mmu::ShadowStats;
use crate::sys::signal;
use crate::vmm::direct::DirectProcessor;
use crate::vmm::{
    Contract, ContractVm, DirectVm, DmaStats, GuestCounters, Processor, Removal, ShadowProcessor,
    VcpuCounts, Vm, VmConfig, VmError, VmObserver,
};

/// A kind of VM, by how one is made from a configuration.
pub(crate) trait Kind: Contract {
    /// Makes one, ready to start, that is configured as `vm` besides.
    ///
    /// # Errors
    /// As its own `new`.
    fn make(
        config: &MachineConfig,
        vm: &VmConfig,
        mm: &Arc<HostMm>,
        console: Box<dyn Write + Send>,
    ) -> Result<ContractVm<Self>, VmError>;
}

impl Kind for ShadowProcessor {
    fn make(
        config: &MachineConfig,
        vm: &VmConfig,
        mm: &Arc<HostMm>,
        console: Box<dyn Write + Send>,
    ) -> Result<Vm, VmError> {
        Vm::new_assuming(config.assume_host, vm, mm, console)
    }
}

impl Kind for DirectProcessor {
    fn make(
        config: &MachineConfig,
        vm: &VmConfig,
        mm: &Arc<HostMm>,
        console: Box<dyn Write + Send>,
    ) -> Result<DirectVm, VmError> {
        let removal = match config.paging {
            Paging::Direct(removal) => removal,
            Paging::Shadow => Removal::default(),
        };
        DirectVm::new(vm, removal, mm, console)
    }
}

/// Host memory and the VMs over it: one, ready to start, to begin with.
pub(crate) struct Machine<P: Processor> {
    pub(crate) mm: HostMemory,
    pub(crate) fleet: Fleet<P>,
    phases: Arc<Phases>,
}

/// Told of the pages that the guest's oracle watches: their number from the first.
type OnWatched = Box<dyn Fn(Gfn, u64) + Send + Sync>;

/// What is to be known of a guest's phases.
pub(crate) struct Phases {
    /// Where sabotage is limited to the pages that the guest's oracle watches, once the guest has
    /// named them: what is found is then a page, not a guest kernel that fell over itself.
    sabotaged: Option<Arc<HostMm>>,
    is_working: AtomicBool,
    on_watched: OnceLock<OnWatched>,
}

impl Phases {
    pub(super) fn new(mm: &Arc<HostMm>) -> Self {
        let sabotaged = mm.config().sabotage.map(|_| mm.clone());
        if let Some(mm) = &sabotaged {
            mm.lab().limit_sabotage(Gfn::new(0), 0);
        }
        Self { sabotaged, is_working: AtomicBool::new(false), on_watched: OnceLock::new() }
    }

    /// Whether the guest has begun to work.
    pub(crate) fn is_working(&self) -> bool {
        // Relaxed: nothing else is told by it.
        self.is_working.load(Ordering::Relaxed)
    }
}

impl VmObserver for Phases {
    fn phase(&self, phase: u64, first: Gfn, count: u64) {
        if let Some(mm) = &self.sabotaged {
            mm.lab().limit_sabotage(first, count);
        }
        if let Some(on_watched) = self.on_watched.get() {
            on_watched(first, count);
        }
        if phase == abi::PHASE_RUN {
            self.is_working.store(true, Ordering::Relaxed);
        }
    }
}

impl<P: Contract> Machine<P> {
    /// Reserves host memory, opens swap, makes the VM and loads its kernel, which is then no longer
    /// part of `config`: it would take the host's memory a second time.
    ///
    /// # Errors
    /// A [`UsageError`] if it is the configuration's fault, otherwise what the host refused.
    pub(crate) fn new(
        config: &mut MachineConfig,
        console: Box<dyn Write + Send>,
    ) -> anyhow::Result<Self>
    where
        P: Kind,
    {
        let paging = config.paging;
        let from_mm = |error| from_mm(error, paging);
        let mut mm = HostMemory::new(config.host.clone()).map_err(from_mm)?;
        let phases = Arc::new(Phases::new(&mm));
        let kernel = std::mem::take(&mut config.vm.kernel);
        let observer = Some(phases.clone() as Arc<dyn VmObserver>);
        let vm_config = VmConfig { kernel, observer, ..config.vm.clone() };
        let vm = P::make(config, &vm_config, &mm, console);
        let vm = vm.map_err(|error| from_vm(error, paging))?;
        mm.start_reclaim().map_err(from_mm)?;
        Ok(Self { mm, fleet: Fleet::new(vm, phases.clone()), phases })
    }

    /// Calls `on_watched` with the pages that the guests' oracles watch, when a guest says so. Only
    /// the first call counts.
    pub(crate) fn on_watched(&self, on_watched: impl Fn(Gfn, u64) + Send + Sync + 'static) {
        let _ = self.phases.on_watched.set(Box::new(on_watched));
    }

    /// What has happened so far, in all VMs together.
    pub(crate) fn figures(&self) -> Figures {
        let Done { guest, vcpus, faults, shadow, direct, dma, iotlb } = self.fleet.done();
        Figures { guest, vcpus, faults, shadow, direct, dma, iotlb, host: self.mm.stats() }
    }

    /// Lets go of every VM, unless the end is to be quick; false if one has not ended.
    pub(crate) fn retire_all(&mut self) -> bool {
        let has_ended = |member: &Member<P>| member.has_ended;
        while self.fleet.members.first().is_some_and(has_ended) && !signal::is_stop_asked() {
            self.fleet.retire(0, &self.mm);
        }
        self.fleet.members.is_empty()
    }
}

/// All counters at one moment.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Figures {
    pub(crate) guest: GuestCounters,
    pub(crate) vcpus: VcpuCounts,
    /// Of all kinds, that were fixed.
    pub(crate) faults: u64,
    pub(crate) shadow: ShadowStats,
    pub(crate) direct: DirectStats,
    pub(crate) dma: DmaStats,
    pub(crate) iotlb: IotlbStats,
    pub(crate) host: MmStats,
}

impl Figures {
    /// Most bytes of frames that were ever in use.
    pub(crate) fn peak_frame_bytes(&self) -> u64 {
        self.host.peak_frames_in_use.saturating_mul(PAGE_SIZE_U64)
    }
}

/// Whose fault it is that host memory cannot be set up.
pub(crate) fn from_mm(error: MmError, paging: Paging) -> anyhow::Error {
    match &error {
        MmError::BadHostMemory { .. } => {
            UsageError(format!("--host-memory: {error}; choose another size")).into()
        }
        MmError::Swap(SwapError::Open(open)) => from_swap(open),
        MmError::Uffd(uffd) if paging == Paging::Shadow => anyhow::anyhow!("--paranoid: {uffd}"),
        MmError::Uffd(uffd) => anyhow::anyhow!("--paging direct: {uffd}"),
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
pub(crate) fn from_vm(error: VmError, paging: Paging) -> anyhow::Error {
    match error {
        VmError::Boot(boot) => UsageError(format!("cannot boot the guest: {boot}")).into(),
        VmError::MemorySize { .. } | VmError::VcpuCount { .. } | VmError::ShadowPages { .. } => {
            UsageError(error.to_string()).into()
        }
        VmError::MachineSpace { .. } => {
            UsageError(format!("{error}; choose less --memory or --host-memory")).into()
        }
        VmError::Host(host) => from_mm(host, paging),
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
            from_vm(VmError::Boot(BootError::NoSegments), Paging::Shadow),
            from_vm(VmError::VcpuCount { vcpus: 9, max: 8 }, Paging::Shadow),
            from_vm(VmError::MachineSpace { end: 1 << 40, phys_bits: 39 }, Paging::Shadow),
            from_mm(
                MmError::Swap(SwapError::Open(SwapOpenError::Exists { path: "swap".into() })),
                Paging::Shadow,
            ),
        ];
        for error in &usage {
            assert!(error.is::<UsageError>(), "{error}");
        }
        let host = from_vm(VmError::Kvm(KvmError::Missing), Paging::Shadow);
        assert!(!host.is::<UsageError>());
        assert!(host.to_string().contains("gnomon doctor"), "{host}");
    }

    #[test]
    fn a_swap_that_cannot_be_made_says_where_else() {
        let error = from_mm(
            MmError::Swap(SwapError::Open(SwapOpenError::FileSizeLimit {
                bytes: 10,
                limit_bytes: 5,
            })),
            Paging::Shadow,
        );
        assert!(error.to_string().contains("--swap-file"), "{error}");
    }
}
