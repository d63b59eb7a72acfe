//! What a host memory may be asked to be.

use crate::frames::placement::Placement;
use crate::swap::SwapConfig;
use gnomon_export_rmap::lab::Lab;
#[cfg(feature = "lab")]
use gnomon_export_rmap::lab::{InjectionPlan, Rule};

/// How much memory to ration, and how.
#[derive(Clone, Debug)]
pub struct HostMmConfig {
    /// Bytes of frames in use at a time; a multiple of 4096, at least
    /// [`MIN_HOST_MEMORY_BYTES`](crate::MIN_HOST_MEMORY_BYTES).
    pub host_memory_bytes: u64,
    /// Which frame a page may be in.
    pub placement: Placement,
    /// Where evicted pages go.
    pub swap: SwapConfig,
    /// Which pages are evicted first.
    pub policy: ReclaimPolicy,
    /// Punch freed frames out of the memfd, so that a
    /// [`TripwireWatch`](crate::TripwireWatch) sees stale accesses.
    pub paranoid: bool,
    /// Check invariants I3, I4 and I6 at each eviction; a difference is reported, see
    /// [`HostMm::violations`](crate::HostMm::violations).
    pub check_evictions: bool,
    /// Let pages that were only ever read share a page of zeros.
    pub share_zero: bool,
    /// Break one rule on purpose.
    #[cfg(feature = "lab")]
    pub sabotage: Option<Rule>,
    /// What the host is to do wrong.
    #[cfg(feature = "lab")]
    pub inject: InjectionPlan,
}

impl HostMmConfig {
    /// The defaults for so many bytes of frames: swap of 1 GiB in an unlinked temporary file.
    #[must_use]
    pub fn new(host_memory_bytes: u64) -> Self {
        Self {
            host_memory_bytes,
            placement: Placement::Anywhere,
            swap: SwapConfig { path: None, dir: None, bytes: 1 << 30 },
            policy: ReclaimPolicy::Clock,
            paranoid: false,
            check_evictions: false,
            share_zero: true,
            #[cfg(feature = "lab")]
            sabotage: None,
            #[cfg(feature = "lab")]
            inject: InjectionPlan::default(),
        }
    }

    /// What is to be broken on purpose.
    pub(crate) fn lab(&self) -> Lab {
        #[cfg(feature = "lab")]
        return Lab::new(self.sabotage, &self.inject);
        #[cfg(not(feature = "lab"))]
        Lab::default()
    }
}

/// How reclaim chooses among frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReclaimPolicy {
    /// A clock over the frame table driven by the accessed bits of the clients' mappings, with a
    /// two-bit use count: a page in use survives a scan of any length.
    #[default]
    Clock,
    /// The order in which frames were filled, whatever their use. For comparison only.
    Fifo,
}
