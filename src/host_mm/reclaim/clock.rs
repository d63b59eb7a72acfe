//! Which page goes next: a clock over the frame table, driven by accessed bits.
//!
//! The hand passes over all frames. At each, the accessed state of the clients' mappings is taken
//! and cleared: a page that was used since the last pass gets its use count raised, one that was
//! not gets it lowered, and one that was not used and has none left is evicted. The touch that
//! brought a page in does not count, so pages that are used once, however many, leave before any
//! page that is used again.
//!
//! The frame table's order makes clearing cheap: the frames of one window are neighbours in the
//! guest view, and setting an accessed bit again needs a zap on hosts that shadow our tables.

use std::sync::Arc;

use crate::books::find::Candidate;
use crate::config::ReclaimPolicy;
use crate::frames::backing::Backing;
use crate::object::pages::ObjectPages;
use crate::reclaim::evict::evict;
use crate::reclaim::{Reclaimed, Reclaimer};
use crate::revoke::batch::{BATCH, is_heavy};
use gnomon_export_rmap::addr::Pfn;
use gnomon_export_rmap::sync::{Mutex, lock};
use gnomon_export_rmap::{FlushReason, PageFlags};

/// Frames looked at in one go.
const WINDOW: u32 = 256;
/// Rounds over the whole table after which use counts no longer protect a page.
const PATIENCE_ROUNDS: u32 = 5;
/// Rounds after which the caller is told that nothing can be had.
const MAX_ROUNDS: u32 = 6;

/// Where the clock's hand stands.
pub(super) struct Hand {
    next: Mutex<u32>,
    frames: u32,
}

impl Hand {
    pub(super) fn new(frames: u32) -> Self {
        Self { next: Mutex::new(0), frames }
    }
}

/// What one look at a window gave.
struct Picked<'a> {
    victims: Vec<Candidate<'a>>,
    /// Frames whose accessed state was cleared.
    aged: Vec<Pfn>,
    scanned: u32,
}

impl<B: Backing> Reclaimer<B> {
    /// Evicts pages until `target` frames have been freed or the table was scanned several times.
    pub(crate) fn reclaim(&self, target: usize) -> Reclaimed {
        let mut reclaimed = Reclaimed::default();
        let frames = u64::from(self.hand.frames);
        let mut scanned: u64 = 0;
        while reclaimed.frames < target && scanned < frames * u64::from(MAX_ROUNDS) {
            let objects = self.objects.load();
            let impatient = scanned >= frames * u64::from(PATIENCE_ROUNDS);
            let wanted = (target - reclaimed.frames).min(BATCH);
            let picked = self.pick(&objects, wanted, impatient);
            scanned += u64::from(picked.scanned);
            self.counters.scanned.add(u64::from(picked.scanned));
            self.counters.aged.add(picked.aged.len() as u64);
            // Failing to revoke aged translations breaks nothing: the pages look unused next time.
            let _ = self.notifiers.flush(&picked.aged, FlushReason::Aged);
            reclaimed.add(evict(self, picked.victims));
            // Swap that took no page in a whole round takes none in the next: whoever asked goes on
            // with what there is, rather than wait for every dirty page to fail again.
            if reclaimed.frames > 0 && reclaimed.failed as u64 >= u64::from(self.rationed_frames())
            {
                break;
            }
        }
        reclaimed
    }

    /// Moves the hand over up to a window of frames, stopping at `wanted` victims.
    fn pick<'a>(
        &'a self,
        objects: &'a [Arc<ObjectPages>],
        wanted: usize,
        impatient: bool,
    ) -> Picked<'a> {
        let mut picked = Picked { victims: Vec::new(), aged: Vec::new(), scanned: 0 };
        let mut next = lock(&self.hand.next);
        while picked.scanned < WINDOW && picked.victims.len() < wanted {
            let pfn = Pfn::new(*next);
            *next = if *next + 1 < self.hand.frames { *next + 1 } else { 0 };
            picked.scanned += 1;
            let Some(candidate) = self.candidate(objects, pfn) else {
                continue;
            };
            let verdict = match self.config.policy {
                ReclaimPolicy::Fifo => Verdict::Evict,
                ReclaimPolicy::Clock => self.judge(&candidate, impatient, &mut picked.aged),
            };
            if verdict == Verdict::Evict {
                let is_heavy = is_heavy(self, pfn);
                if is_heavy && !picked.victims.is_empty() {
                    // Next time, first of all.
                    *next = pfn.as_u32();
                    break;
                }
                picked.victims.push(candidate);
                if is_heavy {
                    break;
                }
            }
            if *next == 0 {
                // Page locks are taken in ascending order only.
                break;
            }
        }
        picked
    }

    /// One pass of the hand over all frames: those whose pages are to go, which stay all the same.
    #[cfg(all(test, feature = "export-notifier"))]
    pub(crate) fn judge_all(&self) -> Vec<Pfn> {
        let objects = self.objects.load();
        let (mut victims, mut scanned) = (Vec::new(), 0);
        while scanned < self.hand.frames {
            let picked = self.pick(&objects, usize::MAX, false);
            scanned += picked.scanned;
            let _ = self.notifiers.flush(&picked.aged, FlushReason::Aged);
            victims.extend(picked.victims.iter().map(|victim| victim.page.pfn()));
        }
        victims
    }

    fn judge(&self, candidate: &Candidate<'_>, impatient: bool, aged: &mut Vec<Pfn>) -> Verdict {
        let page = &candidate.page;
        let used = self.notifiers.age_page(page);
        if used {
            aged.push(page.pfn());
        }
        let flags = page.flags();
        if flags.contains(PageFlags::FRESH) {
            page.clear_flags(PageFlags::FRESH);
        } else if used {
            page.set_uses(flags.uses() + 1);
        } else if flags.uses() > 0 {
            page.set_uses(flags.uses() - 1);
        } else {
            return Verdict::Evict;
        }
        if impatient { Verdict::Evict } else { Verdict::Keep }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Keep,
    Evict,
}
