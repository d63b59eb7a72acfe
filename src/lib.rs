//! Gnomon: a small hypervisor that manages guest memory itself.

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!(
    "gnomon needs 64-bit Linux on x86-64: it drives /dev/kvm and builds x86-64 page tables"
);

#[path = "../guest/src/abi.rs"]
pub mod abi;
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
#[path = "../guest/src/page_format.rs"]
pub mod page_format;
#[cfg(not(any(loom, shuttle)))]
pub mod peer;
#[cfg(not(any(loom, shuttle)))]
pub mod shadow_mmu;
#[cfg(not(any(loom, shuttle)))]
mod streams;
pub mod sync;
#[cfg(not(any(loom, shuttle)))]
pub mod sys;
#[cfg(not(any(loom, shuttle)))]
pub mod virtio;
#[cfg(not(any(loom, shuttle)))]
pub mod vmm;
