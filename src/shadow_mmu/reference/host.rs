//! What the host does to a guest's memory beside evicting and cleaning, in the rig and in the model.

use std::sync::Arc;

use super::other::Other;
use super::rig::Rig;
use super::step::{HostStep, POOL};
use crate::addr::{Gfn, PAGE_SIZE_U64, Pfn};
use crate::host_mm::{DirtyLog, MemoryObject};

impl Rig {
    /// Does the step in both. Where it changes nothing for the guest, the model has no part in it.
    pub(super) fn run_host(&mut self, step: HostStep) {
        let machine = &self.machine;
        let (mm, mine) = (&machine.mm, machine.object());
        match step {
            HostStep::Migrate(gfn) => {
                if let Some(pfn) = frame(mine, gfn) {
                    let spare = mm.has_spare_frames();
                    assert_eq!(mm.migrate_frames(&[pfn]).unwrap(), usize::from(spare));
                    assert_eq!(frame(mine, gfn) != Some(pfn), spare, "moved");
                }
            }
            HostStep::Merge(one, two) => self.merge(frame(mine, one), frame(mine, two)),
            HostStep::MergeWithOther(gfn) => {
                self.merge(frame(mine, gfn), frame(&self.other.object, gfn));
            }
            HostStep::MergeZero(gfn) => {
                if let Some(pfn) = frame(mine, gfn) {
                    mm.merge_zero_frame(pfn).unwrap();
                }
            }
            HostStep::Reclaim(frames) => {
                mm.reclaim_frames(usize::try_from(frames).unwrap()).unwrap();
            }
            HostStep::EvictOther(gfn) => {
                if let Some(pfn) = frame(&self.other.object, gfn) {
                    assert_eq!(mm.evict_frames(&[pfn]).unwrap(), 1);
                }
            }
            HostStep::StartLog if self.log.is_some() => {}
            HostStep::StartLog => {
                self.log = Some(DirtyLog::start(mine.clone()).unwrap());
                // All pages count as written until they were taken once.
                self.model.written.extend(0..POOL);
            }
            HostStep::TakeLog(first, count) => self.take_log(first, count),
            HostStep::ReadOther(gfn) => self.other.compare_page(Gfn::new(gfn)),
            HostStep::RemapToCopies(first, other_first, count) => {
                let (from, to) = (Gfn::new(first), Gfn::new(other_first));
                mine.remap_to_copies(from, &self.other.object, to, count).unwrap();
                for number in 0..count {
                    let content = self.model.page(Gfn::new(first + number));
                    self.other.replace_page(Gfn::new(other_first + number), &content);
                }
            }
            HostStep::Clone => self.other = Other::clone_of(mine, &self.model),
            HostStep::Renew => self.other = Other::new(mm),
            HostStep::WriteOther(gfn, index, value) => {
                self.other.write(gfn * PAGE_SIZE_U64 + index as u64 * 8, value);
            }
            HostStep::Free(gfn) => {
                mine.free_pages(Gfn::new(gfn), 1).unwrap();
                self.model.replace_page(Gfn::new(gfn), &[]);
            }
            HostStep::Exchange(first, other_first, count) => {
                let (from, to) = (Gfn::new(first), Gfn::new(other_first));
                mine.exchange_pages(from, &self.other.object, to, count).unwrap();
                for number in 0..count {
                    let (mine, its) = (Gfn::new(first + number), Gfn::new(other_first + number));
                    let (one, two) = (self.model.page(mine), self.other.page(its));
                    self.model.replace_page(mine, &two);
                    self.other.replace_page(its, &one);
                }
            }
        }
    }

    fn merge(&self, one: Option<Pfn>, two: Option<Pfn>) {
        if let (Some(one), Some(two)) = (one, two) {
            self.machine.mm.merge_frames(one, two).unwrap();
        }
    }

    /// The log returns what was written since it was asked last, if not more.
    fn take_log(&mut self, first: u64, count: u64) {
        let Some(log) = &self.log else { return };
        let taken = log.take(Gfn::new(first), count).unwrap();
        for raw in first..first + count {
            let written = self.model.written.remove(&raw);
            assert!(!written || taken.contains(&Gfn::new(raw)), "a write to {raw} was not logged");
        }
    }
}

fn frame(object: &Arc<MemoryObject>, gfn: u64) -> Option<Pfn> {
    object.try_lock_resident(Gfn::new(gfn)).map(|page| page.pfn())
}
