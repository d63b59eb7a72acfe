//! What kind of KVM this host has, found out by running a tiny VM.
//!
//! Guarantee: the answers are observations, not inferences from names or versions; a host that can
//! be probed is never taken to do more than it was seen to do. Where the probe itself fails,
//! [`HostKind::Shadow`] is the assumption that is right everywhere.
//!
//! Protocol: one page is touched at CPL 3, something is changed in the VM's page tables through
//! the host's mapping, processors are made to forget their cached translations by a CR3 load at
//! CPL 0 (no zap), and the page is touched again. A KVM that shadows in software sees neither the
//! change nor a reason to look; one with nested paging leaves the walk to the hardware. Then the
//! page's memory is zapped, after which every KVM has to see the change: rule 2 of shadow paging,
//! without which Gnomon cannot run at all.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_segment};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::{Bytes, MmapRegion, VolatileMemory};

use crate::abi;
use crate::addr::{Gpa, PAGE_SIZE, PAGE_SIZE_U64};
use crate::sys::memory;
use crate::vmm::cpu::exceptions::vector;
use crate::vmm::cpu::{GuestCpu, gpr, rflags};
use crate::vmm::error::VmError;
use crate::vmm::kvm::device::{self, KvmDevice, KvmError, KvmVm};
use crate::vmm::kvm::features::Features;
use crate::vmm::kvm::pinned::{MapError, map_pinned, map_shared};

use super::hw_regs;
use super::monitor::{self, MONITOR_CS, MonitorLayout};

/// How a host's KVM treats page tables that the VMM changes in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize), serde(rename_all = "lowercase"))]
pub enum HostKind {
    /// It shadows them in software: a change is seen after a zap only.
    Shadow,
    /// The processor walks them, with nested paging for what they point to: a change is seen at
    /// the next TLB miss.
    Tdp,
}

impl HostKind {
    /// Whether a cleared accessed bit is set again only after a zap.
    #[must_use]
    pub fn zap_to_age(self) -> bool {
        self == Self::Shadow
    }
}

impl fmt::Display for HostKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Shadow => "shadow",
            Self::Tdp => "tdp",
        })
    }
}

/// What the probe saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct HostTraits {
    /// A cleared accessed bit was set again by the next use without a zap.
    pub accessed_returns: bool,
    /// A cleared dirty bit was set again by the next write without a zap.
    pub dirty_returns: bool,
    /// A cleared entry made the next use fault without a zap.
    pub clear_takes_effect: bool,
    /// With a zap, both bits were set again, and a cleared entry made the next use fault.
    pub zap_revokes: bool,
    /// The processor ran the guest's ring-0 code by itself. Otherwise KVM emulates it, the few
    /// instructions that it knows.
    pub ring0_native: bool,
    /// It is PVM, which has no use for VMX or SVM.
    pub is_pvm: bool,
}

impl HostTraits {
    /// The kind of host: nested paging only where everything that follows from it was seen.
    #[must_use]
    pub fn kind(&self) -> HostKind {
        if self.accessed_returns && self.dirty_returns && self.clear_takes_effect {
            HostKind::Tdp
        } else {
            HostKind::Shadow
        }
    }

    /// Probes this host's KVM with a VM of its own; takes a few milliseconds.
    ///
    /// # Errors
    /// [`VmError::Kvm`] and [`VmError::Map`] if no VM can be made, [`VmError::Probe`] if it does
    /// something else than what it is told.
    pub fn probe() -> Result<Self, VmError> {
        Probe::new()?.observe()
    }

    /// Why stock kernels cannot run here, if they cannot: half a sentence.
    #[must_use]
    pub fn against_stock_kernels(&self) -> Option<&'static str> {
        match (self.ring0_native, self.is_pvm) {
            (true, _) => None,
            (false, true) => Some(
                "its KVM is PVM (kvm_pvm), which runs without VMX and SVM and emulates a guest's ring 0, and not all of its instructions",
            ),
            (false, false) => Some(
                "its KVM has neither VMX nor SVM and emulates a guest's ring 0, and not all of its instructions",
            ),
        }
    }

    /// [`HostTraits::probe`], done once in the life of the process; `None` if it failed.
    pub(in crate::vmm) fn of_this_host() -> Option<Self> {
        static TRAITS: OnceLock<Option<HostTraits>> = OnceLock::new();
        *TRAITS.get_or_init(|| Self::probe().ok())
    }
}

/// Machine addresses of the two slots.
const TABLES_BASE: u64 = 4 << 30;
const TARGET_BASE: u64 = 5 << 30;
const TABLES_SLOT: u32 = 0;
const TARGET_SLOT: u32 = 1;

/// Pages that follow the monitor in the tables' slot: the path to the leaf table, then code.
const PML4: usize = 0;
const PDPT: usize = 1;
const PD: usize = 2;
const PT: usize = 3;
const CODE: usize = 4;
const KERNEL_CODE: usize = 5;
const PAGES: usize = 6;

/// Virtual pages.
const CODE_GVA: u64 = 0x1000;
const KERNEL_CODE_GVA: u64 = 0x2000;
const TARGET_GVA: u64 = 0x3000;
const TARGET_ENTRY: usize = (TARGET_GVA / PAGE_SIZE_U64) as usize;

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;

const _: () = assert!(abi::PORT_EXIT == 0xf4, "the code below names the port");
/// `mov byte [rdi], 1; out 0xf4, al`
const TOUCH: [u8; 5] = [0xc6, 0x07, 0x01, 0xe6, 0xf4];
/// `mov rax, cr3; mov cr3, rax; out 0xf4, al`
const RELOAD_CR3: [u8; 8] = [0x0f, 0x20, 0xd8, 0x0f, 0x22, 0xd8, 0xe6, 0xf4];
/// `paddd xmm0, xmm0; out 0xf4, al`: an instruction that every 64-bit processor has and KVM's emulator
/// does not know.
const ADD_VECTORS: [u8; 6] = [0x66, 0x0f, 0xfe, 0xc0, 0xe6, 0xf4];
/// Where [`ADD_VECTORS`] stands in both code pages.
const ADD_VECTORS_OFFSET: usize = 0x100;

/// A register of PVM's, and what it holds: "MVP".
const MSR_PVM: u32 = 0x4b56_4d11;
const PVM_NAME: u64 = 0x4d_5650;
/// Its kernel module.
const PVM_MODULE: &str = "/sys/module/kvm_pvm";
/// Exits that mean nothing, such as signals, before the probe gives up.
const MAX_INTERRUPTIONS: u32 = 1000;

/// How a piece of guest code ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    /// It reached its `out`.
    Done,
    /// A page fault.
    PageFault,
    /// KVM does not know an instruction of it.
    Unknown,
}

/// Ring of a piece of guest code.
#[derive(Clone, Copy)]
enum Ring {
    Zero,
    Three,
}

/// The tiny VM.
struct Probe {
    fd: VcpuFd,
    _kvm: KvmVm,
    features: Features,
    monitor: MonitorLayout,
    tables: Arc<MmapRegion>,
    target: Arc<MmapRegion>,
}

impl Probe {
    fn new() -> Result<Self, VmError> {
        let device = KvmDevice::open()?;
        let cpuid = device.guest_cpuid()?;
        let features = device::features(&cpuid)?;
        let monitor = MonitorLayout::new(1);
        let tables = map_pinned("probe", monitor.bytes() + (PAGES * PAGE_SIZE) as u64)?;
        // As the guest view is: the page's content survives a zap.
        let target = map_shared("probe", PAGE_SIZE_U64)?;
        write_tables(&monitor, &tables).map_err(|error| MapError {
            what: "probe",
            bytes: tables.size() as u64,
            source: std::io::Error::other(error.to_string()),
        })?;
        let kvm = device.create_vm()?;
        kvm.add_region(TABLES_SLOT, TABLES_BASE, &tables)?;
        kvm.add_region(TARGET_SLOT, TARGET_BASE, &target)?;
        let mut fd = kvm.create_vcpu(0, &cpuid)?;
        hw_regs::prepare(&mut fd, &cpuid, &monitor)?;
        Ok(Self { fd, _kvm: kvm, features, monitor, tables, target })
    }

    fn observe(mut self) -> Result<HostTraits, VmError> {
        let fresh = self.entry().load(Ordering::Acquire);
        let (ended, marks) = self.touch()?;
        if (ended, marks) != (Ended::Done, ACCESSED | DIRTY) {
            return Err(VmError::Probe {
                found: format!("a first write of a page ended in {ended:?}, its bits {marks:#x}"),
            });
        }

        // The marks, cleared.
        self.entry().store(fresh, Ordering::Release);
        self.forget_translations()?;
        let (_, marks) = self.touch()?;
        self.entry().store(fresh, Ordering::Release);
        self.zap()?;
        let (_, marks_after_zap) = self.touch()?;

        // The whole entry, cleared.
        self.entry().store(0, Ordering::Release);
        self.forget_translations()?;
        let (ended, _) = self.touch()?;
        self.zap()?;
        let (ended_after_zap, _) = self.touch()?;

        Ok(HostTraits {
            accessed_returns: marks & ACCESSED != 0,
            dirty_returns: marks & DIRTY != 0,
            clear_takes_effect: ended == Ended::PageFault,
            zap_revokes: marks_after_zap == ACCESSED | DIRTY && ended_after_zap == Ended::PageFault,
            ring0_native: self.is_ring0_native()?,
            is_pvm: self.is_pvm(),
        })
    }

    /// The leaf entry of the target page.
    fn entry(&self) -> &AtomicU64 {
        let at = table_offset(&self.monitor, PT) + TARGET_ENTRY * size_of::<u64>();
        match self.tables.get_atomic_ref(at) {
            Ok(entry) => entry,
            Err(error) => unreachable!("the slot was made with room for byte {at}: {error}"),
        }
    }

    /// Writes to the target page at CPL 3. Returns how that ended, and the marks in its entry.
    fn touch(&mut self) -> Result<(Ended, u64), VmError> {
        let ended = self.run(Ring::Three, CODE_GVA)?;
        Ok((ended, self.entry().load(Ordering::Acquire) & (ACCESSED | DIRTY)))
    }

    /// Has the processor drop its cached translations without telling KVM to.
    fn forget_translations(&mut self) -> Result<(), VmError> {
        match self.run(Ring::Zero, KERNEL_CODE_GVA)? {
            Ended::Done => Ok(()),
            ended => Err(VmError::Probe { found: format!("a CR3 load ended in {ended:?}") }),
        }
    }

    /// Zaps the target page as the guest view's frames are zapped.
    fn zap(&self) -> Result<(), VmError> {
        memory::discard(&self.target, 0, PAGE_SIZE).map_err(|error| VmError::Probe {
            found: format!("the page cannot be zapped: {error}"),
        })
    }

    fn is_ring0_native(&mut self) -> Result<bool, VmError> {
        // At CPL 3 first: what does not run there either says nothing of CPL 0.
        match self.run(Ring::Three, CODE_GVA + ADD_VECTORS_OFFSET as u64)? {
            Ended::Done => {
                Ok(self.run(Ring::Zero, KERNEL_CODE_GVA + ADD_VECTORS_OFFSET as u64)?
                    == Ended::Done)
            }
            ended => Err(VmError::Probe { found: format!("SSE at CPL 3 ended in {ended:?}") }),
        }
    }

    fn is_pvm(&self) -> bool {
        let entry = kvm_msr_entry { index: MSR_PVM, ..Default::default() };
        let named = Msrs::from_entries(&[entry]).is_ok_and(|mut msrs| {
            self.fd.get_msrs(&mut msrs).is_ok_and(|read| read == 1)
                && msrs.as_slice().iter().all(|msr| msr.data == PVM_NAME)
        });
        named || Path::new(PVM_MODULE).exists()
    }

    /// Runs the code at `rip`, with the target's address in RDI, to its end.
    fn run(&mut self, ring: Ring, rip: u64) -> Result<Ended, VmError> {
        let mut cpu = GuestCpu::at_boot(Gpa::new(0), self.features);
        cpu.rip = rip;
        // The code's own right to its port, rather than the I/O bitmap's: some emulated processors
        // read that only in a TSS that is not in use.
        cpu.rflags |= rflags::IOPL;
        cpu.gpr[gpr::RDI] = TARGET_GVA;
        let root = table_address(&self.monitor, PML4);
        hw_regs::set_all(&mut self.fd, &self.monitor, 0, &cpu, root)?;
        if let Ring::Zero = ring {
            self.enter_ring_zero()?;
        }
        let ended = self.run_to_exit()?;
        // KVM finishes an `out` when it is entered again; do that before the next code is set up.
        self.fd.set_kvm_immediate_exit(1);
        let finished = self.fd.run().map(|exit| format!("{exit:?}"));
        self.fd.set_kvm_immediate_exit(0);
        match finished {
            Err(error) if error.errno() == libc::EINTR => Ok(ended),
            other => Err(VmError::Probe { found: format!("the end of an out gave {other:?}") }),
        }
    }

    fn enter_ring_zero(&mut self) -> Result<(), VmError> {
        let mut sregs = self.fd.get_sregs().map_err(KvmError::request("KVM_GET_SREGS"))?;
        sregs.cs = kvm_segment { selector: MONITOR_CS, dpl: 0, ..sregs.cs };
        sregs.ss = kvm_segment { selector: 0, dpl: 0, ..sregs.ss };
        self.fd.set_sregs(&sregs).map_err(KvmError::request("KVM_SET_SREGS"))?;
        Ok(())
    }

    fn run_to_exit(&mut self) -> Result<Ended, VmError> {
        for _ in 0..MAX_INTERRUPTIONS {
            match self.fd.run() {
                Ok(VcpuExit::IoOut(abi::PORT_EXIT, _)) => return Ok(Ended::Done),
                Ok(VcpuExit::IoOut(port, _)) if port == u16::from(vector::PF) => {
                    return Ok(Ended::PageFault);
                }
                Ok(VcpuExit::IoOut(port, _)) if port == u16::from(vector::UD) => {
                    return Ok(Ended::Unknown);
                }
                Ok(VcpuExit::InternalError) => return Ok(Ended::Unknown),
                Ok(VcpuExit::Intr) => {}
                Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
                other => {
                    return Err(VmError::Probe { found: format!("KVM_RUN gave {other:?}") });
                }
            }
        }
        Err(VmError::Probe { found: "signals kept its vCPU from running".to_owned() })
    }
}

/// Offset in the tables' slot of a page that follows the monitor.
fn table_offset(monitor: &MonitorLayout, page: usize) -> usize {
    (monitor.pages() + page) * PAGE_SIZE
}

fn table_address(monitor: &MonitorLayout, page: usize) -> u64 {
    TABLES_BASE + table_offset(monitor, page) as u64
}

/// Writes the monitor, the path to the leaf table, its three entries and the code.
fn write_tables(monitor: &MonitorLayout, tables: &MmapRegion) -> Result<(), monitor::InstallError> {
    let monitor_pml4e = monitor::install(monitor, tables, TABLES_BASE)?;
    let slice = tables.as_volatile_slice();
    let put = |page: usize, offset: usize, bytes: &[u8]| {
        slice.write_slice(bytes, table_offset(monitor, page) + offset)
    };
    let set = |page: usize, index: usize, entry: u64| put(page, index * 8, &entry.to_le_bytes());
    let upper = PRESENT | WRITABLE | USER | ACCESSED;

    set(PML4, (abi::GVA_LIMIT >> 39) as usize, monitor_pml4e)?;
    set(PML4, 0, table_address(monitor, PDPT) | upper)?;
    set(PDPT, 0, table_address(monitor, PD) | upper)?;
    set(PD, 0, table_address(monitor, PT) | upper)?;
    let code = PRESENT | ACCESSED;
    set(PT, (CODE_GVA / PAGE_SIZE_U64) as usize, table_address(monitor, CODE) | code | USER)?;
    let kernel_entry = (KERNEL_CODE_GVA / PAGE_SIZE_U64) as usize;
    set(PT, kernel_entry, table_address(monitor, KERNEL_CODE) | code)?;
    set(PT, TARGET_ENTRY, TARGET_BASE | PRESENT | WRITABLE | USER)?;

    put(CODE, 0, &TOUCH)?;
    put(KERNEL_CODE, 0, &RELOAD_CR3)?;
    put(CODE, ADD_VECTORS_OFFSET, &ADD_VECTORS)?;
    put(KERNEL_CODE, ADD_VECTORS_OFFSET, &ADD_VECTORS)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn traits() -> HostTraits {
        HostTraits {
            accessed_returns: true,
            dirty_returns: true,
            clear_takes_effect: true,
            zap_revokes: true,
            ring0_native: true,
            is_pvm: false,
        }
    }

    #[test]
    fn nested_paging_is_believed_only_when_all_of_it_was_seen() {
        assert_eq!(traits().kind(), HostKind::Tdp);
        for broken in [
            HostTraits { accessed_returns: false, ..traits() },
            HostTraits { dirty_returns: false, ..traits() },
            HostTraits { clear_takes_effect: false, ..traits() },
        ] {
            assert_eq!(broken.kind(), HostKind::Shadow, "{broken:?}");
        }
        assert!(HostKind::Shadow.zap_to_age());
        assert!(!HostKind::Tdp.zap_to_age());
    }
}
