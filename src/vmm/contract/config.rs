//! What a VM of the contract is to be, and what no VM can be.
//!
//! Guarantee: what is refused is refused with the bounds, before anything is made.

use std::borrow::Cow;
use std::sync::Arc;

use crate::abi;
use crate::addr::PAGE_SIZE_U64;
use crate::vmm::error::VmError;

use super::observer::VmObserver;

/// Least guest RAM: the boot area and some room for a kernel.
pub const MIN_MEMORY_BYTES: u64 = 2 << 20;
/// Pages that the DMA device has translations of at a time.
pub(in crate::vmm) const IOTLB_ENTRIES: usize = 64;

/// What a VM is to be.
#[derive(Clone)]
pub struct VmConfig {
    /// Guest RAM in bytes, from guest-physical 0; a multiple of 4096 from [`MIN_MEMORY_BYTES`]
    /// to [`crate::abi::MAX_MEMORY_BYTES`].
    pub memory_bytes: u64,
    /// Number of vCPUs; the first starts at the kernel's entry point, the others wait for
    /// [`crate::abi::HC_START_VCPU`].
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

/// Whether a VM can have so much RAM.
pub(in crate::vmm) fn check_memory(bytes: u64) -> Result<(), VmError> {
    let (min, max) = (MIN_MEMORY_BYTES, abi::MAX_MEMORY_BYTES);
    if bytes.is_multiple_of(PAGE_SIZE_U64) && (min..=max).contains(&bytes) {
        return Ok(());
    }
    Err(VmError::MemorySize { bytes, min, max })
}

/// Whether a VM on this host can have so many vCPUs.
pub(in crate::vmm) fn check_vcpus(vcpus: usize, most_of_host: usize) -> Result<(), VmError> {
    let max = most_of_host.min(abi::MAX_VCPUS);
    if (1..=max).contains(&vcpus) {
        return Ok(());
    }
    Err(VmError::VcpuCount { vcpus, max })
}
