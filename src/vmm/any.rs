//! A VM, however its memory is paged.

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use crate::direct_mmu::DirectStats;
use crate::export_rmap::ClientId;
use crate::host_mm::MemoryObject;
use crate::iotlb::Iotlb;
use crate::shadow_mmu::ShadowStats;

use super::contract::control_block::GuestCounters;
use super::contract::devices::dma::DmaStats;
use super::contract::observer::{ViolationReport, VmObserver};
use super::contract::services::Services;
use super::direct::DirectVm;
use super::error::VmError;
use super::run::outcome::Outcome;
use super::run::stats::{FaultLatency, VcpuCounts};
use super::shadow::CloneFigures;
use super::shadow::Vm;

/// See the module's documentation; what is not said here is said of [`Vm`].
// One or a few of them: their size does not matter.
#[allow(clippy::large_enum_variant)]
pub enum AnyVm {
    /// By shadow page tables.
    Shadow(Vm),
    /// By a window.
    Direct(DirectVm),
}

impl AnyVm {
    fn services(&self) -> &Services {
        match self {
            Self::Shadow(vm) => vm.services(),
            Self::Direct(vm) => &vm.services,
        }
    }

    /// [`Vm::start`].
    ///
    /// # Errors
    /// As there.
    pub fn start(&mut self) -> Result<(), VmError> {
        match self {
            Self::Shadow(vm) => vm.start(),
            Self::Direct(vm) => vm.start(),
        }
    }

    /// [`Vm::wait`].
    pub fn wait(&mut self, timeout: Option<Duration>) -> Option<Outcome> {
        match self {
            Self::Shadow(vm) => vm.wait(timeout),
            Self::Direct(vm) => vm.wait(timeout),
        }
    }

    /// [`Vm::kill`].
    pub fn kill(&self) {
        match self {
            Self::Shadow(vm) => vm.kill(),
            Self::Direct(vm) => vm.kill(),
        }
    }

    /// [`Vm::request_stop`].
    pub fn request_stop(&self) {
        self.services().control.request_stop();
    }

    /// [`Vm::clone_running`].
    ///
    /// # Errors
    /// As there; [`VmError::CloneOfWindow`] with direct paging.
    pub fn clone_running(
        &self,
        observer: Option<Arc<dyn VmObserver>>,
        console: Box<dyn Write + Send>,
    ) -> Result<Self, VmError> {
        match self {
            Self::Shadow(vm) => Ok(Self::Shadow(vm.clone_running(observer, console)?)),
            Self::Direct(_) => Err(VmError::CloneOfWindow),
        }
    }

    /// [`Vm::clone_figures`].
    #[must_use]
    pub fn clone_figures(&self) -> Option<CloneFigures> {
        match self {
            Self::Shadow(vm) => vm.clone_figures(),
            Self::Direct(_) => None,
        }
    }

    /// [`Vm::object`].
    #[must_use]
    pub fn object(&self) -> &Arc<MemoryObject> {
        &self.services().object
    }

    /// [`Vm::iotlb`].
    #[must_use]
    pub fn iotlb(&self) -> &Arc<Iotlb> {
        &self.services().iotlb
    }

    /// [`Vm::client_ids`].
    #[must_use]
    pub fn client_ids(&self) -> Vec<ClientId> {
        match self {
            Self::Shadow(vm) => vm.client_ids(),
            Self::Direct(vm) => vm.client_ids(),
        }
    }

    /// [`Vm::dma_stats`].
    #[must_use]
    pub fn dma_stats(&self) -> DmaStats {
        self.services().bus.dma().stats()
    }

    /// [`Vm::counts`].
    #[must_use]
    pub fn counts(&self) -> VcpuCounts {
        match self {
            Self::Shadow(vm) => vm.counts(),
            Self::Direct(vm) => {
                let mut total = VcpuCounts::default();
                vm.vcpu_counts().iter().for_each(|counts| total.add(counts));
                total
            }
        }
    }

    /// Faults that were fixed, by whatever pages the memory.
    #[must_use]
    pub fn faults(&self) -> u64 {
        match self {
            Self::Shadow(vm) => vm.counts().faults(),
            Self::Direct(vm) => vm.paging().stats().faults,
        }
    }

    /// What shadow paging has done; nothing if there is none.
    #[must_use]
    pub fn shadow_stats(&self) -> ShadowStats {
        match self {
            Self::Shadow(vm) => vm.shadow().stats(),
            Self::Direct(_) => ShadowStats::default(),
        }
    }

    /// What direct paging has done; nothing if there is none.
    #[must_use]
    pub fn direct_stats(&self) -> DirectStats {
        match self {
            Self::Shadow(_) => DirectStats::default(),
            Self::Direct(vm) => vm.paging().stats(),
        }
    }

    /// [`Vm::guest_counters`].
    #[must_use]
    pub fn guest_counters(&self) -> GuestCounters {
        self.services().control.total()
    }

    /// [`Vm::violations`].
    #[must_use]
    pub fn violations(&self) -> Vec<ViolationReport> {
        self.services().reports.kept()
    }

    /// [`Vm::violation_count`].
    #[must_use]
    pub fn violation_count(&self) -> u64 {
        self.services().reports.count()
    }

    /// [`Vm::fault_latency`]; with direct paging none is measured.
    #[must_use]
    pub fn fault_latency(&self) -> FaultLatency {
        match self {
            Self::Shadow(vm) => vm.fault_latency(),
            Self::Direct(_) => FaultLatency::default(),
        }
    }

    /// [`Vm::lost_console_bytes`].
    #[must_use]
    pub fn lost_console_bytes(&self) -> u64 {
        self.services().bus.lost_console_bytes()
    }

    /// [`Vm::recycle`]; nothing with direct paging.
    ///
    /// # Errors
    /// As there.
    pub fn recycle(&self) -> Result<(), VmError> {
        match self {
            Self::Shadow(vm) => vm.recycle(),
            Self::Direct(_) => Ok(()),
        }
    }

    /// Compares what the reverse map has of this VM with what is mapped, as far as that can be done
    /// while its vCPUs run; one sentence for each difference.
    #[must_use]
    pub fn check_running(&self) -> Vec<String> {
        let mut differences = self.iotlb().check_reverse_map();
        if let Self::Shadow(vm) = self {
            differences.extend(vm.shadow().check_reverse_map());
        }
        differences
    }

    /// Compares what the reverse map has of this VM with what is mapped; one sentence for each
    /// difference. No vCPU may run any more.
    #[must_use]
    pub fn check_reverse_map(&self) -> Vec<String> {
        match self {
            Self::Shadow(vm) => {
                let mut differences = vm.shadow().check_reverse_map();
                differences.extend(vm.iotlb().check_reverse_map());
                differences
            }
            Self::Direct(vm) => vm.check_reverse_map(),
        }
    }
}
