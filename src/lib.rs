//! Gnomon: a small hypervisor that manages guest memory itself.

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!(
    "gnomon needs 64-bit Linux on x86-64: it drives /dev/kvm and builds x86-64 page tables"
);

#[cfg(feature = "cli")]
pub mod cli;
pub mod compressed;
pub mod direct_mmu;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
pub mod iotlb;
#[cfg(feature = "lab")]
pub mod lab;
pub mod peer;
pub mod shadow_mmu;
mod streams;
pub mod virtio;
pub mod vmm;

#[doc(no_inline)]
pub use gnomon_abi::{self as abi, page_format};
pub(crate) use gnomon_export_rmap::counters;
#[doc(no_inline)]
pub use gnomon_export_rmap::{self as export_rmap, addr, sync};
#[doc(no_inline)]
pub use gnomon_host_mm as host_mm;
#[doc(no_inline)]
pub use gnomon_sys as sys;
