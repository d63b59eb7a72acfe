//! An access that should not have been possible, as the tripwire saw it.

use std::fmt;

use crate::addr::{Gva, Pfn};
use crate::export_rmap::Owner;

/// An access through a mapping that has outlived its frame (invariant I1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StaleAccess {
    /// The frame.
    pub pfn: Pfn,
    /// The page that was in it last.
    pub last_owner: Owner,
    /// An address whose SPTE still points to the frame.
    pub gva: Gva,
    /// The vCPU, if it was one.
    pub vcpu: Option<usize>,
    /// Whether it was a write.
    pub write: bool,
}

impl fmt::Display for StaleAccess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.vcpu {
            Some(vcpu) => write!(f, "vCPU {vcpu}")?,
            None => write!(f, "a thread of the hypervisor")?,
        }
        write!(
            f,
            " {} freed frame {} through the SPTE of guest-virtual {}; the frame last held guest frame {} of object {}",
            if self.write { "wrote" } else { "read" },
            self.pfn,
            self.gva,
            self.last_owner.gfn,
            self.last_owner.object
        )
    }
}
