//! What a plain machine's memory is mapped by: KVM's slots, and direct paging behind the window.
//!
//! Guarantee: the slots go before the memory behind them, and the window's paging after the slots.

use std::sync::Arc;

use crate::direct_mmu::DirectMmu;
use crate::export_rmap::ClientId;
use crate::host_mm::MemoryObject;
use crate::vmm::kvm::device::KvmVm;
use crate::vmm::run::processor::Space;
use crate::vmm::run::stats::PagingStats;

/// See the module's documentation.
pub struct DirectSpace {
    // In the order in which they go.
    pub(super) kvm: KvmVm,
    pub(super) mmu: Arc<DirectMmu>,
    pub(super) object: Arc<MemoryObject>,
}

impl Space for DirectSpace {
    fn client_id(&self) -> ClientId {
        self.mmu.client_id()
    }

    fn faults(&self) -> u64 {
        self.mmu.stats().faults
    }

    fn paging_stats(&self) -> PagingStats {
        PagingStats { direct: self.mmu.stats(), ..Default::default() }
    }

    /// Background reclaim must not move what is compared.
    fn check_reverse_map(&self) -> Vec<String> {
        let quiet = self.object.host_mm().quiet();
        self.mmu
            .check_reverse_map(&quiet)
            .unwrap_or_else(|error| vec![format!("I3: /proc/self/pagemap cannot be read: {error}")])
    }

    fn let_go(&self) {
        self.mmu.let_go();
    }
}
