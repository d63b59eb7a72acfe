//! A virtual machine: made, started, watched, stopped.
//!
//! Guarantee: a [`Vm`] that was started ends exactly once, with one [`Outcome`]; when
//! [`Vm::wait`] returned it, and when the value is dropped, none of its threads runs any more.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use vm_memory::MmapRegion;

use crate::export_rmap::ClientId;
use crate::host_mm::{MemoryObject, TripwireWatch};
use crate::iotlb::Iotlb;
use crate::shadow_mmu::ShadowMmu;
use crate::sync::lock;
use crate::sys::Patience;
use crate::vmm::contract::control_block::GuestCounters;
use crate::vmm::contract::devices::dma::DmaStats;
use crate::vmm::contract::observer::ViolationReport;
use crate::vmm::contract::services::Services;
use crate::vmm::error::VmError;
use crate::vmm::run::brief_wait::BriefWait;
use crate::vmm::run::gate::{Paused, Position};
use crate::vmm::run::kick::Kicker;
use crate::vmm::run::outcome::Outcome;
use crate::vmm::run::roster::VcpuState;
use crate::vmm::run::stats::{FaultLatency, LiveCounts, VcpuCounts};
use crate::vmm::run::threads::spawn_vcpu;

use super::assemble::Shape;
use super::clone::Birth;
use super::shared::Shared;
use super::vcpu::{StartRequest, Vcpu};

/// How long the threads of a VM may take to end before they are left behind.
const JOIN_TIMEOUT: Duration = Duration::from_secs(30);

/// A virtual machine. See the module's documentation.
pub struct Vm {
    pub(super) shared: Arc<Shared>,
    pub(super) object: Arc<MemoryObject>,
    pub(super) shape: Shape,
    /// The pinned window's memory.
    pub(super) window: Arc<MmapRegion>,
    pub(super) kickers: Vec<Arc<Kicker>>,
    /// The vCPUs before the start.
    pub(super) vcpus: Vec<Vcpu>,
    /// How each vCPU is to begin, by index; `None` for those that wait to be started by another.
    pub(super) starts: Vec<Option<StartRequest>>,
    pub(super) threads: Vec<JoinHandle<()>>,
    /// How it was cloned, if it was.
    pub(super) birth: Option<Birth>,
    /// The DMA device's.
    pub(super) device: Option<JoinHandle<()>>,
    /// Outlives the threads, which it may have to let go on.
    pub(super) _tripwire: Option<TripwireWatch>,
}

impl Vm {
    /// Starts the vCPU threads and lets the first vCPU run; those of a clone that were running in
    /// its source. Starting twice does nothing.
    ///
    /// # Errors
    /// [`VmError::Thread`], [`VmError::DeviceThread`]; the VM is then over.
    pub fn start(&mut self) -> Result<(), VmError> {
        if self.device.is_none() && !self.vcpus.is_empty() {
            self.start_device()?;
        }
        // All of them before the first thread: one that halts at once is not the last that runs.
        for (index, start) in std::mem::take(&mut self.starts).into_iter().enumerate() {
            if let Some(start) = start {
                // Refused only if it runs already.
                let _ = self.shared.roster.start(index, start);
            }
        }
        for vcpu in std::mem::take(&mut self.vcpus) {
            let index = vcpu.index;
            let Some(kicker) = self.kickers.get(index).cloned() else {
                continue;
            };
            match spawn_vcpu(index, move || vcpu.thread(&kicker)) {
                Ok(handle) => self.threads.push(handle),
                Err(error) => {
                    self.shared.end(Outcome::Killed);
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    fn start_device(&mut self) -> Result<(), VmError> {
        let shared = self.shared.clone();
        match self.shared.services.start_device(move |outcome| shared.end(outcome)) {
            Ok(handle) => {
                self.device = Some(handle);
                Ok(())
            }
            Err(error) => {
                self.shared.end(Outcome::Killed);
                Err(error)
            }
        }
    }

    /// Waits until the VM is over and all its threads are done; `None` when `timeout` passes
    /// first, or when the outcome was taken by an earlier call, or the VM was never started.
    pub fn wait(&mut self, timeout: Option<Duration>) -> Option<Outcome> {
        if self.threads.is_empty() || !self.wait_for_threads(timeout) {
            return None;
        }
        self.join();
        self.shared.roster.take_outcome()
    }

    /// Whether every thread was done in time.
    fn wait_for_threads(&self, timeout: Option<Duration>) -> bool {
        let mut patience = timeout.map(Patience::new);
        self.shared.roster.wait_for_exit(self.threads.len(), &mut patience)
            && self.shared.services.wait_for_device(&mut patience)
    }

    /// Asks the guest to finish: it sees the stop flag in the control block, makes its last
    /// checks and powers off, if it is one that looks.
    pub fn request_stop(&self) {
        self.shared.services.control.request_stop();
    }

    /// Ends the VM at once, whatever its guest does. Does not wait; [`Self::wait`] does.
    pub fn kill(&self) {
        self.shared.end(Outcome::Killed);
    }

    /// Takes all shadow pages back, as when they run out: the guest faults anew on whatever it uses.
    /// For stress. Left out when a vCPU does not come out of an exit in time, or a
    /// [stop](crate::sys::signal::is_stop_asked) is asked for.
    ///
    /// # Errors
    /// What KVM refused; the guest must not go on then.
    pub fn recycle(&self) -> Result<(), VmError> {
        match self.shared.recycle(self.shared.gate.epoch(), Some(BriefWait::begin())) {
            Paused::Done(flushed) => Ok(flushed?),
            Paused::AlreadyDone | Paused::Stopping | Paused::GivenUp => Ok(()),
        }
    }

    /// What it has of the contract.
    pub(in crate::vmm) fn services(&self) -> &Services {
        &self.shared.services
    }

    /// The guest's memory as the host sees it.
    #[must_use]
    pub fn object(&self) -> &Arc<MemoryObject> {
        &self.object
    }

    /// The VM's shadow MMU, for its statistics and checks.
    #[must_use]
    pub fn shadow(&self) -> &Arc<ShadowMmu> {
        &self.shared.shadow
    }

    /// The IOTLB of the VM's DMA device, for its statistics and checks.
    #[must_use]
    pub fn iotlb(&self) -> &Arc<Iotlb> {
        &self.shared.services.iotlb
    }

    /// The numbers of its export clients.
    #[must_use]
    pub fn client_ids(&self) -> Vec<ClientId> {
        let Shared { shadow, services, .. } = &*self.shared;
        vec![shadow.client_id(), services.iotlb.client_id()]
    }

    /// What the VM's DMA device has done.
    #[must_use]
    pub fn dma_stats(&self) -> DmaStats {
        self.shared.services.bus.dma().stats()
    }

    /// What the VMM counted so far, by vCPU.
    #[must_use]
    pub fn vcpu_counts(&self) -> Vec<VcpuCounts> {
        self.shared.counts.iter().map(LiveCounts::snapshot).collect()
    }

    /// What the VMM counted so far, all vCPUs together.
    #[must_use]
    pub fn counts(&self) -> VcpuCounts {
        let mut total = VcpuCounts::default();
        for counts in self.vcpu_counts() {
            total.add(&counts);
        }
        total
    }

    /// What the guest counted so far, by vCPU.
    #[must_use]
    pub fn guest_counters_by_vcpu(&self) -> Vec<GuestCounters> {
        self.shared.services.control.counters()
    }

    /// What the guest counted so far, all vCPUs together.
    #[must_use]
    pub fn guest_counters(&self) -> GuestCounters {
        self.shared.services.control.total()
    }

    /// The first violations that the guest reported, at most
    /// [`MAX_KEPT_REPORTS`](crate::vmm::MAX_KEPT_REPORTS).
    #[must_use]
    pub fn violations(&self) -> Vec<ViolationReport> {
        self.shared.services.reports.kept()
    }

    /// Number of all violations that the guest reported.
    #[must_use]
    pub fn violation_count(&self) -> u64 {
        self.shared.services.reports.count()
    }

    /// Latencies of shadow faults; complete once the VM is over.
    #[must_use]
    pub fn fault_latency(&self) -> FaultLatency {
        lock(&self.shared.latency).clone()
    }

    /// Accesses to ports that do not exist.
    #[must_use]
    pub fn unknown_port_accesses(&self) -> u64 {
        self.shared.services.bus.unknown_accesses()
    }

    /// Bytes of console output that the console did not take.
    #[must_use]
    pub fn lost_console_bytes(&self) -> u64 {
        self.shared.services.bus.lost_console_bytes()
    }

    /// Life of each vCPU by index, and where it is with respect to a pause of all.
    #[must_use]
    pub fn vcpu_states(&self) -> Vec<(VcpuState, Position)> {
        self.shared.roster.states().into_iter().zip(self.shared.gate.positions()).collect()
    }

    fn join(&mut self) {
        for thread in self.threads.drain(..).chain(self.device.take()) {
            // A panic was already turned into the VM's outcome.
            let _ = thread.join();
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if self.threads.is_empty() && self.device.is_none() {
            return;
        }
        self.shared.end(Outcome::Killed);
        if self.wait_for_threads(Some(JOIN_TIMEOUT)) {
            self.join();
        }
        // Otherwise the threads are left behind with everything that they use, which they share
        // by reference counts: a leak, but nothing dangles.
    }
}
