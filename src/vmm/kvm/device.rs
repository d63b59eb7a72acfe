//! The KVM device and a VM on it: what it must offer, its memory slots.
//!
//! Guarantee: a [`KvmVm`] keeps the memory behind each of its slots mapped for as long as it has
//! the slot, so no guest access ever lands in memory that was unmapped and reused.
//!
//! Source: `Documentation/virt/kvm/api.rst`.

use std::io;
use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_CAP_DISABLE_QUIRKS2, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY,
    KVM_SYNC_X86_REGS, KVM_SYNC_X86_SREGS, KVM_X86_QUIRK_FIX_HYPERCALL_INSN, kvm_enable_cap,
    kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use vm_memory::MmapRegion;
use vmm_sys_util::eventfd::EventFd;

use crate::sync::{Mutex, lock};

use super::features::Features;

/// Path of the KVM device.
pub const KVM_DEVICE: &str = "/dev/kvm";
/// Where KVM on Intel hosts puts its three-page real-mode TSS; below 4 GiB, where no slot is.
const KVM_TSS_ADDRESS: usize = 0xfffb_d000;
/// Attempts at an ioctl that signals may interrupt.
const EINTR_RETRIES: u32 = 100;

/// Why KVM cannot be used, with what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// No device.
    #[error(
        "{KVM_DEVICE} does not exist: load the kvm_intel or kvm_amd module, and enable virtualisation in the firmware (or nested virtualisation on the host of this machine)"
    )]
    Missing,
    /// No rights on the device.
    #[error(
        "no permission to open {KVM_DEVICE}: add this user to its group (usually `kvm`), or run as root"
    )]
    Denied,
    /// Any other reason.
    #[error("cannot open {KVM_DEVICE}: {0}; `gnomon doctor` says what this host lacks")]
    Open(#[source] io::Error),
    /// Not the stable KVM interface.
    #[error(
        "{KVM_DEVICE} speaks API version {found}, but version {KVM_API_VERSION} is needed: use a mainline kernel"
    )]
    ApiVersion {
        /// The version found.
        found: i32,
    },
    /// A needed capability is missing.
    #[error("this kernel's KVM lacks {capability}: Linux 4.17 or later has it on x86-64")]
    MissingCapability {
        /// Its name.
        capability: &'static str,
    },
    /// The processor lacks something.
    #[error(
        "guests of this KVM lack {feature}, which shadow paging needs: use a host that offers it"
    )]
    MissingFeature {
        /// Its name.
        feature: &'static str,
    },
    /// A request failed.
    #[error(
        "KVM request {request} failed: {source}; look into the kernel's log for why, and run `gnomon doctor`"
    )]
    Request {
        /// The request's name.
        request: &'static str,
        /// The reason.
        source: io::Error,
    },
}

impl KvmError {
    /// Wraps the failure of `request`.
    pub(in crate::vmm) fn request(request: &'static str) -> impl Fn(kvm_ioctls::Error) -> Self {
        move |error| Self::Request { request, source: io_error(error) }
    }
}

/// The errno of a KVM request as a standard error.
pub(in crate::vmm) fn io_error(error: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}

/// The opened and checked KVM device.
pub(crate) struct KvmDevice {
    kvm: Kvm,
}

impl KvmDevice {
    /// Opens the device and checks all that Gnomon needs of it.
    pub(crate) fn open() -> Result<Self, KvmError> {
        let device = Self::open_unchecked()?;
        match device.capabilities().iter().find(|(_, offered)| !offered) {
            Some(&(capability, _)) => Err(KvmError::MissingCapability { capability }),
            None => Ok(device),
        }
    }

    /// Opens the device, whatever it offers.
    pub(super) fn open_unchecked() -> Result<Self, KvmError> {
        let kvm = Kvm::new().map_err(|error| match error.errno() {
            libc::ENOENT | libc::ENXIO | libc::ENODEV => KvmError::Missing,
            libc::EACCES | libc::EPERM => KvmError::Denied,
            _ => KvmError::Open(io_error(error)),
        })?;
        let found = kvm.get_api_version();
        if u32::try_from(found) != Ok(KVM_API_VERSION) {
            return Err(KvmError::ApiVersion { found });
        }
        Ok(Self { kvm })
    }

    /// All capabilities that Gnomon needs, and whether they are there.
    pub(super) fn capabilities(&self) -> Vec<(&'static str, bool)> {
        let flags = [
            (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
            (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
            (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
            (Cap::DestroyMemoryRegionWorks, "KVM_CAP_DESTROY_MEMORY_REGION_WORKS"),
        ];
        let mut all: Vec<_> = flags
            .into_iter()
            .map(|(capability, name)| (name, self.kvm.check_extension(capability)))
            .collect();
        let synced = u32::try_from(self.kvm.check_extension_int(Cap::SyncRegs)).unwrap_or(0);
        let wanted = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS;
        all.push(("KVM_CAP_SYNC_REGS", synced & wanted == wanted));
        all
    }

    /// Most vCPUs of one VM.
    pub(crate) fn max_vcpus(&self) -> usize {
        self.kvm.get_max_vcpus()
    }

    /// The CPUID leaves for guests of the contract: of what KVM supports, what they can use.
    pub(crate) fn guest_cpuid(&self) -> Result<CpuId, KvmError> {
        let mut cpuid = self
            .kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(KvmError::request("KVM_GET_SUPPORTED_CPUID"))?;
        super::cpuid_offered::restrict(cpuid.as_mut_slice());
        Ok(cpuid)
    }

    /// The CPUID leaves of processor `index` for guests that have all that KVM supports.
    pub(crate) fn plain_cpuid(&self, index: usize) -> Result<CpuId, KvmError> {
        let mut cpuid = self
            .kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(KvmError::request("KVM_GET_SUPPORTED_CPUID"))?;
        super::cpuid::number_processor(cpuid.as_mut_slice(), index);
        // KVM does not list it, since only the one who makes the irqchip knows that there is one.
        if self.kvm.check_extension(Cap::TscDeadlineTimer) {
            super::cpuid::offer_tsc_deadline(cpuid.as_mut_slice());
        }
        Ok(cpuid)
    }

    /// Makes a VM. Signals may interrupt this one for long: KVM returns EINTR from it.
    pub(crate) fn create_vm(&self) -> Result<KvmVm, KvmError> {
        let mut attempt = 0;
        let vm = loop {
            match self.kvm.create_vm() {
                Err(error) if error.errno() == libc::EINTR && attempt < EINTR_RETRIES => {
                    attempt += 1
                }
                result => break result.map_err(KvmError::request("KVM_CREATE_VM"))?,
            }
        };
        if self.kvm.check_extension(Cap::SetTssAddr) {
            vm.set_tss_address(KVM_TSS_ADDRESS).map_err(KvmError::request("KVM_SET_TSS_ADDR"))?;
        }
        keep_hypercalls_unpatched(&vm);
        Ok(KvmVm { vm, slots: Mutex::new(Vec::new()) })
    }
}

/// Without this, KVM answers a `vmcall` on AMD (`vmmcall` on Intel) by writing the other
/// instruction over it in guest memory, past our bookkeeping of dirty pages. Where the kernel
/// cannot switch that off, such a write meets a read-only page and becomes a page fault.
fn keep_hypercalls_unpatched(vm: &VmFd) {
    let quirk = KVM_X86_QUIRK_FIX_HYPERCALL_INSN;
    let offered = vm.check_extension_raw(u64::from(KVM_CAP_DISABLE_QUIRKS2));
    if u32::try_from(offered).unwrap_or(0) & quirk == 0 {
        return;
    }
    let mut request = kvm_enable_cap { cap: KVM_CAP_DISABLE_QUIRKS2, ..Default::default() };
    request.args[0] = u64::from(quirk);
    // A refusal leaves the default, which is safe, see above.
    let _ = vm.enable_cap(&request);
}

/// One memory slot of the machine space.
struct Slot {
    id: u32,
    /// First machine address.
    machine: u64,
    backing: Arc<MmapRegion>,
}

/// A KVM VM with its memory slots.
pub(crate) struct KvmVm {
    // Dropped before the backing memory of its slots.
    vm: VmFd,
    slots: Mutex<Vec<Slot>>,
}

impl KvmVm {
    /// Makes vCPU `index` with the given CPUID leaves.
    pub(crate) fn create_vcpu(&self, index: usize, cpuid: &CpuId) -> Result<VcpuFd, KvmError> {
        let vcpu =
            self.vm.create_vcpu(index as u64).map_err(KvmError::request("KVM_CREATE_VCPU"))?;
        vcpu.set_cpuid2(cpuid).map_err(KvmError::request("KVM_SET_CPUID2"))?;
        Ok(vcpu)
    }

    /// Gives the VM interrupt controllers and a timer in the kernel; before its first vCPU.
    pub(crate) fn create_irqchip(&self) -> Result<(), KvmError> {
        self.vm.create_irq_chip().map_err(KvmError::request("KVM_CREATE_IRQCHIP"))?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        self.vm.create_pit2(pit).map_err(KvmError::request("KVM_CREATE_PIT2"))
    }

    /// Has each write to `line` raise an edge of this interrupt; with an irqchip only.
    pub(crate) fn attach_irqfd(&self, line: &EventFd, gsi: u32) -> Result<(), KvmError> {
        self.vm.register_irqfd(line, gsi).map_err(KvmError::request("KVM_IRQFD"))
    }

    /// Adds a slot backed by all of `region`.
    pub(crate) fn add_region(
        &self,
        id: u32,
        machine: u64,
        region: &Arc<MmapRegion>,
    ) -> Result<(), KvmError> {
        let slot = Slot { id, machine, backing: region.clone() };
        let mut slots = lock(&self.slots);
        self.set(&slot, slot.backing.size() as u64)?;
        slots.push(slot);
        Ok(())
    }

    /// Deletes slot `id` and adds it again, which makes KVM forget everything it knows of it: the
    /// full flush. No vCPU may run meanwhile.
    pub(crate) fn flush_slot(&self, id: u32) -> Result<(), KvmError> {
        let slots = lock(&self.slots);
        for slot in slots.iter().filter(|slot| slot.id == id) {
            self.set(slot, 0)?;
            self.set(slot, slot.backing.size() as u64)?;
        }
        Ok(())
    }

    /// Size 0 deletes the slot.
    fn set(&self, slot: &Slot, bytes: u64) -> Result<(), KvmError> {
        let region = kvm_userspace_memory_region {
            slot: slot.id,
            flags: 0,
            guest_phys_addr: slot.machine,
            memory_size: bytes,
            userspace_addr: slot.backing.as_ptr() as u64,
        };
        // SAFETY: the slot's memory is a mapping of at least that size which only its own drop
        // unmaps; the slot holds a reference to it and is kept in `self.slots` for as long as
        // this VM lives (`vm` is dropped first). The guest may write it at any time: whoever else
        // uses a region uses it by volatile copies and atomics. KVM checks for overlaps itself.
        #[allow(unsafe_code)]
        unsafe { self.vm.set_user_memory_region(region) }
            .map_err(KvmError::request("KVM_SET_USER_MEMORY_REGION"))
    }
}

/// What the leaves say of the features that Gnomon's emulation depends on.
pub(crate) fn features(cpuid: &CpuId) -> Result<Features, KvmError> {
    let features = super::cpuid::features(cpuid.as_slice());
    if features.nx {
        Ok(features)
    } else {
        Err(KvmError::MissingFeature { feature: "no-execute pages (NX)" })
    }
}
