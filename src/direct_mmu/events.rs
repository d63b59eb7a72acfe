//! What the kernel tells of a window, as faults and jobs.

use std::ops::Range;
use std::sync::atomic::Ordering;

use crate::addr::{Gfn, PAGE_SIZE};
use crate::direct_mmu::shard::{Fault, Job, Noted, Shard};
use crate::direct_mmu::{DirectError, Mmu};
use crate::host_mm::Sabotage;
use crate::sys::uffd::UffdError;
use crate::sys::uffd_window::WindowEvent;

impl Mmu {
    /// Reads what has happened and notes removals, and that parts are gone, all under the MMU lock;
    /// returns the faults.
    pub(super) fn read_events(&self, shard: &Shard) -> Result<Vec<Fault>, UffdError> {
        let mut events = Vec::new();
        let mut noted = shard.lock();
        shard.window.read(&mut events)?;
        for event in &events {
            match *event {
                WindowEvent::Removed { offset, len } => {
                    self.note_removed(shard, &mut noted, pages_of(offset, len));
                }
                // Relaxed: whoever looks at pages of this shard has its lock. Of another one's
                // nothing has changed.
                WindowEvent::Unmapped { .. } | WindowEvent::Moved { .. } => {
                    self.let_go.store(true, Ordering::Relaxed);
                }
                WindowEvent::Fault { .. } | WindowEvent::Stray { .. } => {}
            }
        }
        drop(noted);
        Ok(events.into_iter().filter_map(|event| self.fault_of(shard, event)).collect())
    }

    fn note_removed(&self, shard: &Shard, noted: &mut Noted, pages: Range<u64>) {
        if self.mm.is_sabotaged(Sabotage::DropEvent, Gfn::new(pages.start)) {
            return;
        }
        for removed in noted.note_removed(pages) {
            self.mm.expect_holes();
            shard.hand_over(Job::Remove(removed));
        }
    }

    fn fault_of(&self, shard: &Shard, event: WindowEvent) -> Option<Fault> {
        match event {
            WindowEvent::Fault { offset, write, protected } => {
                return Some(Fault { page: (offset / PAGE_SIZE) as u64, write, protected });
            }
            WindowEvent::Removed { .. } => {}
            WindowEvent::Unmapped { offset, len } => {
                shard.hand_over(Job::Lose(pages_of(offset, len), "unmapped"));
            }
            WindowEvent::Moved { offset, len } => {
                shard.hand_over(Job::Lose(pages_of(offset, len), "moved"));
            }
            WindowEvent::Stray { address } => self.fail(DirectError::Stray { address }),
        }
        None
    }
}

fn pages_of(offset: usize, len: usize) -> Range<u64> {
    (offset / PAGE_SIZE) as u64..((offset + len) / PAGE_SIZE) as u64
}
