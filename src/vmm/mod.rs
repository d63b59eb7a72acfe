//! The VMM: KVM, vCPUs and their exits, the monitor, emulation, boot, devices.
//!
//! Guarantee (I9, guest containment): a guest, whatever instructions, page tables and port
//! accesses it comes up with, reaches no memory but its own, and neither crashes, hangs nor grows
//! the hypervisor. It goes on by the architecture's rules or its VM ends with a sentence.
//!
//! The pieces, from the guest outwards: the `monitor` turns exceptions into exits, `exits`
//! handles them on the thread of the `vcpu`, [`emulate`] and [`inject`] change the guest's
//! state, the `gate` keeps all vCPUs out while shadow pages are recycled, the `roster` knows
//! who runs, and `vm` puts it all together, also from a VM that runs (`clone`).

mod any;
mod assemble;
pub mod boot;
mod brief_wait;
mod clone;
mod config;
mod control_block;
pub mod cpu;
mod cpuid;
mod cpuid_answer;
mod cpuid_offered;
mod devices;
mod direct;
pub mod emulate;
mod error;
pub mod exceptions;
mod exit_data;
mod exits;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fake_memory;
mod features;
mod gate;
mod host_kind;
mod hypercall;
pub mod inject;
mod kick;
mod kvm;
pub mod linux;
mod machine_space;
pub mod memory;
mod monitor;
mod observer;
mod offer;
mod outcome;
mod pinned;
pub mod plain;
mod progress;
mod real;
mod real_state;
mod registers;
mod roster;
mod services;
mod shared;
mod stale;
mod stats;
mod threads;
mod vcpu;
mod vm;

pub use any::AnyVm;
pub(crate) use assemble::shadow_table_bytes;
pub use clone::CloneFigures;
pub use config::{MIN_MEMORY_BYTES, VmConfig};
pub use control_block::GuestCounters;
pub(crate) use control_block::window_bytes;
pub use devices::dma::DmaStats;
pub use direct::{DirectVm, Removal};
pub use error::{GuestError, StaleAccess, VmError};
pub use gate::Position;
pub use host_kind::{HostKind, HostTraits};
pub use kvm::{KVM_DEVICE, KvmError};
pub use observer::{MAX_KEPT_REPORTS, ViolationReport, VmObserver};
pub use offer::KvmOffer;
pub use outcome::Outcome;
pub use pinned::MapError;
pub use roster::VcpuState;
pub use stats::{FaultLatency, Latencies, VcpuCounts};
pub use vm::Vm;
