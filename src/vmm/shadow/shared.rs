//! What all threads of a VM share.

use std::sync::{Arc, OnceLock};
use std::time::Instant;

use crate::shadow_mmu::ShadowMmu;
use crate::sync::Mutex;
use crate::vmm::contract::services::Services;
use crate::vmm::kvm::cpuid_offered::CpuidTable;
use crate::vmm::kvm::device::{KvmError, KvmVm};
use crate::vmm::run::brief_wait::BriefWait;
use crate::vmm::run::bus::Bus;
use crate::vmm::run::gate::{Gate, Paused};
use crate::vmm::run::outcome::Outcome;
use crate::vmm::run::roster::Roster;
use crate::vmm::run::stats::{FaultLatency, LiveCounts};

use super::machine_space::TABLES_SLOT;
use super::monitor::MonitorLayout;
use super::vcpu::StartRequest;

/// See the module's documentation.
pub(super) struct Shared {
    /// Dropped first: no guest can run when the memory behind its slots goes.
    pub(super) kvm: KvmVm,
    pub(super) shadow: Arc<ShadowMmu>,
    pub(super) monitor: MonitorLayout,
    /// What `cpuid` answers.
    pub(super) cpuid: CpuidTable,
    pub(super) services: Arc<Services>,
    pub(super) bus: Arc<dyn Bus>,
    pub(super) gate: Gate,
    pub(super) roster: Roster<StartRequest>,
    pub(super) counts: Vec<LiveCounts>,
    /// Latencies of the vCPUs that have ended.
    pub(super) latency: Mutex<FaultLatency>,
    /// When the first vCPU was first let in.
    pub(super) first_entry: OnceLock<Instant>,
}

impl Shared {
    /// Takes all shadow pages back while no vCPU is inside the gate, unless that happened since
    /// `epoch`. The caller is not inside; if it is no vCPU, it waits for a while only.
    pub(super) fn recycle(
        &self,
        epoch: u64,
        brief: Option<BriefWait>,
    ) -> Paused<Result<(), KvmError>> {
        self.gate.pause_all(epoch, brief, || {
            self.shadow.recycle();
            self.kvm.flush_slot(TABLES_SLOT)
        })
    }

    /// Ends the VM: the outcome stands if it is the first, and every vCPU leaves its loop.
    pub(super) fn end(&self, outcome: Outcome) {
        self.roster.end(outcome);
        self.gate.stop();
        self.bus.over();
    }
}
