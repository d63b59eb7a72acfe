//! What a run is to be. All of it is known before anything starts.

use std::path::PathBuf;
use std::time::Duration;

use crate::host_mm::{HostMmConfig, Placement};
use crate::vmm::{HostKind, Removal, VmConfig};

/// A run of the test guest under a storm.
#[derive(Clone)]
pub struct Plan {
    /// The first VM.
    pub setup: SetupPlan,
    /// How many there are to be once the first has begun to work.
    pub vms: usize,
    /// How often one of them is ended and another one cloned.
    pub churn: Option<Duration>,
    /// How long the guests work before their last sweep.
    pub duration: Duration,
    /// What is forced upon their pages meanwhile.
    pub storm: StormPlan,
    /// Whether the first violation ends the run.
    pub fail_fast: bool,
    /// What the guest's oracle finds counts alone.
    pub until_oracle: bool,
    /// Who gets pages of the first guest, if anybody.
    pub peers: Option<PeersPlan>,
}

/// What a guest is run with.
#[derive(Clone)]
pub struct SetupPlan {
    /// The VM.
    pub vm: VmConfig,
    /// Host memory.
    pub host: HostMmConfig,
    /// How the one is mapped to the other.
    pub paging: Paging,
    /// What kind of KVM to take this host's for; `None` to probe it.
    pub assume_host: Option<HostKind>,
}

/// Invalidations that are forced upon pages.
#[derive(Clone, Debug)]
pub struct StormPlan {
    /// Of these kinds; may be none.
    pub kinds: Vec<Invalidation>,
    /// Pages a second of each kind.
    pub rate: u32,
    /// Seed of the random choices.
    pub seed: u64,
}

/// Where other processes get pages of the guest.
#[derive(Clone, Debug)]
pub struct PeersPlan {
    /// The socket, which is made.
    pub socket: PathBuf,
    /// Time in which a peer must give up a page, or is cut off.
    pub limit: Duration,
}

/// How a guest's memory is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Paging {
    /// By shadow page tables.
    Shadow,
    /// By a window; and how pages are taken that the guest gives back.
    Direct(Removal),
}

impl Paging {
    /// Which frame a page may be in, of a guest with so much memory.
    #[must_use]
    pub fn placement(self, memory_bytes: u64) -> Placement {
        match self {
            Self::Shadow => Placement::Anywhere,
            Self::Direct(_) => Placement::Identity { guest_bytes: memory_bytes },
        }
    }
}

/// A kind of invalidation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize), serde(rename_all = "lowercase"))]
pub enum Invalidation {
    /// Evict pages to swap.
    Reclaim,
    /// Make pages read-only, harvest their dirty state and write them back.
    Clean,
    /// Move pages to other frames.
    Migrate,
    /// Merge pages with copies of themselves, and with the same page of another VM.
    Merge,
    /// Share pages with a snapshot, so that their next write copies them.
    Cow,
    /// Let pages of zeros share one; the guest gives pages back, reads and writes them.
    Zero,
    /// Map ranges to other pages, which are copies.
    Remap,
    /// The guest gives pages back of its own accord.
    Free,
    /// The guest gives pages back, which are removed from its window (direct paging).
    Remove,
}

impl Invalidation {
    /// Its name in reports and on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Reclaim => "reclaim",
            Self::Clean => "clean",
            Self::Migrate => "migrate",
            Self::Merge => "merge",
            Self::Cow => "cow",
            Self::Zero => "zero",
            Self::Remap => "remap",
            Self::Free => "free",
            Self::Remove => "remove",
        }
    }
}
