//! The VMM: guests, their vCPUs and exits, and what they find beside memory.
//!
//! Guarantee (I9, guest containment): a guest, whatever instructions, page tables and port
//! accesses it comes up with, reaches no memory but its own, and neither crashes, hangs nor grows
//! the hypervisor. It goes on by the architecture's rules or its VM ends with a sentence.
//!
//! The rooms, lowest first; each imports from those above it in this list only, and not from the other
//! of its line (`tests/layering.rs`):
//!
//! - `kvm`: KVM as it is
//! - `error`: what can go wrong, by who is at fault
//! - `run`: what every machine runs by, and [`cpu`]: the guest's processor in software
//! - `contract`: what guests that keep to the guest ABI are offered
//! - `shadow` and [`direct`]: machines with shadow paging, and with direct paging
//! - [`linux`]: stock Linux kernels

mod contract;
pub mod cpu;
pub mod direct;
mod error;
mod kvm;
pub mod linux;
mod run;
mod shadow;

pub use contract::boot;
pub use contract::clone::CloneFigures;
pub use contract::config::{MIN_MEMORY_BYTES, VmConfig};
pub use contract::control_block::GuestCounters;
pub use contract::control_block::window_bytes;
pub use contract::devices::dma::DmaStats;
pub use contract::observer::{MAX_KEPT_REPORTS, ViolationReport, VmObserver};
pub use contract::vm::{Contract, ContractVm};
pub use direct::{DirectVm, Removal};
pub use error::{GuestError, StaleAccess, VmError};
pub use kvm::device::{KVM_DEVICE, KvmError};
pub use kvm::offer::KvmOffer;
pub use kvm::pinned::MapError;
pub use run::gate::Position;
pub use run::machine::Machine;
pub use run::outcome::Outcome;
pub use run::processor::{Next, Processor, Space};
pub use run::roster::VcpuState;
pub use run::stats::{FaultLatency, Latencies, PagingStats, VcpuCounts};
pub use shadow::{HostKind, HostTraits, ShadowProcessor, Vm, shadow_table_bytes};

/// VMs without KVM, for the tests of the layers above.
#[cfg(all(test, feature = "lab"))]
pub(crate) mod fakes {
    pub(crate) use super::contract::vm::tests::vm;
    pub(crate) use super::run::fakes::Op;
}
