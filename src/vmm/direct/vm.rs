//! A VM for guests that keep to the contract, on a plain machine: direct paging.
//!
//! Guarantee: that of [`Vm`](crate::vmm::Vm), whose services it has; where they differ,
//! `docs/guest-abi.md` says so. It cannot be cloned.

use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::abi;
use crate::addr::{Gfn, Gpa};
use crate::direct_mmu::{DirectConfig, DirectMmu};
use crate::export_rmap::ClientId;
use crate::host_mm::HostMm;
use crate::iotlb::Iotlb;
use crate::sys::Patience;
use crate::vmm::contract::boot::{self, BootMap, Image};
use crate::vmm::contract::config::{IOTLB_ENTRIES, VmConfig, check_memory};
use crate::vmm::contract::control_block::{ControlBlock, window_bytes};
use crate::vmm::contract::devices::dma::DmaDevice;
use crate::vmm::contract::devices::{PortAction, PortBus};
use crate::vmm::contract::hypercall::hypercall;
use crate::vmm::contract::observer::Reports;
use crate::vmm::contract::services::{Services, TakeBack, free_pages};
use crate::vmm::cpu::emulate::PortWidth;
use crate::vmm::cpu::{GuestCpu, gpr};
use crate::vmm::error::{GuestError, VmError};
use crate::vmm::kvm::device::{self, KvmDevice};
use crate::vmm::kvm::pinned::map_shared;
use crate::vmm::kvm::registers::Registers;
use crate::vmm::kvm::registers::{load_gpr, store_gpr};
use crate::vmm::run::bus::{Action, Bus, HypercallResult, StartVcpu};
use crate::vmm::run::outcome::Outcome;
use crate::vmm::run::stats::VcpuCounts;

use super::{Ender, PlainConfig, PlainMachine, Slot};

/// How the pages are taken that a guest gives back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Removal {
    /// Host memory frees them.
    #[default]
    Free,
    /// The window's range is removed (`MADV_REMOVE`), as if behind host memory's back.
    Window,
    /// One way and the other in turn.
    Both,
}

/// See the module's documentation.
pub struct DirectVm {
    // In the order in which they go: no vCPU runs when the device does.
    machine: PlainMachine,
    device: Option<JoinHandle<()>>,
    was_started: bool,
    pub(in crate::vmm) services: Arc<Services>,
}

impl DirectVm {
    /// Makes a VM, loads its kernel, and leaves it ready to start. Its memory comes from `mm`, which
    /// must be of `Placement::Identity`; its serial port prints to `console`. The bound on shadow pages
    /// means nothing here.
    ///
    /// # Errors
    /// [`VmError`]: as for [`Vm::new`](crate::vmm::Vm::new), and if page faults of KVM cannot be handled.
    pub fn new(
        config: &VmConfig,
        removal: Removal,
        mm: &Arc<HostMm>,
        console: Box<dyn Write + Send>,
    ) -> Result<Self, VmError> {
        check_memory(config.memory_bytes)?;
        let image = Image::parse(&config.kernel, config.memory_bytes)?;
        let device = KvmDevice::open()?;
        let cpuid = device.guest_cpuid()?;
        let features = device::features(&cpuid)?;
        let window = map_shared("pinned window", window_bytes(config.memory_bytes))?;
        let end = abi::WINDOW_GPA + window_bytes(config.memory_bytes);
        if features.phys_bits < 64 && end > 1 << features.phys_bits {
            return Err(VmError::MachineSpace { end, phys_bits: features.phys_bits });
        }
        let object = mm.create_object(config.memory_bytes)?;
        boot::load(&object, &image, config.cmdline.as_bytes(), BootMap::FirstGib)?;

        let iotlb = Arc::new(Iotlb::new(object.clone(), IOTLB_ENTRIES)?);
        let paging = Arc::new(OnceLock::new());
        let services = Arc::new(Services {
            object: object.clone(),
            control: ControlBlock::new(window.clone(), config.vcpus, config.memory_bytes),
            bus: PortBus::new(console, Arc::new(DmaDevice::new(iotlb.clone()))),
            iotlb,
            reports: Reports::default(),
            observer: config.observer.clone(),
            take_back: take_back(removal, paging.clone()),
            window_bytes: window_bytes(config.memory_bytes),
            vcpus: config.vcpus,
        });
        let mut boot = GuestCpu::at_boot(Gpa::new(abi::BOOT_PML4_GPA), features);
        boot.rip = image.entry();
        boot.gpr[gpr::RSI] = abi::BOOT_PARAMS_GPA;
        let mut vcpus = vec![None; config.vcpus];
        if let Some(first) = vcpus.first_mut() {
            *first = Some(at_cpl0(&boot));
        }
        let machine = PlainMachine::new(PlainConfig {
            object,
            paging: DirectConfig::default(),
            pinned: vec![Slot { gpa: Gpa::new(abi::WINDOW_GPA), region: window }],
            vcpus,
            irqchip: false,
            bus: Arc::new(AbiBus { services: services.clone() }),
        })?;
        // Set once: only here.
        let _ = paging.set(Arc::downgrade(machine.paging()));
        Ok(Self { machine, device: None, was_started: false, services })
    }

    /// As [`Vm::start`](crate::vmm::Vm::start).
    ///
    /// # Errors
    /// As there.
    pub fn start(&mut self) -> Result<(), VmError> {
        if !std::mem::replace(&mut self.was_started, true) {
            let ender: Ender = self.machine.ender();
            let started = self.services.start_device(move |outcome| ender.end(outcome));
            self.device = Some(started.inspect_err(|_| self.machine.kill())?);
        }
        self.machine.start()
    }

    /// As [`Vm::wait`](crate::vmm::Vm::wait).
    pub fn wait(&mut self, timeout: Option<Duration>) -> Option<Outcome> {
        let mut patience = timeout.map(Patience::new);
        if self.machine.is_over(&mut patience) && self.services.wait_for_device(&mut patience) {
            self.join_device();
            return self.machine.wait(timeout);
        }
        None
    }

    /// As [`Vm::kill`](crate::vmm::Vm::kill).
    pub fn kill(&self) {
        self.machine.kill();
    }

    /// How its memory is paged.
    #[must_use]
    pub fn paging(&self) -> &DirectMmu {
        self.machine.paging()
    }

    /// The numbers of its export clients.
    #[must_use]
    pub fn client_ids(&self) -> Vec<ClientId> {
        vec![self.paging().client_id(), self.services.iotlb.client_id()]
    }

    /// What the VMM counted so far, by vCPU. Page faults are the kernel's: see [`Self::paging`].
    #[must_use]
    pub fn vcpu_counts(&self) -> Vec<VcpuCounts> {
        self.machine.vcpu_counts()
    }

    /// Compares what the reverse map has of this VM with what the kernel maps; one sentence for each
    /// difference. No vCPU may run any more.
    #[must_use]
    pub fn check_reverse_map(&self) -> Vec<String> {
        let quiet = self.services.object.host_mm().quiet();
        let mut differences = match self.paging().check_reverse_map(&quiet) {
            Ok(differences) => differences,
            Err(error) => vec![format!("I3: /proc/self/pagemap cannot be read: {error}")],
        };
        differences.extend(self.services.iotlb.check_reverse_map());
        differences
    }

    fn join_device(&mut self) {
        if let Some(device) = self.device.take() {
            // A panic was already turned into the VM's outcome.
            let _ = device.join();
        }
    }
}

impl Drop for DirectVm {
    fn drop(&mut self) {
        self.machine.kill();
        self.join_device();
    }
}

/// How pages that the guest gives back are taken. `paging` is set once the guest can run.
fn take_back(removal: Removal, paging: Arc<OnceLock<Weak<DirectMmu>>>) -> TakeBack {
    let free = free_pages();
    let turn = AtomicU64::new(0);
    Box::new(move |object, first: Gfn, count| {
        let by_window = match removal {
            Removal::Free => false,
            Removal::Window => true,
            // Relaxed: nothing is told by it.
            Removal::Both => turn.fetch_add(1, Ordering::Relaxed).is_multiple_of(2),
        };
        match paging.get().and_then(Weak::upgrade) {
            Some(paging) if by_window => paging.remove(first, count).is_ok(),
            _ => free(object, first, count),
        }
    })
}

/// The state that the contract promises, at CPL 0.
fn at_cpl0(cpu: &GuestCpu) -> Registers {
    let mut at = Registers::long_mode();
    store_gpr(&mut at.regs, &cpu.gpr);
    (at.regs.rip, at.regs.rsp) = (cpu.rip, cpu.gpr[gpr::RSP]);
    let sregs = &mut at.sregs;
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (cpu.cr0, cpu.cr3, cpu.cr4, cpu.efer);
    at
}

/// The state of a vCPU that `caller` starts, at CPL 0: its control registers and descriptor tables, and
/// nothing else of it.
fn started_by(caller: &Registers, rip: u64, argument: u64) -> Registers {
    let mut started = Registers::long_mode();
    (started.regs.rip, started.regs.rdi) = (rip, argument);
    let (from, to) = (&caller.sregs, &mut started.sregs);
    (to.cr0, to.cr3, to.cr4, to.efer) = (from.cr0, from.cr3, from.cr4, from.efer);
    (to.gdt, to.idt) = (from.gdt, from.idt);
    started
}

/// The contract's ports.
struct AbiBus {
    services: Arc<Services>,
}

impl Bus for AbiBus {
    fn port_in(&self, _vcpu: usize, port: u16, data: &mut [u8]) -> Action {
        if let Some(width) = PortWidth::from_bytes(data.len()) {
            let value = self.services.bus.read(port, width).to_le_bytes();
            data.copy_from_slice(&value[..data.len()]);
        }
        Action::Continue
    }

    fn port_out(&self, _vcpu: usize, port: u16, data: &[u8]) -> Action {
        let Some(width) = PortWidth::from_bytes(data.len()) else {
            return Action::Continue;
        };
        let mut value = [0; 4];
        value[..data.len()].copy_from_slice(data);
        match self.services.bus.write(port, width, u32::from_le_bytes(value)) {
            PortAction::None => Action::Continue,
            PortAction::Exit(code) => Action::End(Outcome::GuestExit(code)),
            PortAction::Hypercall => Action::Hypercall,
        }
    }

    fn mmio_read(&self, _vcpu: usize, gpa: Gpa, _data: &mut [u8]) -> Action {
        Action::Refuse(GuestError::OutsideRam { gpa })
    }

    fn mmio_write(&self, _vcpu: usize, gpa: Gpa, _data: &[u8]) -> Action {
        Action::Refuse(GuestError::OutsideRam { gpa })
    }

    fn hypercall(&self, vcpu: usize, caller: &Registers, start: &StartVcpu<'_>) -> HypercallResult {
        let start = |index, rip, argument| start(index, started_by(caller, rip, argument));
        hypercall(&self.services, vcpu, &load_gpr(&caller.regs), start)
    }

    fn over(&self) {
        self.services.bus.dma().stop();
    }
}
