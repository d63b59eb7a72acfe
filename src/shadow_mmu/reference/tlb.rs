//! The TLB of a processor in software, and how it learns what it must forget: as KVM does, from the
//! kernel's unmapping of a page, and from nothing that Gnomon says.

use std::collections::BTreeMap;
use std::fs::File;

use super::machine::Machine;
use crate::sys::recording::Recording;

/// Leaf SPTEs by page of guest-virtual address.
pub(crate) type Tlb = BTreeMap<u64, u64>;

/// Who tells which pages were taken out of KVM's mappings.
#[derive(Debug)]
pub(crate) enum Revocations {
    /// The kernel itself: `/proc/self/pagemap`.
    Kernel(File),
    /// The calls that would have asked the kernel for it.
    Recorded(Recording),
}

impl Revocations {
    pub(crate) fn by_kernel() -> Self {
        Self::Kernel(File::open("/proc/self/pagemap").unwrap())
    }

    pub(crate) fn recorded() -> Self {
        Self::Recorded(Recording::start())
    }

    /// Drops from the TLB what was taken out of KVM's mappings since it was used: a KVM would have
    /// been told. To be called before the next access.
    pub(crate) fn obey(&self, machine: &Machine, tlb: &mut Tlb) {
        match self {
            Self::Kernel(pagemap) => {
                tlb.retain(|_, spte| machine.is_mapped_for_kvm(*spte, pagemap));
            }
            Self::Recorded(recording) => {
                for gone in recording.take() {
                    tlb.retain(|_, spte| !gone.contains(&machine.host_address(*spte)));
                }
            }
        }
    }
}
