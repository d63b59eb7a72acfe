//! Gnomon: a small hypervisor that manages guest memory itself.

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!(
    "gnomon needs 64-bit Linux on x86-64: it drives /dev/kvm and builds x86-64 page tables"
);

pub mod addr;
#[cfg(not(any(loom, shuttle)))]
pub mod cli;
#[cfg(not(any(loom, shuttle)))]
mod compressed;
mod counters;
#[cfg(not(any(loom, shuttle)))]
pub mod direct_mmu;
pub mod export_rmap;
#[cfg(all(any(test, feature = "fuzzing"), not(any(loom, shuttle))))]
#[doc(hidden)]
pub mod fuzzing;
#[cfg(not(any(loom, shuttle)))]
pub mod host_mm;
pub mod iotlb;
#[cfg(not(any(loom, shuttle)))]
pub mod peer;
#[cfg(not(any(loom, shuttle)))]
pub mod shadow_mmu;
pub mod sync;
#[cfg(not(any(loom, shuttle)))]
pub mod virtio;
#[cfg(not(any(loom, shuttle)))]
pub mod vmm;

#[doc(no_inline)]
pub use gnomon_abi::{self as abi, page_format};
#[cfg(not(any(loom, shuttle)))]
#[doc(no_inline)]
pub use gnomon_sys as sys;
