//! How a VM is made from its parts, at its boot or as a clone.

use std::any::Any;
use std::io::Write;
use std::sync::Arc;

use kvm_bindings::CpuId;
use vm_memory::MmapRegion;

use crate::abi;
use crate::addr::{Gpa, PAGE_SIZE_U64};
use crate::host_mm::{HostMm, MemoryObject};
use crate::shadow_mmu::{ShadowConfig, ShadowMmu, TableMemory};
use crate::sync::Mutex;
use crate::vmm::contract::boot::{self, BootMap, Image};
use crate::vmm::contract::bus::AbiBus;
use crate::vmm::contract::config::{VmConfig, check_memory, check_vcpus};
use crate::vmm::contract::control_block::{ControlBlock, window_bytes};
use crate::vmm::contract::observer::VmObserver;
use crate::vmm::contract::services::{self, Services};
use crate::vmm::contract::vm::{Contract, ContractVm};
use crate::vmm::cpu::GuestCpu;
use crate::vmm::error::VmError;
use crate::vmm::kvm::cpuid_offered::CpuidTable;
use crate::vmm::kvm::device::{self, KvmDevice};
use crate::vmm::kvm::features::Features;
use crate::vmm::kvm::pinned::{MapError, map_pinned, map_shared};
use crate::vmm::run::core::Core;
use crate::vmm::run::gate::Paused;
use crate::vmm::run::kick::{Kick, Kicker};
use crate::vmm::run::machine::{Machine, Parts};
use crate::vmm::run::stats::FaultLatency;

use super::hw_regs;
use super::machine_space::{FRAMES_SLOT, MachinePlan, TABLES_SLOT, WINDOW_SLOT};
use super::monitor::{self, MonitorLayout, MonitorStack};
use super::probe::{HostKind, HostTraits};
use super::processor::{ShadowProcessor, StartRequest};
use super::space::ShadowSpace;
use super::tripwire;

/// Shadow pages that one vCPU needs to get past any single instruction, with room to spare.
const MIN_SHADOW_PAGES_PER_VCPU: u32 = 32;

/// What a VM and its clones have in common.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub(super) memory_bytes: u64,
    pub(super) vcpus: usize,
    shadow_pages: Option<u32>,
    kind: HostKind,
}

/// What a VM begins with: its content, and who is told.
pub(super) struct Contents {
    pub(super) object: Arc<MemoryObject>,
    pub(super) window: Arc<MmapRegion>,
    pub(super) control: ControlBlock,
    /// What its serial port prints to.
    pub(super) console: Box<dyn Write + Send>,
    pub(super) observer: Option<Arc<dyn VmObserver>>,
    /// How each vCPU begins, by index.
    pub(super) starts: Vec<Option<StartRequest>>,
}

/// A VM with shadow paging.
pub type Vm = ContractVm<ShadowProcessor>;

impl Vm {
    /// Makes a VM, loads its kernel, and leaves it ready to start. Its memory comes from `mm`;
    /// its serial port prints to `console`.
    ///
    /// # Errors
    /// [`VmError`]: KVM is not usable, the configuration or the kernel is refused, or the host
    /// lacks memory.
    pub fn new(
        config: &VmConfig,
        mm: &Arc<HostMm>,
        console: Box<dyn Write + Send>,
    ) -> Result<Self, VmError> {
        Self::new_assuming(None, config, mm, console)
    }

    /// [`Vm::new`] on a host that is taken for one of the given kind; `None` to probe it.
    /// [`HostKind::Shadow`] is right on every host. [`HostKind::Tdp`] where it does not fit costs
    /// good choices in reclaim: pages in use look unused.
    ///
    /// # Errors
    /// As [`Vm::new`].
    pub fn new_assuming(
        kind: Option<HostKind>,
        config: &VmConfig,
        mm: &Arc<HostMm>,
        console: Box<dyn Write + Send>,
    ) -> Result<Self, VmError> {
        let kind = host_kind(kind)?;
        check_memory(config.memory_bytes)?;
        let image = Image::parse(&config.kernel, config.memory_bytes)?;
        let device = KvmDevice::open()?;
        check_vcpus(config.vcpus, device.max_vcpus())?;
        let features = device::features(&device.guest_cpuid()?)?;

        let object = mm.create_object(config.memory_bytes)?;
        boot::load(&object, &image, config.cmdline.as_bytes(), BootMap::Everything)?;
        let shape = Shape {
            memory_bytes: config.memory_bytes,
            vcpus: config.vcpus,
            shadow_pages: config.shadow_pages,
            kind,
        };
        let window = map_shared("pinned window", window_bytes(shape.memory_bytes))?;
        let boot = boot::first_cpu(&image, features);
        let mut starts = vec![None; shape.vcpus];
        starts[0] = Some(StartRequest { cpu: boot, real: None });
        let contents = Contents {
            object,
            control: ControlBlock::new(window.clone(), shape.vcpus, shape.memory_bytes),
            window,
            console,
            observer: config.observer.clone(),
            starts,
        };
        Self::assemble(shape, &device, contents)
    }

    /// Makes a VM around its contents.
    pub(super) fn assemble(
        shape: Shape,
        device: &KvmDevice,
        contents: Contents,
    ) -> Result<Self, VmError> {
        let cpuid = device.guest_cpuid()?;
        let features = device::features(&cpuid)?;
        let (space, tables) = map_memory(shape, device, features, &cpuid, &contents)?;
        let space = Arc::new(space);
        let mut fds = Vec::with_capacity(shape.vcpus);
        let mut kickers = Vec::with_capacity(shape.vcpus);
        for index in 0..shape.vcpus {
            let mut fd = space.kvm.create_vcpu(index, &cpuid)?;
            hw_regs::prepare(&mut fd, &cpuid, &space.monitor)?;
            kickers.push(Arc::new(Kicker::of(&fd)?));
            fds.push(fd);
        }

        let Contents { object, window: _, control, console, observer, starts } = contents;
        let take_back = services::free_pages();
        let services = Services::new(object, control, console, observer, take_back)?;
        let kicks = kickers.iter().map(|kicker| kicker.clone() as Arc<dyn Kick>).collect();
        let core = Core::new(kicks, Arc::new(AbiBus::new(services.clone())));
        let mm = services.object.host_mm();
        let watch = tripwire::watch(mm, &space.shadow, &kickers, core.ender())?;
        // What a vCPU is before its start does not matter.
        let idle = GuestCpu::at_boot(Gpa::new(abi::BOOT_PML4_GPA), features);
        let seated = fds.into_iter().enumerate();
        let processors = seated.map(|(index, fd)| {
            let stack = MonitorStack::new(&space.monitor, tables.clone(), index);
            ShadowProcessor::new(fd, core.seat(index), space.clone(), stack, idle.clone())
        });
        let machine = Machine::of(Parts {
            processors: processors.collect(),
            starts,
            space: space.clone(),
            core,
            // The threads may have to be let go on by it.
            keep: watch.map(|watch| Box::new(watch) as Box<dyn Any + Send + Sync>),
        });
        Ok(Self::of(machine, services))
    }

    /// The VM's shadow MMU, for its statistics and checks.
    #[must_use]
    pub fn shadow(&self) -> &Arc<ShadowMmu> {
        &self.machine().space().shadow
    }
}

impl Contract for ShadowProcessor {
    fn empty_clone(
        vm: &Vm,
        observer: Option<Arc<dyn VmObserver>>,
        console: Box<dyn Write + Send>,
    ) -> Result<Vm, VmError> {
        let shape = vm.machine().space().shape;
        let device = KvmDevice::open()?;
        let window = map_shared("pinned window", window_bytes(shape.memory_bytes))?;
        let contents = Contents {
            object: vm.object().host_mm().create_object(shape.memory_bytes)?,
            control: ControlBlock::unfilled(window.clone(), shape.vcpus),
            window,
            console,
            observer,
            starts: Vec::new(),
        };
        Vm::assemble(shape, &device, contents)
    }

    fn recycle(vm: &Vm) -> Result<(), VmError> {
        match vm.machine().pause_briefly(|| vm.machine().space().recycle()) {
            Paused::Done(flushed) => Ok(flushed?),
            Paused::AlreadyDone | Paused::Stopping | Paused::GivenUp => Ok(()),
        }
    }
}

/// What kind of KVM this host has, as far as it matters to a VM.
fn host_kind(assumed: Option<HostKind>) -> Result<HostKind, VmError> {
    match HostTraits::of_this_host() {
        Some(HostTraits { zap_revokes: false, .. }) => Err(VmError::ZapWithoutEffect),
        observed => {
            let observed = observed.as_ref().map(HostTraits::kind);
            Ok(assumed.or(observed).unwrap_or(HostKind::Shadow))
        }
    }
}

/// Shadow pages for a VM that does not say: some, and then leaf tables for four times its RAM or
/// for an eighth of the frames, each far from all others, whichever is less. They come on top of
/// host memory, so a large guest in few frames must not have many.
fn default_shadow_pages(memory_bytes: u64, frames: u32, min: u32) -> u32 {
    let leaf_tables = u32::try_from(memory_bytes >> 21).unwrap_or(u32::MAX);
    leaf_tables.saturating_mul(4).min(frames / 8).saturating_add(1024).saturating_add(min)
}

/// Most bytes of shadow tables of a VM that does not say.
#[must_use]
pub fn shadow_table_bytes(memory_bytes: u64, frames: u32, vcpus: usize) -> u64 {
    let pages = default_shadow_pages(memory_bytes, frames, min_shadow_pages(vcpus));
    u64::from(pages) * PAGE_SIZE_U64
}

fn min_shadow_pages(vcpus: usize) -> u32 {
    u32::try_from(vcpus).unwrap_or(u32::MAX).saturating_mul(MIN_SHADOW_PAGES_PER_VCPU)
}

fn shadow_pages(shape: Shape, frames: u32) -> Result<u32, VmError> {
    let vcpus = shape.vcpus;
    let min = min_shadow_pages(vcpus);
    match shape.shadow_pages {
        None => Ok(default_shadow_pages(shape.memory_bytes, frames, min)),
        Some(pages) if pages >= min => Ok(pages),
        Some(pages) => Err(VmError::ShadowPages { pages, vcpus, min }),
    }
}

/// Maps the slots, writes the monitor, makes the shadow MMU and the KVM VM; and the memory of the monitor and
/// of the tables.
fn map_memory(
    shape: Shape,
    device: &KvmDevice,
    features: Features,
    cpuid: &CpuId,
    contents: &Contents,
) -> Result<(ShadowSpace, Arc<MmapRegion>), VmError> {
    let Contents { object, window, .. } = contents;
    let mm = object.host_mm();
    let shadow_pages = shadow_pages(shape, mm.frame_count())?;
    let monitor = MonitorLayout::new(shape.vcpus);
    let view = mm.map_guest_view()?;
    let frames = view.region().clone();
    let frames_bytes = frames.size() as u64;
    let plan = MachinePlan::new(
        &monitor,
        shadow_pages,
        shape.memory_bytes,
        frames_bytes,
        features.phys_bits,
    )?;

    let tables = map_pinned("monitor and shadow tables", plan.tables_bytes)?;
    let monitor_pml4e =
        monitor::install(&monitor, &tables, plan.tables_slot_base).map_err(|error| MapError {
            what: "monitor",
            bytes: monitor.bytes(),
            source: std::io::Error::other(error.to_string()),
        })?;
    let shadow_config = ShadowConfig {
        machine: plan.layout(&monitor),
        monitor_pml4e,
        phys_bits: features.phys_bits,
        zap_to_age: shape.kind.zap_to_age(),
    };
    let monitor_bytes = usize::try_from(monitor.bytes()).unwrap_or(usize::MAX);
    let table_memory = TableMemory::new(tables.clone(), monitor_bytes, shadow_pages)?;
    let shadow = Arc::new(ShadowMmu::new(shadow_config, object.clone(), table_memory, view)?);
    shadow.set_window(window.clone());
    let kvm = device.create_vm()?;
    kvm.add_region(TABLES_SLOT, plan.tables_slot_base, &tables)?;
    kvm.add_region(WINDOW_SLOT, plan.window_base, window)?;
    kvm.add_region(FRAMES_SLOT, plan.frames_base, &frames)?;
    let latency = Mutex::new(FaultLatency::default());
    let cpuid = CpuidTable::new(cpuid);
    Ok((ShadowSpace { kvm, shadow, monitor, cpuid, shape, latency }, tables))
}
