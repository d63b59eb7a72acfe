//! A plain machine: made around the guest's memory.

use std::sync::Arc;

use kvm_ioctls::VcpuFd;
use vm_memory::MmapRegion;
use vmm_sys_util::eventfd::EventFd;

use crate::addr::Gpa;
use crate::direct_mmu::{DirectConfig, DirectError, DirectMmu};
use crate::host_mm::MemoryObject;
use crate::vmm::contract::config::check_vcpus;
use crate::vmm::error::VmError;
use crate::vmm::kvm::device::{KvmDevice, KvmError, KvmVm};
use crate::vmm::kvm::registers::{Registers, enable_extended_state};
use crate::vmm::run::bus::Bus;
use crate::vmm::run::core::Core;
use crate::vmm::run::kick::{Kick, Kicker};
use crate::vmm::run::machine::{Machine, Parts};
use crate::vmm::run::outcome::Outcome;

use super::processor::{Begin, DirectProcessor};
use super::space::DirectSpace;

/// Slot of the window; those of [`PlainConfig::pinned`] follow.
const WINDOW_SLOT: u32 = 0;

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

/// See the [module's documentation](super).
pub type PlainMachine = Machine<DirectProcessor>;

impl PlainMachine {
    /// Makes a machine, ready to start.
    ///
    /// # Errors
    /// [`VmError`]: KVM is not usable, or page faults of the kernel cannot be handled by this process
    /// (the sentence says what to do), or the host lacks memory.
    pub fn new(config: PlainConfig) -> Result<Self, VmError> {
        let PlainConfig { object, paging, pinned, vcpus, irqchip, bus } = config;
        let device = KvmDevice::open()?;
        check_vcpus(vcpus.len(), device.max_vcpus())?;
        let view = object.host_mm().map_guest_view()?;
        let kvm = device.create_vm()?;
        if irqchip {
            kvm.create_irqchip()?;
        }
        kvm.add_region(WINDOW_SLOT, 0, view.region())?;
        for (id, slot) in (WINDOW_SLOT + 1..).zip(&pinned) {
            kvm.add_region(id, slot.gpa.as_u64(), &slot.region)?;
        }
        let mut fds = Vec::with_capacity(vcpus.len());
        let mut kicks = Vec::with_capacity(vcpus.len());
        for index in 0..vcpus.len() {
            let fd = create_vcpu(&device, &kvm, index, irqchip)?;
            kicks.push(Arc::new(Kicker::of(&fd)?) as Arc<dyn Kick>);
            fds.push(fd);
        }
        let core = Core::new(kicks, bus);
        let ender = core.ender();
        let on_failure = move |error: DirectError| {
            ender.end(Outcome::Failed(VmError::Paging(Box::new(error))));
        };
        let mmu = Arc::new(DirectMmu::new(paging, object.clone(), view, on_failure)?);
        let seated = fds.into_iter().enumerate();
        let processors = seated.map(|(index, fd)| DirectProcessor::new(fd, core.seat(index)));
        let begin = |registers: Option<Registers>| match registers {
            Some(registers) => Some(Begin::At(Box::new(registers))),
            None => irqchip.then_some(Begin::ByInterrupt),
        };
        Ok(Self::of(Parts {
            processors: processors.collect(),
            starts: vcpus.into_iter().map(begin).collect(),
            space: Arc::new(DirectSpace { kvm, mmu, object }),
            core,
            keep: None,
        }))
    }

    /// A line whose every write raises an edge of this interrupt; with an irqchip only.
    ///
    /// # Errors
    /// [`VmError::Kvm`].
    pub fn interrupt_line(&self, gsi: u32) -> Result<EventFd, VmError> {
        let request = |request| move |source| KvmError::Request { request, source };
        let line = EventFd::new(libc::EFD_CLOEXEC).map_err(request("eventfd"))?;
        self.space().kvm.attach_irqfd(&line, gsi)?;
        Ok(line)
    }

    /// How its memory is paged.
    #[must_use]
    pub fn paging(&self) -> &Arc<DirectMmu> {
        &self.space().mmu
    }
}

/// A vCPU whose interrupts are the kernel's matter, or the guest's alone.
fn create_vcpu(
    device: &KvmDevice,
    kvm: &KvmVm,
    index: usize,
    irqchip: bool,
) -> Result<VcpuFd, VmError> {
    if irqchip {
        let fd = kvm.create_vcpu(index, &device.plain_cpuid(index)?)?;
        connect_interrupt_lines(&fd)?;
        return Ok(fd);
    }
    let cpuid = device.guest_cpuid()?;
    let fd = kvm.create_vcpu(index, &cpuid)?;
    enable_extended_state(&fd, &cpuid)?;
    Ok(fd)
}

/// Connects the processor's two interrupt lines as a PC's firmware does.
fn connect_interrupt_lines(fd: &VcpuFd) -> Result<(), KvmError> {
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
