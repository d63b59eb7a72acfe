//! A virtual machine: made, started, watched, stopped.
//!
//! Guarantee: a [`Vm`] that was started ends exactly once, with one [`Outcome`]; when
//! [`Vm::wait`] returned it, and when the value is dropped, none of its threads runs any more.

use std::borrow::Cow;
use std::io::Write;
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_ioctls::VcpuFd;
use vm_memory::MmapRegion;

use crate::abi;
use crate::addr::{Gpa, PAGE_SIZE_U64};
use crate::export_rmap::ClientId;
use crate::host_mm::{HostMm, MemoryObject, TripwireWatch};
use crate::iotlb::Iotlb;
use crate::shadow_mmu::{ShadowConfig, ShadowMmu, TableMemory};
use crate::sync::{Mutex, lock};

use super::boot::{self, Image};
use super::clone::Birth;
use super::cpu::{Features, GuestCpu, gpr};
use super::devices::PortBus;
use super::devices::dma::{DmaDevice, DmaStats};
use super::error::VmError;
use super::gate::{Gate, Position};
use super::host_kind::{HostKind, HostTraits};
use super::hypercall::{Reports, ViolationReport, VmObserver};
use super::kick::{Kick, Kicker};
use super::kvm::{self, KvmDevice, KvmError, KvmVm};
use super::machine::{
    ControlBlock, FRAMES_SLOT, GuestCounters, MachinePlan, TABLES_SLOT, WINDOW_SLOT, map_pinned,
    map_shared, window_bytes,
};
use super::monitor::{self, MonitorLayout, MonitorStack};
use super::real;
use super::roster::{Roster, StartRequest, VcpuState};
use super::shared::Shared;
use super::stale;
use super::stats::{FaultLatency, LiveCounts, VcpuCounts};
use super::vcpu::Vcpu;

/// Least guest RAM: the boot area and some room for a kernel.
pub const MIN_MEMORY_BYTES: u64 = 2 << 20;
/// Shadow pages that one vCPU needs to get past any single instruction, with room to spare.
const MIN_SHADOW_PAGES_PER_VCPU: u32 = 32;
/// Pages that the DMA device has translations of at a time.
const IOTLB_ENTRIES: usize = 64;
/// How long the threads of a VM may take to end before they are left behind.
const JOIN_TIMEOUT: Duration = Duration::from_secs(30);

/// What a VM is to be.
#[derive(Clone)]
pub struct VmConfig {
    /// Guest RAM in bytes, from guest-physical 0; a multiple of 4096 from [`MIN_MEMORY_BYTES`]
    /// to [`abi::MAX_MEMORY_BYTES`].
    pub memory_bytes: u64,
    /// Number of vCPUs; the first starts at the kernel's entry point, the others wait for
    /// [`abi::HC_START_VCPU`].
    pub vcpus: usize,
    /// The kernel: a static 64-bit ELF executable.
    pub kernel: Cow<'static, [u8]>,
    /// Its command line, without a final NUL.
    pub cmdline: String,
    /// Bound on the number of shadow pages; `None` for enough to map all RAM several times.
    pub shadow_pages: Option<u32>,
    /// Told of what the guest says.
    pub observer: Option<Arc<dyn VmObserver>>,
}

/// How a VM ended.
#[derive(Debug)]
pub enum Outcome {
    /// The guest powered off.
    PoweredOff,
    /// The guest wrote to the exit port; the exit code is already that of the convention.
    GuestExit(u8),
    /// Every vCPU has halted, and nothing could have woken one.
    Halted,
    /// [`Vm::kill`].
    Killed,
    /// Something went wrong.
    Failed(VmError),
}

impl Outcome {
    /// The process exit code that stands for this outcome: 0 for an orderly end, the guest's own
    /// code, 130 for a kill (as by an interrupt), 1 for a failure.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::PoweredOff | Self::Halted => 0,
            Self::GuestExit(code) => *code,
            Self::Killed => 130,
            Self::Failed(_) => 1,
        }
    }
}

/// A virtual machine. See the module's documentation.
pub struct Vm {
    pub(super) shared: Arc<Shared>,
    pub(super) object: Arc<MemoryObject>,
    pub(super) shape: Shape,
    /// The pinned window's memory.
    pub(super) window: Arc<MmapRegion>,
    kickers: Vec<Arc<Kicker>>,
    /// The vCPUs before the start.
    vcpus: Vec<Vcpu>,
    /// How each vCPU is to begin, by index; `None` for those that wait to be started by another.
    pub(super) starts: Vec<Option<StartRequest>>,
    threads: Vec<JoinHandle<()>>,
    /// How it was cloned, if it was.
    pub(super) birth: Option<Birth>,
    /// The DMA device's.
    device: Option<JoinHandle<()>>,
    /// Outlives the threads, which it may have to let go on.
    _tripwire: Option<TripwireWatch>,
}

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

/// What the parts of a VM are made from.
struct Parts {
    monitor: MonitorLayout,
    plan: MachinePlan,
    tables: Arc<MmapRegion>,
    shadow: Arc<ShadowMmu>,
    iotlb: Arc<Iotlb>,
    kvm: KvmVm,
}

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
        check_vcpus(config.vcpus, &device)?;
        let features = kvm::features(&device.guest_cpuid()?)?;

        let object = mm.create_object(config.memory_bytes)?;
        boot::load(&object, &image, config.cmdline.as_bytes())?;
        let shape = Shape {
            memory_bytes: config.memory_bytes,
            vcpus: config.vcpus,
            shadow_pages: config.shadow_pages,
            kind,
        };
        let window = map_shared("pinned window", window_bytes(shape.memory_bytes))?;
        let mut boot = GuestCpu::at_boot(Gpa::new(abi::BOOT_PML4_GPA), features);
        boot.rip = image.entry();
        boot.gpr[gpr::RSI] = abi::BOOT_PARAMS_GPA;
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
        let features = kvm::features(&cpuid)?;
        let parts = build_parts(shape, device, features, &contents)?;
        let mut fds = Vec::with_capacity(shape.vcpus);
        let mut kickers = Vec::with_capacity(shape.vcpus);
        for index in 0..shape.vcpus {
            let mut fd = parts.kvm.create_vcpu(index, &cpuid)?;
            real::prepare(&mut fd, &cpuid, &parts.monitor)?;
            kickers.push(Arc::new(kicker(&fd)?));
            fds.push(fd);
        }

        let Contents { object, window, control, console, observer, starts } = contents;
        let tables = parts.tables.clone();
        let shared = Arc::new(share(shape, parts, control, console, observer, &kickers));
        let tripwire = stale::watch(object.host_mm(), &shared, &kickers)?;
        // What a vCPU is before its start does not matter.
        let idle = GuestCpu::at_boot(Gpa::new(abi::BOOT_PML4_GPA), features);
        let vcpus = fds
            .into_iter()
            .enumerate()
            .map(|(index, fd)| {
                let stack = MonitorStack::new(&shared.monitor, tables.clone(), index);
                Vcpu::new(index, fd, shared.clone(), stack, idle.clone())
            })
            .collect();
        Ok(Self {
            shared,
            object,
            shape,
            window,
            kickers,
            vcpus,
            starts,
            threads: Vec::new(),
            birth: None,
            device: None,
            _tripwire: tripwire,
        })
    }

    /// Starts the vCPU threads and lets the first vCPU run; those of a clone that were running in
    /// its source. Starting twice does nothing.
    ///
    /// # Errors
    /// [`VmError::Thread`], [`VmError::DeviceThread`]; the VM is then over.
    pub fn start(&mut self) -> Result<(), VmError> {
        if self.device.is_none() && !self.vcpus.is_empty() {
            self.start_device()?;
        }
        // All of them before the first thread: one that halts at once is not the last that runs.
        for (index, start) in std::mem::take(&mut self.starts).into_iter().enumerate() {
            if let Some(start) = start {
                // Refused only if it runs already.
                let _ = self.shared.roster.start(index, start);
            }
        }
        for vcpu in std::mem::take(&mut self.vcpus) {
            let index = vcpu.index;
            let Some(kicker) = self.kickers.get(index).cloned() else {
                continue;
            };
            let thread = std::thread::Builder::new().name(format!("vcpu{index}"));
            match thread.spawn(move || vcpu.thread(&kicker)) {
                Ok(handle) => self.threads.push(handle),
                Err(source) => {
                    self.shared.end(Outcome::Killed);
                    return Err(VmError::Thread { vcpu: index, source });
                }
            }
        }
        Ok(())
    }

    fn start_device(&mut self) -> Result<(), VmError> {
        let shared = self.shared.clone();
        shared.bus.dma().starting();
        let thread = std::thread::Builder::new().name("dma".to_owned());
        match thread.spawn(move || shared.serve_dma()) {
            Ok(handle) => {
                self.device = Some(handle);
                Ok(())
            }
            Err(source) => {
                self.shared.bus.dma().over();
                self.shared.end(Outcome::Killed);
                Err(VmError::DeviceThread { source })
            }
        }
    }

    /// Waits until the VM is over and all its threads are done; `None` when `timeout` passes
    /// first, or when the outcome was taken by an earlier call, or the VM was never started.
    pub fn wait(&mut self, timeout: Option<Duration>) -> Option<Outcome> {
        if self.threads.is_empty() || !self.wait_for_threads(timeout) {
            return None;
        }
        self.join();
        self.shared.roster.take_outcome()
    }

    /// Whether every thread was done in time.
    fn wait_for_threads(&self, timeout: Option<Duration>) -> bool {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        self.shared.roster.wait_for_exit(self.threads.len(), timeout)
            && self.shared.bus.dma().wait_until_over(deadline)
    }

    /// Asks the guest to finish: it sees the stop flag in the control block, makes its last
    /// checks and powers off, if it is one that looks.
    pub fn request_stop(&self) {
        self.shared.control.request_stop();
    }

    /// Ends the VM at once, whatever its guest does. Does not wait; [`Self::wait`] does.
    pub fn kill(&self) {
        self.shared.end(Outcome::Killed);
    }

    /// The guest's memory as the host sees it.
    #[must_use]
    pub fn object(&self) -> &Arc<MemoryObject> {
        &self.object
    }

    /// The VM's shadow MMU, for its statistics and checks.
    #[must_use]
    pub fn shadow(&self) -> &Arc<ShadowMmu> {
        &self.shared.shadow
    }

    /// The IOTLB of the VM's DMA device, for its statistics and checks.
    #[must_use]
    pub fn iotlb(&self) -> &Arc<Iotlb> {
        &self.shared.iotlb
    }

    /// The numbers of its export clients.
    #[must_use]
    pub fn client_ids(&self) -> Vec<ClientId> {
        let Shared { shadow, iotlb, .. } = &*self.shared;
        [shadow.client_id(), iotlb.client_id()].into_iter().flatten().collect()
    }

    /// What the VM's DMA device has done.
    #[must_use]
    pub fn dma_stats(&self) -> DmaStats {
        self.shared.bus.dma().stats()
    }

    /// What the VMM counted so far, by vCPU.
    #[must_use]
    pub fn vcpu_counts(&self) -> Vec<VcpuCounts> {
        self.shared.counts.iter().map(LiveCounts::read).collect()
    }

    /// What the VMM counted so far, all vCPUs together.
    #[must_use]
    pub fn counts(&self) -> VcpuCounts {
        let mut total = VcpuCounts::default();
        for counts in self.vcpu_counts() {
            total.add(&counts);
        }
        total
    }

    /// What the guest counted so far, by vCPU.
    #[must_use]
    pub fn guest_counters_by_vcpu(&self) -> Vec<GuestCounters> {
        self.shared.control.counters()
    }

    /// What the guest counted so far, all vCPUs together.
    #[must_use]
    pub fn guest_counters(&self) -> GuestCounters {
        self.shared.control.total()
    }

    /// The first violations that the guest reported, at most
    /// [`MAX_KEPT_REPORTS`](super::MAX_KEPT_REPORTS).
    #[must_use]
    pub fn violations(&self) -> Vec<ViolationReport> {
        self.shared.reports.kept()
    }

    /// Number of all violations that the guest reported.
    #[must_use]
    pub fn violation_count(&self) -> u64 {
        self.shared.reports.count()
    }

    /// Latencies of shadow faults; complete once the VM is over.
    #[must_use]
    pub fn fault_latency(&self) -> FaultLatency {
        lock(&self.shared.latency).clone()
    }

    /// Accesses to ports that do not exist.
    #[must_use]
    pub fn unknown_port_accesses(&self) -> u64 {
        self.shared.bus.unknown_accesses()
    }

    /// Bytes of console output that the console did not take.
    #[must_use]
    pub fn lost_console_bytes(&self) -> u64 {
        self.shared.bus.lost_console_bytes()
    }

    /// Life of each vCPU by index, and where it is with respect to a pause of all.
    #[must_use]
    pub fn vcpu_states(&self) -> Vec<(VcpuState, Position)> {
        self.shared.roster.states().into_iter().zip(self.shared.gate.positions()).collect()
    }

    fn join(&mut self) {
        for thread in self.threads.drain(..).chain(self.device.take()) {
            // A panic was already turned into the VM's outcome.
            let _ = thread.join();
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if self.threads.is_empty() && self.device.is_none() {
            return;
        }
        self.shared.end(Outcome::Killed);
        if self.wait_for_threads(Some(JOIN_TIMEOUT)) {
            self.join();
        }
        // Otherwise the threads are left behind with everything that they use, which they share
        // by reference counts: a leak, but nothing dangles.
    }
}

fn check_memory(bytes: u64) -> Result<(), VmError> {
    let (min, max) = (MIN_MEMORY_BYTES, abi::MAX_MEMORY_BYTES);
    if bytes.is_multiple_of(PAGE_SIZE_U64) && (min..=max).contains(&bytes) {
        return Ok(());
    }
    Err(VmError::MemorySize { bytes, min, max })
}

fn check_vcpus(vcpus: usize, device: &KvmDevice) -> Result<(), VmError> {
    let max = device.max_vcpus().min(abi::MAX_VCPUS);
    if (1..=max).contains(&vcpus) {
        return Ok(());
    }
    Err(VmError::VcpuCount { vcpus, max })
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

fn shadow_pages(shape: Shape, frames: u32) -> Result<u32, VmError> {
    let vcpus = shape.vcpus;
    let min = u32::try_from(vcpus).unwrap_or(u32::MAX).saturating_mul(MIN_SHADOW_PAGES_PER_VCPU);
    match shape.shadow_pages {
        None => Ok(default_shadow_pages(shape.memory_bytes, frames, min)),
        Some(pages) if pages >= min => Ok(pages),
        Some(pages) => Err(VmError::ShadowPages { pages, vcpus, min }),
    }
}

/// Maps the slots, writes the monitor, makes the shadow MMU and the KVM VM.
fn build_parts(
    shape: Shape,
    device: &KvmDevice,
    features: Features,
    contents: &Contents,
) -> Result<Parts, VmError> {
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
        monitor::install(&monitor, &tables, plan.tables_slot_base).map_err(|error| {
            VmError::Map { what: "monitor", bytes: monitor.bytes(), reason: error.to_string() }
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
    let iotlb = Arc::new(Iotlb::new(object.clone(), IOTLB_ENTRIES)?);

    let kvm = device.create_vm()?;
    kvm.add_region(TABLES_SLOT, plan.tables_slot_base, &tables)?;
    kvm.add_region(WINDOW_SLOT, plan.window_base, window)?;
    kvm.add_region(FRAMES_SLOT, plan.frames_base, &frames)?;
    Ok(Parts { monitor, plan, tables, shadow, iotlb, kvm })
}

fn kicker(fd: &VcpuFd) -> Result<Kicker, VmError> {
    use std::os::fd::{AsRawFd, BorrowedFd};
    // SAFETY: the descriptor is open as long as `fd` is, which is borrowed for longer than this.
    #[allow(unsafe_code)]
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) };
    Ok(Kicker::new(borrowed)
        .map_err(|source| KvmError::Request { request: "mmap of kvm_run", source })?)
}

fn share(
    shape: Shape,
    parts: Parts,
    control: ControlBlock,
    console: Box<dyn Write + Send>,
    observer: Option<Arc<dyn VmObserver>>,
    kickers: &[Arc<Kicker>],
) -> Shared {
    let Parts { monitor, plan, tables: _, shadow, iotlb, kvm } = parts;
    let kicks = kickers.iter().map(|kicker| kicker.clone() as Arc<dyn Kick>).collect();
    Shared {
        kvm,
        shadow,
        monitor,
        control,
        bus: PortBus::new(console, Arc::new(DmaDevice::new(iotlb.clone()))),
        iotlb,
        gate: Gate::new(kicks),
        roster: Roster::new(shape.vcpus),
        reports: Reports::default(),
        observer,
        counts: (0..shape.vcpus).map(|_| LiveCounts::default()).collect(),
        latency: Mutex::new(FaultLatency::default()),
        first_entry: OnceLock::new(),
        memory_bytes: shape.memory_bytes,
        window_bytes: plan.window_bytes,
        vcpus: shape.vcpus,
    }
}
