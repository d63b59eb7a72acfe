//! A VM for guests that keep to the contract, whatever its processors are and however its memory is mapped.
//!
//! Guarantee: a [`ContractVm`] that was started ends exactly once, with one [`Outcome`]; when
//! [`ContractVm::wait`] returned it, and when the value is dropped, none of its threads runs any more, that
//! of its DMA device among them. What a kind of VM adds is how it is made, and what it cannot do.

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use crate::export_rmap::ClientId;
use crate::host_mm::MemoryObject;
use crate::iotlb::Iotlb;
use crate::vmm::error::VmError;
use crate::vmm::run::gate::Position;
use crate::vmm::run::machine::Machine;
use crate::vmm::run::outcome::Outcome;
use crate::vmm::run::processor::{Processor, Space};
use crate::vmm::run::roster::VcpuState;
use crate::vmm::run::stats::{FaultLatency, PagingStats, VcpuCounts};

use super::clone::{Birth, CloneFigures, clone_running};
use super::control_block::GuestCounters;
use super::devices::dma::DmaStats;
use super::observer::{ViolationReport, VmObserver};
use super::services::Services;

/// A kind of processor whose machines have the contract's services; what not every kind can do.
pub trait Contract: Processor {
    /// A VM of the same shape as `vm`, around nothing yet: its memory and its window are all zeros, its
    /// control block is not filled, and none of its vCPUs begins by itself.
    ///
    /// # Errors
    /// What the host refused, or that this kind cannot be cloned.
    fn empty_clone(
        vm: &ContractVm<Self>,
        observer: Option<Arc<dyn VmObserver>>,
        console: Box<dyn Write + Send>,
    ) -> Result<ContractVm<Self>, VmError>;

    /// [`ContractVm::recycle`].
    ///
    /// # Errors
    /// What the host refused; the guest must not go on then.
    fn recycle(_vm: &ContractVm<Self>) -> Result<(), VmError> {
        Ok(())
    }
}

/// See the module's documentation.
pub struct ContractVm<P: Processor> {
    // In the order in which they go: no vCPU runs, nor the device's thread, when its services go.
    machine: Machine<P>,
    services: Arc<Services>,
    /// How it was cloned, if it was.
    pub(super) birth: Option<Birth>,
}

impl<P: Processor> ContractVm<P> {
    /// A machine before whose bus there are these services.
    pub(in crate::vmm) fn of(machine: Machine<P>, services: Arc<Services>) -> Self {
        Self { machine, services, birth: None }
    }

    /// Starts the DMA device and the vCPU threads, and lets the first vCPU run; those of a clone that were
    /// running in its source. Starting twice does nothing.
    ///
    /// # Errors
    /// [`VmError::Thread`], [`VmError::DeviceThread`]; the VM is then over.
    pub fn start(&mut self) -> Result<(), VmError> {
        self.machine.start()
    }

    /// Waits until the VM is over and all its threads are done; `None` when `timeout` passes
    /// first, or when the outcome was taken by an earlier call, or the VM was never started.
    pub fn wait(&mut self, timeout: Option<Duration>) -> Option<Outcome> {
        self.machine.wait(timeout)
    }

    /// Asks the guest to finish: it sees the stop flag in the control block, makes its last
    /// checks and powers off, if it is one that looks.
    pub fn request_stop(&self) {
        self.services.control.request_stop();
    }

    /// Ends the VM at once, whatever its guest does. Does not wait; [`Self::wait`] does.
    pub fn kill(&self) {
        self.machine.kill();
    }

    /// What runs.
    pub(in crate::vmm) fn machine(&self) -> &Machine<P> {
        &self.machine
    }

    /// The same, to be changed before it runs.
    pub(super) fn machine_mut(&mut self) -> &mut Machine<P> {
        &mut self.machine
    }

    /// What it has of the contract.
    pub(in crate::vmm) fn services(&self) -> &Services {
        &self.services
    }

    /// The guest's memory as the host sees it.
    #[must_use]
    pub fn object(&self) -> &Arc<MemoryObject> {
        &self.services.object
    }

    /// The IOTLB of the VM's DMA device, for its statistics and checks.
    #[must_use]
    pub fn iotlb(&self) -> &Arc<Iotlb> {
        &self.services.iotlb
    }

    /// The numbers of its export clients.
    #[must_use]
    pub fn client_ids(&self) -> Vec<ClientId> {
        vec![self.machine.space().client_id(), self.services.iotlb.client_id()]
    }

    /// What the VM's DMA device has done.
    #[must_use]
    pub fn dma_stats(&self) -> DmaStats {
        self.services.bus.dma().stats()
    }

    /// What the VMM counted so far, by vCPU.
    #[must_use]
    pub fn vcpu_counts(&self) -> Vec<VcpuCounts> {
        self.machine.vcpu_counts()
    }

    /// What the VMM counted so far, all vCPUs together.
    #[must_use]
    pub fn counts(&self) -> VcpuCounts {
        self.machine.counts()
    }

    /// Faults that were fixed, by whatever maps the memory.
    #[must_use]
    pub fn faults(&self) -> u64 {
        self.counts().faults().saturating_add(self.machine.space().faults())
    }

    /// What has been done to map the memory.
    #[must_use]
    pub fn paging_stats(&self) -> PagingStats {
        self.machine.space().paging_stats()
    }

    /// What the guest counted so far, by vCPU.
    #[must_use]
    pub fn guest_counters_by_vcpu(&self) -> Vec<GuestCounters> {
        self.services.control.counters()
    }

    /// What the guest counted so far, all vCPUs together.
    #[must_use]
    pub fn guest_counters(&self) -> GuestCounters {
        self.services.control.total()
    }

    /// The first violations that the guest reported, at most
    /// [`MAX_KEPT_REPORTS`](crate::vmm::MAX_KEPT_REPORTS).
    #[must_use]
    pub fn violations(&self) -> Vec<ViolationReport> {
        self.services.reports.kept()
    }

    /// Number of all violations that the guest reported.
    #[must_use]
    pub fn violation_count(&self) -> u64 {
        self.services.reports.count()
    }

    /// Latencies of faults, where they are measured; complete once the VM is over.
    #[must_use]
    pub fn fault_latency(&self) -> FaultLatency {
        self.machine.space().fault_latency()
    }

    /// Accesses to ports that do not exist.
    #[must_use]
    pub fn unknown_port_accesses(&self) -> u64 {
        self.services.bus.unknown_accesses()
    }

    /// Bytes of console output that the console did not take.
    #[must_use]
    pub fn lost_console_bytes(&self) -> u64 {
        self.services.bus.lost_console_bytes()
    }

    /// Life of each vCPU by index, and where it is with respect to a pause of all.
    #[must_use]
    pub fn vcpu_states(&self) -> Vec<(VcpuState, Position)> {
        self.machine.vcpu_states()
    }

    /// What it took to clone this VM; `None` for one that booted.
    #[must_use]
    pub fn clone_figures(&self) -> Option<CloneFigures> {
        Some(self.birth?.figures(self.machine.first_entry()))
    }

    /// Compares what the reverse map has of this VM with what is mapped, as far as that can be done
    /// while its vCPUs run; one sentence for each difference.
    #[must_use]
    pub fn check_running(&self) -> Vec<String> {
        let mut differences = self.services.iotlb.check_reverse_map();
        differences.extend(self.machine.space().check_running());
        differences
    }

    /// Compares what the reverse map has of this VM with what is mapped; one sentence for each
    /// difference. No vCPU may run any more.
    #[must_use]
    pub fn check_reverse_map(&self) -> Vec<String> {
        let mut differences = self.machine.space().check_reverse_map();
        differences.extend(self.services.iotlb.check_reverse_map());
        differences
    }
}

impl<P: Contract> ContractVm<P> {
    /// A clone that runs already. Its memory comes from the same host memory, its serial port
    /// prints to `console`, and `observer` is told of what its guest says.
    ///
    /// Vcpus that wait to be started wait in the clone, too; x87 and SSE registers that a halted
    /// one left are not copied.
    ///
    /// # Errors
    /// [`VmError::NotRunning`] if the VM is over or none of its vCPUs runs; [`VmError::NotInTime`] if
    /// one of them, or the DMA device, waits for something that does not come;
    /// [`VmError::CloneOfWindow`] with direct paging; otherwise what the host refused. The VM itself goes
    /// on in any case.
    pub fn clone_running(
        &self,
        observer: Option<Arc<dyn VmObserver>>,
        console: Box<dyn Write + Send>,
    ) -> Result<Self, VmError> {
        clone_running(self, observer, console)
    }

    /// Takes all shadow pages back, as when they run out: the guest faults anew on whatever it uses.
    /// For stress; nothing without shadow paging. Left out when a vCPU does not come out of an exit in time,
    /// or a [stop](crate::sys::signal::is_stop_asked) is asked for.
    ///
    /// # Errors
    /// What KVM refused; the guest must not go on then.
    pub fn recycle(&self) -> Result<(), VmError> {
        P::recycle(self)
    }
}

#[cfg(test)]
#[path = "vm_tests.rs"]
pub(in crate::vmm) mod tests;
