//! What all threads of a VM share.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use crate::iotlb::Iotlb;
use crate::shadow_mmu::ShadowMmu;
use crate::sync::Mutex;

use super::devices::PortBus;
use super::error::VmError;
use super::gate::Gate;
use super::hypercall::{Reports, VmObserver};
use super::kvm::KvmVm;
use super::machine::ControlBlock;
use super::monitor::MonitorLayout;
use super::roster::Roster;
use super::stats::{FaultLatency, LiveCounts};
use super::vcpu::panic_message;
use super::vm::Outcome;

/// See the module's documentation.
pub(super) struct Shared {
    /// Dropped first: no guest can run when the memory behind its slots goes.
    pub(super) kvm: KvmVm,
    pub(super) shadow: Arc<ShadowMmu>,
    pub(super) monitor: MonitorLayout,
    pub(super) control: ControlBlock,
    pub(super) bus: PortBus,
    /// The DMA device's way to memory.
    pub(super) iotlb: Arc<Iotlb>,
    pub(super) gate: Gate,
    pub(super) roster: Roster,
    pub(super) reports: Reports,
    pub(super) observer: Option<Arc<dyn VmObserver>>,
    pub(super) counts: Vec<LiveCounts>,
    /// Latencies of the vCPUs that have ended.
    pub(super) latency: Mutex<FaultLatency>,
    /// When the first vCPU was first let in.
    pub(super) first_entry: OnceLock<Instant>,
    pub(super) memory_bytes: u64,
    pub(super) window_bytes: u64,
    pub(super) vcpus: usize,
}

impl Shared {
    /// Ends the VM: the outcome stands if it is the first, and every vCPU leaves its loop.
    pub(super) fn end(&self, outcome: Outcome) {
        self.roster.end(outcome);
        self.gate.stop();
        self.bus.dma().stop();
    }

    /// The body of the DMA device's thread: a host that fails under it ends the VM as it does under
    /// a vCPU.
    pub(super) fn serve_dma(&self) {
        match catch_unwind(AssertUnwindSafe(|| self.bus.dma().serve())) {
            Ok(Ok(())) => {}
            Ok(Err(error)) => self.end(Outcome::Failed(error.into())),
            Err(panic) => {
                let message = panic_message(panic.as_ref());
                self.end(Outcome::Failed(VmError::DevicePanicked { message }));
            }
        }
        self.bus.dma().over();
    }

    pub(super) fn observe(&self, tell: impl FnOnce(&dyn VmObserver)) {
        if let Some(observer) = &self.observer {
            tell(observer.as_ref());
        }
    }
}
