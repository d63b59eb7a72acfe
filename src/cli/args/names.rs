//! Values that are chosen from a list, as they are written.

use clap::ValueEnum;

use crate::direct_mmu::hooks::{DROP_EVENT, SKIP_WRITE_PROTECT};
use crate::export_rmap::client::{FORGET_RMAP, LATE_INSTALL};
use crate::export_rmap::lab::Rule;
use crate::host_mm::ReclaimPolicy;
use crate::host_mm::hooks::{
    DROP_DIRTY, EARLY_REUSE, SKIP_CLONE_PROTECT, SKIP_FLUSH, SWAP_CORRUPT,
};
use crate::iotlb::hooks::SKIP_IOTLB_WAIT;
use crate::lab::Invalidation;
use crate::vmm::HostKind;

/// A workload of the test guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Workload {
    /// Sweeps, first page to last
    Seq,
    /// Every page as likely
    Random,
    /// A few pages often, most rarely
    Zipf,
    /// A pointer chase through all pages
    Chase,
    /// Counters that all vCPUs add to
    Shared,
    /// Changes of the guest's own page tables
    Paging,
    /// A hot set in steady use while the rest is scanned
    Hotscan,
}

/// [`Invalidation`] as it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Invalidate {
    /// Evict pages to swap
    Reclaim,
    /// Make pages read-only, harvest their dirty state and write them back
    Clean,
    /// Move pages to other frames
    Migrate,
    /// Merge pages with copies of themselves, and with the same page of another VM
    Merge,
    /// Share pages with a snapshot, so that their next write copies them
    Cow,
    /// Let pages of zeros share one; the guest gives pages back, reads and writes them
    Zero,
    /// Map ranges to other pages, which are copies
    Remap,
    /// Have the guest give pages back
    Free,
    /// Have the guest give pages back, and remove them from its window (direct paging)
    Remove,
    /// Nothing but what memory pressure brings about
    None,
}

impl Invalidate {
    /// What is to be forced, if anything is.
    pub(crate) fn kind(self) -> Option<Invalidation> {
        Some(match self {
            Self::Reclaim => Invalidation::Reclaim,
            Self::Clean => Invalidation::Clean,
            Self::Migrate => Invalidation::Migrate,
            Self::Merge => Invalidation::Merge,
            Self::Cow => Invalidation::Cow,
            Self::Zero => Invalidation::Zero,
            Self::Remap => Invalidation::Remap,
            Self::Free => Invalidation::Free,
            Self::Remove => Invalidation::Remove,
            Self::None => return None,
        })
    }
}

/// How a guest's memory is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum PagingMode {
    /// Page tables of Gnomon's own: for guests that keep to docs/guest-abi.md
    Shadow,
    /// A window that the kernel maps and Gnomon fills (needs userfaultfd): for any guest
    Direct,
    /// Shadow for guests that keep to docs/guest-abi.md, direct for others
    Auto,
}

/// [`ReclaimPolicy`] as it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum PolicyName {
    /// Pages in use stay
    Clock,
    /// Oldest first, for comparison
    Fifo,
}

/// [`HostKind`] as it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum HostKindName {
    /// It shadows page tables in software: right on every host
    Shadow,
    /// Nested paging
    Tdp,
}

impl From<HostKindName> for HostKind {
    fn from(name: HostKindName) -> Self {
        match name {
            HostKindName::Shadow => Self::Shadow,
            HostKindName::Tdp => Self::Tdp,
        }
    }
}

/// The rules that can be broken, as they are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum SabotageName {
    /// Mappings are cleared, but what processors cache of them lives on
    SkipFlush,
    /// The dirty state that an invalidation harvests is thrown away
    DropDirty,
    /// Mappings are installed without their reverse-map entry
    ForgetRmap,
    /// A fault installs its mapping although an invalidation overlapped it
    LateInstall,
    /// Frames are given to new pages before the flush
    EarlyReuse,
    /// Pages that a clone shares stay writable for its source (with --churn)
    SkipCloneProtect,
    /// A device's flush does not wait for its accesses in flight
    SkipIotlbWait,
    /// Now and then a bit of a page in swap flips
    SwapCorrupt,
    /// Pages stay writable while they are written out (direct paging)
    SkipWp,
    /// That pages of the window were removed is not heeded (direct paging)
    DropEvent,
}

impl From<PolicyName> for ReclaimPolicy {
    fn from(name: PolicyName) -> Self {
        match name {
            PolicyName::Clock => Self::Clock,
            PolicyName::Fifo => Self::Fifo,
        }
    }
}

impl From<SabotageName> for Rule {
    fn from(name: SabotageName) -> Self {
        match name {
            SabotageName::SkipFlush => SKIP_FLUSH,
            SabotageName::DropDirty => DROP_DIRTY,
            SabotageName::ForgetRmap => FORGET_RMAP,
            SabotageName::LateInstall => LATE_INSTALL,
            SabotageName::EarlyReuse => EARLY_REUSE,
            SabotageName::SkipCloneProtect => SKIP_CLONE_PROTECT,
            SabotageName::SkipIotlbWait => SKIP_IOTLB_WAIT,
            SabotageName::SwapCorrupt => SWAP_CORRUPT,
            SabotageName::SkipWp => SKIP_WRITE_PROTECT,
            SabotageName::DropEvent => DROP_EVENT,
        }
    }
}

/// The value as it is written on the command line.
pub(crate) fn name_of(value: impl ValueEnum) -> String {
    let value = value.to_possible_value();
    value.map_or_else(String::new, |value| value.get_name().to_owned())
}

/// What the help says of the value.
pub(crate) fn description_of(value: impl ValueEnum) -> String {
    let value = value.to_possible_value();
    let help = value.as_ref().and_then(|value| value.get_help());
    help.map_or_else(String::new, ToString::to_string)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_of_invalidation_are_written_as_reports_have_them() {
        for &kind in Invalidate::value_variants() {
            let name = kind.kind().map_or("none", Invalidation::name);
            assert_eq!(name_of(kind), name);
        }
    }

    #[test]
    fn every_sabotage_has_its_name() {
        let names: Vec<String> =
            SabotageName::value_variants().iter().map(|&v| name_of(v)).collect();
        assert_eq!(
            names,
            [
                "skip-flush",
                "drop-dirty",
                "forget-rmap",
                "late-install",
                "early-reuse",
                "skip-clone-protect",
                "skip-iotlb-wait",
                "swap-corrupt",
                "skip-wp",
                "drop-event"
            ]
        );
        for &name in SabotageName::value_variants() {
            assert_eq!(name_of(name), Rule::from(name).name());
            assert!(!description_of(name).is_empty());
        }
    }
}
