//! A plain machine: made, started, waited for, ended.

use std::sync::{Arc, OnceLock, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vm_memory::MmapRegion;
use vmm_sys_util::eventfd::EventFd;

use crate::addr::Gpa;
use crate::direct_mmu::{DirectConfig, DirectError, DirectMmu};
use crate::host_mm::MemoryObject;
use crate::sys::Patience;
use crate::vmm::contract::config::check_vcpus;
use crate::vmm::error::VmError;
use crate::vmm::kvm::device::{KvmDevice, KvmError, KvmVm};
use crate::vmm::kvm::registers::{Registers, enable_extended_state};
use crate::vmm::run::bus::Bus;
use crate::vmm::run::gate::Gate;
use crate::vmm::run::kick::{Kick, Kicker};
use crate::vmm::run::outcome::Outcome;
use crate::vmm::run::roster::Roster;
use crate::vmm::run::stats::{LiveCounts, VcpuCounts};
use crate::vmm::run::threads::spawn_vcpu;

use super::vcpu::Vcpu;

/// Slot of the window; those of [`PlainConfig::pinned`] follow.
const WINDOW_SLOT: u32 = 0;
/// How long the threads of a machine may take to end before they are left behind.
const JOIN_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a vCPU may wait for a page after the end before it is let go without. (Not every kernel
/// lets a signal interrupt KVM there.)
const PAGE_PATIENCE: Duration = Duration::from_millis(250);

/// Local vector table entries that lead a PC's old interrupt lines to a processor (Intel SDM Vol. 3,
/// 11.5.1): LINT0 takes the 8259's, LINT1 is NMI.
const APIC_LVT0: usize = 0x350;
const APIC_LVT1: usize = 0x360;
const APIC_MODE_MASK: u32 = 0x700;
const APIC_MODE_NMI: u32 = 0x400;
const APIC_MODE_EXTINT: u32 = 0x700;

/// Memory that the guest has beside the window, never evicted.
pub struct Slot {
    /// Where the guest finds it.
    pub gpa: Gpa,
    /// All of this.
    pub region: Arc<MmapRegion>,
}

/// What a plain machine is made from.
pub struct PlainConfig {
    /// The guest's memory from address 0 on, on host memory of `Placement::Identity`.
    pub object: Arc<MemoryObject>,
    /// How it is paged.
    pub paging: DirectConfig,
    /// Memory beside it.
    pub pinned: Vec<Slot>,
    /// How each vCPU begins, by index. Without: with an irqchip, when another sends it an interrupt
    /// to start; else by a hypercall.
    pub vcpus: Vec<Option<Registers>>,
    /// Interrupt controllers and a timer in the kernel: a halted vCPU then waits there for an
    /// interrupt. Without them, it is parked, and all of them parked end the machine.
    pub irqchip: bool,
    /// What accesses reach that are not memory.
    pub bus: Arc<dyn Bus>,
}

/// How a vCPU begins.
pub(super) enum Begin {
    /// With these registers.
    At(Box<Registers>),
    /// In the kernel, waiting for the interrupts that start a processor.
    ByInterrupt,
}

/// What all threads of a machine share.
pub(super) struct Shared {
    pub(super) bus: Arc<dyn Bus>,
    pub(super) gate: Gate,
    pub(super) roster: Roster<Begin>,
    pub(super) counts: Vec<LiveCounts>,
    ended: OnceLock<Instant>,
}

impl Shared {
    /// Ends the machine: the outcome stands if it is the first, and every vCPU leaves its loop.
    pub(super) fn end(&self, outcome: Outcome) {
        self.roster.end(outcome);
        self.ended.get_or_init(Instant::now);
        self.gate.stop();
        self.bus.over();
    }
}

/// A way to end a machine from elsewhere, as a device of it does; it keeps nothing alive.
#[derive(Clone)]
pub struct Ender(Weak<Shared>);

impl Ender {
    /// Ends the machine; the first outcome stands.
    pub fn end(&self, outcome: Outcome) {
        if let Some(shared) = self.0.upgrade() {
            shared.end(outcome);
        }
    }
}

/// See the [module's documentation](super).
pub struct PlainMachine {
    // In the order in which they go: no guest can run when its memory does.
    vcpus: Vec<Vcpu>,
    starts: Vec<Option<Registers>>,
    threads: Vec<JoinHandle<()>>,
    #[allow(dead_code, reason = "kept for its slots")]
    kvm: KvmVm,
    paging: Arc<DirectMmu>,
    shared: Arc<Shared>,
    kickers: Vec<Arc<Kicker>>,
    irqchip: bool,
}

impl PlainMachine {
    /// Makes a machine, ready to start.
    ///
    /// # Errors
    /// [`VmError`]: KVM is not usable, or page faults of the kernel cannot be handled by this process
    /// (the sentence says what to do), or the host lacks memory.
    pub fn new(config: PlainConfig) -> Result<Self, VmError> {
        let PlainConfig { object, paging, pinned, vcpus: starts, irqchip, bus } = config;
        let device = KvmDevice::open()?;
        check_vcpus(starts.len(), &device)?;
        let view = object.host_mm().map_guest_view()?;
        let kvm = device.create_vm()?;
        if irqchip {
            kvm.create_irqchip()?;
        }
        kvm.add_region(WINDOW_SLOT, 0, view.region())?;
        for (id, slot) in (WINDOW_SLOT + 1..).zip(&pinned) {
            kvm.add_region(id, slot.gpa.as_u64(), &slot.region)?;
        }
        let mut fds = Vec::with_capacity(starts.len());
        let mut kickers = Vec::with_capacity(starts.len());
        for index in 0..starts.len() {
            let fd = if irqchip {
                let fd = kvm.create_vcpu(index, &device.plain_cpuid(index)?)?;
                connect_interrupt_lines(&fd)?;
                fd
            } else {
                let cpuid = device.guest_cpuid()?;
                let fd = kvm.create_vcpu(index, &cpuid)?;
                enable_extended_state(&fd, &cpuid)?;
                fd
            };
            kickers.push(Arc::new(Kicker::of(&fd)?));
            fds.push(fd);
        }
        let kicks = kickers.iter().map(|kicker| kicker.clone() as Arc<dyn Kick>).collect();
        let shared = Arc::new(Shared {
            bus,
            gate: Gate::new(kicks),
            roster: Roster::new(starts.len()),
            counts: starts.iter().map(|_| LiveCounts::default()).collect(),
            ended: OnceLock::new(),
        });
        let vcpus = fds
            .into_iter()
            .enumerate()
            .map(|(index, fd)| Vcpu { index, fd, shared: shared.clone(), was_interrupted: false })
            .collect();
        let ender = Ender(Arc::downgrade(&shared));
        let on_failure = move |error: &DirectError| {
            let is_corruption = error.is_corruption();
            let error = VmError::Paging { sentence: error.to_string(), is_corruption };
            ender.end(Outcome::Failed(error));
        };
        let paging = Arc::new(DirectMmu::new(paging, object, view, on_failure)?);
        Ok(Self { vcpus, starts, threads: Vec::new(), kvm, paging, shared, kickers, irqchip })
    }

    /// Starts the vCPU threads, and lets those run that begin by themselves. Starting twice does
    /// nothing.
    ///
    /// # Errors
    /// [`VmError::Thread`]; the machine is then over.
    pub fn start(&mut self) -> Result<(), VmError> {
        // All of them before the first thread: one that halts at once is not the last that runs.
        for (index, registers) in std::mem::take(&mut self.starts).into_iter().enumerate() {
            let begin = match registers {
                Some(registers) => Begin::At(Box::new(registers)),
                None if self.irqchip => Begin::ByInterrupt,
                None => continue,
            };
            // Refused only if it runs already.
            let _ = self.shared.roster.start(index, begin);
        }
        for vcpu in std::mem::take(&mut self.vcpus) {
            let index = vcpu.index;
            let Some(kicker) = self.kickers.get(index).cloned() else { continue };
            match spawn_vcpu(index, move || vcpu.thread(&kicker)) {
                Ok(handle) => self.threads.push(handle),
                Err(error) => {
                    self.shared.end(Outcome::Killed);
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Waits until the machine is over and all its vCPU threads are done; `None` when `timeout`
    /// passes first, or when the outcome was taken by an earlier call, or it was never started.
    pub fn wait(&mut self, timeout: Option<Duration>) -> Option<Outcome> {
        if self.threads.is_empty() || !self.wait_for_threads(&mut timeout.map(Patience::new)) {
            return None;
        }
        self.join();
        self.shared.roster.take_outcome()
    }

    /// Waits until the machine is over and its threads are done, without taking the outcome; false
    /// when the patience runs out first, or it was never started.
    pub fn is_over(&self, patience: &mut Option<Patience>) -> bool {
        !self.threads.is_empty() && self.wait_for_threads(patience)
    }

    /// Whether every thread was done in time.
    fn wait_for_threads(&self, patience: &mut Option<Patience>) -> bool {
        loop {
            let slice = patience.as_mut().map_or(Some(PAGE_PATIENCE), Patience::slice);
            let mut waited = Some(Patience::new(slice.unwrap_or_default()));
            if self.shared.roster.wait_for_exit(self.threads.len(), &mut waited) {
                return true;
            }
            if self.shared.ended.get().is_some_and(|ended| ended.elapsed() >= PAGE_PATIENCE) {
                // Kicked, so none of them runs guest code with what it finds then.
                self.paging.let_go();
            }
            if slice.is_none() {
                return false;
            }
        }
    }

    /// Ends the machine at once, whatever its guest does. Does not wait; [`Self::wait`] does.
    pub fn kill(&self) {
        self.shared.end(Outcome::Killed);
    }

    /// Takes all vCPUs out of the guest and lets them back in: after the process was stopped, it is told so
    /// in those that were on their way out of it by themselves, too.
    pub fn interrupt(&self) {
        self.kickers.iter().for_each(|kicker| kicker.kick());
    }

    /// A way to end it from elsewhere.
    pub fn ender(&self) -> Ender {
        Ender(Arc::downgrade(&self.shared))
    }

    /// A line whose every write raises an edge of this interrupt; with an irqchip only.
    ///
    /// # Errors
    /// [`VmError::Kvm`].
    pub fn interrupt_line(&self, gsi: u32) -> Result<EventFd, VmError> {
        let request = |request| move |source| KvmError::Request { request, source };
        let line = EventFd::new(libc::EFD_CLOEXEC).map_err(request("eventfd"))?;
        self.kvm.attach_irqfd(&line, gsi)?;
        Ok(line)
    }

    /// How its memory is paged.
    pub fn paging(&self) -> &Arc<DirectMmu> {
        &self.paging
    }

    /// What the vCPUs counted so far, by index.
    pub fn vcpu_counts(&self) -> Vec<VcpuCounts> {
        self.shared.counts.iter().map(LiveCounts::snapshot).collect()
    }

    fn join(&mut self) {
        for thread in self.threads.drain(..) {
            // A panic was already turned into the outcome.
            let _ = thread.join();
        }
    }
}

impl Drop for PlainMachine {
    fn drop(&mut self) {
        if self.threads.is_empty() {
            return;
        }
        self.shared.end(Outcome::Killed);
        if self.wait_for_threads(&mut Some(Patience::new(JOIN_TIMEOUT))) {
            self.join();
        }
        // Otherwise a thread is left behind, in the kernel, with a vCPU that was kicked: it has
        // its own reference to everything that it uses.
    }
}

/// Connects the processor's two interrupt lines as a PC's firmware does.
fn connect_interrupt_lines(fd: &kvm_ioctls::VcpuFd) -> Result<(), KvmError> {
    let mut apic = fd.get_lapic().map_err(KvmError::request("KVM_GET_LAPIC"))?;
    for (at, mode) in [(APIC_LVT0, APIC_MODE_EXTINT), (APIC_LVT1, APIC_MODE_NMI)] {
        let register = &mut apic.regs[at..at + size_of::<u32>()];
        let value = register
            .iter()
            .rev()
            .fold(0, |value: u32, &byte| value << 8 | u32::from(byte.cast_unsigned()));
        let value = value & !APIC_MODE_MASK | mode;
        for (slot, byte) in register.iter_mut().zip(value.to_le_bytes()) {
            *slot = byte.cast_signed();
        }
    }
    fd.set_lapic(&apic).map_err(KvmError::request("KVM_SET_LAPIC"))
}
