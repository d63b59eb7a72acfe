//! Faults that the layer's own checks find. They are reported, not asserted: the run that found
//! one should end with a report that names the page.

use std::fmt;

use gnomon_export_rmap::Owner;
use gnomon_export_rmap::addr::Pfn;
use gnomon_export_rmap::sync::{Mutex, lock};

/// Reports kept; the rest are only counted.
const KEPT: usize = 256;

/// Which invariant was found broken (see `docs/invariants.md`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ViolationKind {
    /// I4: a frame without mappings to speak of carries `EXPORTED` when it is freed.
    StillExported,
    /// I6: a page that was harvested clean differs from its copy in swap.
    CleanPageDiffers,
    /// I1, I3: something that an invalidation ended still stands after its flush.
    NotRevoked,
    /// I1, I3: a frame is about to be mapped, or accessed, for a page that is not in it.
    MappedElsewhere,
    /// I3: a mapping is about to be able to write a page that nobody may write: several have it, or
    /// copies of it are out.
    MappedWritable,
    /// I1: a mapping is about to be made of what the guest's tables said before its last flush.
    FlushedByGuest,
    /// I4: a client has let go of a frame that processors could still use.
    LetGoEarly,
    /// I2: a page that nobody may write has been written.
    WrittenReadOnly,
    /// I2: a slot of swap is about to be free that a page still names.
    SlotNamed,
    /// I1 could not be watched: the kernel refused to punch a freed frame out of the memfd.
    NotPunched,
}

/// One finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MmViolation {
    /// What was broken.
    pub kind: ViolationKind,
    /// The frame.
    pub pfn: Pfn,
    /// The page in it.
    pub owner: Owner,
}

impl fmt::Display for MmViolation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Owner { object, gfn } = self.owner;
        match self.kind {
            ViolationKind::StillExported => write!(
                f,
                "I4: frame {} is still exported after guest frame {gfn} of object {object} was evicted",
                self.pfn
            ),
            ViolationKind::CleanPageDiffers => write!(
                f,
                "I6: guest frame {gfn} of object {object} in frame {} was harvested clean, but differs from its copy in swap",
                self.pfn
            ),
            ViolationKind::NotRevoked => write!(
                f,
                "I1: guest frame {gfn} of object {object} in frame {} can still be used as before its invalidation, though that was flushed",
                self.pfn
            ),
            ViolationKind::MappedElsewhere => write!(
                f,
                "I1: guest frame {gfn} of object {object} was to be mapped to frame {}, where it is not",
                self.pfn
            ),
            ViolationKind::MappedWritable => write!(
                f,
                "I3: guest frame {gfn} of object {object} in frame {} was to be mapped writable, though it is shared or lent",
                self.pfn
            ),
            ViolationKind::FlushedByGuest => write!(
                f,
                "I1: guest frame {gfn} of object {object} in frame {} was to be mapped by what the guest has flushed since",
                self.pfn
            ),
            ViolationKind::LetGoEarly => write!(
                f,
                "I4: frame {} of guest frame {gfn} of object {object} was not exported any more when its translations were flushed",
                self.pfn
            ),
            ViolationKind::WrittenReadOnly => write!(
                f,
                "I2: guest frame {gfn} of object {object} in frame {} was written while it was shared or lent",
                self.pfn
            ),
            ViolationKind::SlotNamed => write!(
                f,
                "I2: a slot of swap is freed which guest frame {gfn} of object {object} still names",
            ),
            ViolationKind::NotPunched => write!(
                f,
                "I1: freed frame {} of guest frame {gfn} of object {object} could not be punched out, so the tripwire does not guard it",
                self.pfn
            ),
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct Violations(Mutex<(Vec<MmViolation>, u64)>);

impl Violations {
    pub(super) fn report(&self, violation: MmViolation) {
        let mut reports = lock(&self.0);
        reports.1 += 1;
        if reports.0.len() < KEPT {
            reports.0.push(violation);
        }
    }

    pub(super) fn snapshot(&self) -> (Vec<MmViolation>, u64) {
        lock(&self.0).clone()
    }
}
