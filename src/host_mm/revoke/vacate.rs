//! Pages leave their frames, which are free then.

use std::collections::VecDeque;
use std::ops::Deref;

use super::batch::Revoked;
use super::free_frame::FreeFrame;
use crate::error::MmError;
use crate::frames::backing::Backing;
use crate::frames::free_list::FreeList;
use crate::frames::host_view::HostView;
use crate::hooks::{KEEP_MEMORY, SAVED};
use crate::object::pages::Place;
use crate::revoke::write_out::Saver;
use gnomon_export_rmap::addr::{Gfn, PAGE_SIZE, Pfn};
use gnomon_export_rmap::{LockedPage, PageFlags};

/// A [`Saver`] that takes pages out of their frames, which are free then, and changes what is in them.
pub struct Vacator<B: Backing = HostView> {
    saver: Saver<B>,
    pub(crate) view: B,
    /// Nobody takes a frame from it but a [`Mover`](crate::revoke::free_frame::Mover).
    pub(super) free: FreeList,
}

impl<B: Backing> Deref for Vacator<B> {
    type Target = Saver<B>;

    fn deref(&self) -> &Saver<B> {
        &self.saver
    }
}

impl<B: Backing> Vacator<B> {
    pub(crate) fn new(saver: Saver<B>, view: B, free: FreeList) -> Self {
        Self { saver, view, free }
    }

    /// Frames that may be in use at a time.
    pub(crate) fn rationed_frames(&self) -> u32 {
        self.free.rationed
    }

    /// Number of free frames; a hint.
    pub(crate) fn free_frames(&self) -> u32 {
        self.free.len()
    }

    /// How many fewer than the high watermark are free; a hint.
    pub(crate) fn missing_frames(&self) -> u32 {
        self.free.missing()
    }

    /// Gives back the memory of `count` frames from `first`, locked and about to lose their pages,
    /// where frames are only rationed: every mapping of them ends with this.
    pub(crate) fn give_memory_back(&self, first: Pfn, count: u32) -> Result<(), MmError> {
        let gfn = Gfn::new(u64::from(first.as_u32()));
        if !self.is_identity() || self.lab().breaks(KEEP_MEMORY, || gfn) {
            return Ok(());
        }
        self.view.punch(first, count)
    }

    /// Makes a page whose frame has lost its memory what it is: zeros, whatever stands in swap.
    pub(crate) fn settle_hole(&self, page: &LockedPage<'_>) -> Result<(), MmError> {
        if !self.is_hole(page)? {
            return Ok(());
        }
        self.free_copy(page);
        page.set_flags(PageFlags::BY_WRITE);
        self.view.fill(page, &[0; PAGE_SIZE])
    }
}

impl<'a> Revoked<'a> {
    /// Takes the frame from the page, which `place` has now.
    pub(crate) fn vacate<B: Backing>(
        self,
        of: &'a Vacator<B>,
        place: Place,
    ) -> Result<FreeFrame<'a, B>, MmError> {
        of.give_memory_back(self.page().pfn(), 1)?;
        self.leave(of, place)
    }

    /// The page's memory is given back, if it had to be.
    fn leave<B: Backing>(
        self,
        of: &'a Vacator<B>,
        place: Place,
    ) -> Result<FreeFrame<'a, B>, MmError> {
        let entry = self.entry()?;
        of.lab().pause(SAVED);
        self.log_written();
        let page = self.page();
        entry.store(place, page);
        page.clear_flags(PageFlags::IN_USE | PageFlags::BY_WRITE | PageFlags::FRESH);
        page.set_slot(None);
        of.check_not_exported(page);
        Ok(FreeFrame::from_revoked(of, page.pfn()))
    }
}

/// Takes the frames from pages, each of which has its place outside by now. The memory of neighbours
/// is given back at once: each time, the host looks through all mappings and processors.
pub(crate) fn vacate_all<'a, B: Backing>(
    of: &'a Vacator<B>,
    pages: Vec<(Revoked<'a>, Place)>,
) -> impl Iterator<Item = Result<FreeFrame<'a, B>, MmError>> {
    let mut pages: VecDeque<_> = pages.into();
    // Pages whose memory was given back together, and is gone.
    let mut given_back = 0;
    std::iter::from_fn(move || {
        if given_back == 0 {
            let run = neighbours(pages.iter().map(|(page, _)| page.page().pfn()));
            let first = pages.front()?.0.page().pfn();
            // If the host refuses them all at once, each is told by itself.
            given_back = of.give_memory_back(first, run).map_or(0, |()| run);
        }
        let (page, place) = pages.pop_front()?;
        if given_back == 0 {
            return Some(page.vacate(of, place));
        }
        given_back -= 1;
        Some(page.leave(of, place))
    })
}

/// How many frames from the first on follow each other.
fn neighbours(mut frames: impl Iterator<Item = Pfn>) -> u32 {
    let Some(first) = frames.next() else { return 0 };
    let follows = |(pfn, number): &(Pfn, u32)| pfn.as_u32() == *number;
    let next = first.as_u32().saturating_add(1)..=u32::MAX;
    let last = frames.zip(next).take_while(follows).last();
    1 + last.map_or(0, |(pfn, _)| pfn.as_u32() - first.as_u32())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_neighbours_up_to_the_first_gap() {
        let count = |frames: &[u32]| neighbours(frames.iter().copied().map(Pfn::new));
        assert_eq!(count(&[]), 0);
        assert_eq!(count(&[7]), 1);
        assert_eq!(count(&[7, 8, 9, 11, 12]), 3);
        assert_eq!(count(&[7, 6, 5]), 1);
        assert_eq!(count(&[u32::MAX - 1, u32::MAX]), 2);
    }
}
