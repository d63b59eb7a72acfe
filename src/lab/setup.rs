//! VMs with their host memory, made as planned, and their figures at a moment.

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use super::fleet::{Done, Fleet, Member};
use super::plan::{Paging, SetupPlan};
use crate::abi;
use crate::addr::{Gfn, PAGE_SIZE_U64};
use crate::host_mm::{HostMemory, HostMm, MmError, MmStats};
use crate::sys::signal;
use crate::sys::threads::NotStarted;
use crate::vmm::direct::DirectProcessor;
use crate::vmm::{
    Contract, ContractVm, DirectVm, Processor, Removal, ShadowProcessor, Vm, VmConfig, VmError,
    VmObserver,
};

/// A kind of VM, by how one is made as planned.
pub trait Kind: Contract {
    /// Makes one, ready to start, that is configured as `vm` besides.
    ///
    /// # Errors
    /// As its own `new`.
    fn make(
        plan: &SetupPlan,
        vm: &VmConfig,
        mm: &Arc<HostMm>,
        console: Box<dyn Write + Send>,
    ) -> Result<ContractVm<Self>, VmError>;
}

impl Kind for ShadowProcessor {
    fn make(
        plan: &SetupPlan,
        vm: &VmConfig,
        mm: &Arc<HostMm>,
        console: Box<dyn Write + Send>,
    ) -> Result<Vm, VmError> {
        Vm::new_assuming(plan.assume_host, vm, mm, console)
    }
}

impl Kind for DirectProcessor {
    fn make(
        plan: &SetupPlan,
        vm: &VmConfig,
        mm: &Arc<HostMm>,
        console: Box<dyn Write + Send>,
    ) -> Result<DirectVm, VmError> {
        let removal = match plan.paging {
            Paging::Direct(removal) => removal,
            Paging::Shadow => Removal::default(),
        };
        DirectVm::new(vm, removal, mm, console)
    }
}

/// A run cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// Host memory cannot be had.
    #[error(transparent)]
    Host(#[from] MmError),
    /// A VM cannot be made, or started.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// A storm cannot be started.
    #[error(transparent)]
    Storm(#[from] NotStarted),
}

/// Host memory and the VMs over it: one, ready to start, to begin with.
pub struct Setup<P: Processor> {
    /// Host memory.
    pub mm: HostMemory,
    /// The VMs.
    pub fleet: Fleet<P>,
    phases: Arc<Phases>,
}

/// Told of the pages that the guest's oracle watches: their number from the first.
type OnWatched = Box<dyn Fn(Gfn, u64) + Send + Sync>;

/// What is to be known of a guest's phases.
pub(super) struct Phases {
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
    pub(super) fn is_working(&self) -> bool {
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

impl<P: Contract> Setup<P> {
    /// Reserves host memory, opens swap, makes the VM and loads its kernel, which is then no longer
    /// part of `plan`: it would take the host's memory a second time.
    ///
    /// # Errors
    /// If the plan cannot be carried out, or the host refuses something.
    pub fn new(plan: &mut SetupPlan, console: Box<dyn Write + Send>) -> Result<Self, SetupError>
    where
        P: Kind,
    {
        let mut mm = HostMemory::new(plan.host.clone())?;
        let phases = Arc::new(Phases::new(&mm));
        let kernel = std::mem::take(&mut plan.vm.kernel);
        let observer = Some(phases.clone() as Arc<dyn VmObserver>);
        let vm_config = VmConfig { kernel, observer, ..plan.vm.clone() };
        let vm = P::make(plan, &vm_config, &mm, console)?;
        mm.start_reclaim()?;
        Ok(Self { mm, fleet: Fleet::new(vm, phases.clone()), phases })
    }

    /// Calls `on_watched` with the pages that the guests' oracles watch, when a guest says so. Only
    /// the first call counts.
    pub fn on_watched(&self, on_watched: impl Fn(Gfn, u64) + Send + Sync + 'static) {
        let _ = self.phases.on_watched.set(Box::new(on_watched));
    }

    /// What has happened so far, in all VMs together.
    pub fn figures(&self) -> Figures {
        Figures { done: self.fleet.done(), host: self.mm.stats() }
    }

    /// Lets go of every VM, unless the end is to be quick; false if one has not ended.
    pub fn retire_all(&mut self) -> bool {
        let has_ended = |member: &Member<P>| member.has_ended;
        while self.fleet.members.first().is_some_and(has_ended) && !signal::is_stop_asked() {
            self.fleet.retire(0, &self.mm);
        }
        self.fleet.members.is_empty()
    }
}

/// All counters at one moment.
#[derive(Clone, Copy, Debug, Default)]
pub struct Figures {
    /// Of the VMs, those that are gone among them.
    pub done: Done,
    /// Of host memory.
    pub host: MmStats,
}

impl Figures {
    /// Most bytes of frames that were ever in use.
    pub fn peak_frame_bytes(&self) -> u64 {
        self.host.peak_frames_in_use.saturating_mul(PAGE_SIZE_U64)
    }
}
