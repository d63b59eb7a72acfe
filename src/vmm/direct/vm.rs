//! A VM for guests that keep to the contract, on a plain machine: direct paging.
//!
//! Guarantee: that of [`Vm`](crate::vmm::Vm), whose services it has; where they differ,
//! `docs/guest-abi.md` says so. It cannot be cloned.

use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use crate::abi;
use crate::addr::{Gfn, Gpa};
use crate::direct_mmu::{DirectConfig, DirectMmu};
use crate::host_mm::HostMm;
use crate::vmm::contract::boot::{self, BootMap, Image};
use crate::vmm::contract::bus::AbiBus;
use crate::vmm::contract::config::{VmConfig, check_memory};
use crate::vmm::contract::control_block::{ControlBlock, window_bytes};
use crate::vmm::contract::observer::VmObserver;
use crate::vmm::contract::services::{Services, TakeBack, free_pages};
use crate::vmm::contract::vm::{Contract, ContractVm};
use crate::vmm::cpu::{GuestCpu, gpr};
use crate::vmm::error::VmError;
use crate::vmm::kvm::device::{self, KvmDevice};
use crate::vmm::kvm::pinned::map_shared;
use crate::vmm::kvm::registers::{Registers, store_gpr};

use super::processor::DirectProcessor;
use super::{PlainConfig, PlainMachine, Slot};

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
pub type DirectVm = ContractVm<DirectProcessor>;

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

        let paging = Arc::new(OnceLock::new());
        let control = ControlBlock::new(window.clone(), config.vcpus, config.memory_bytes);
        let take_back = take_back(removal, paging.clone());
        let observer = config.observer.clone();
        let services = Services::new(object.clone(), control, console, observer, take_back)?;
        let boot = boot::first_cpu(&image, features);
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
            bus: Arc::new(AbiBus::new(services.clone())),
        })?;
        // Set once: only here.
        let _ = paging.set(Arc::downgrade(machine.paging()));
        Ok(Self::of(machine, services))
    }

    /// How its memory is paged.
    #[must_use]
    pub fn paging(&self) -> &DirectMmu {
        self.machine().paging()
    }
}

impl Contract for DirectProcessor {
    fn empty_clone(
        _vm: &DirectVm,
        _observer: Option<Arc<dyn VmObserver>>,
        _console: Box<dyn Write + Send>,
    ) -> Result<DirectVm, VmError> {
        Err(VmError::CloneOfWindow)
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
