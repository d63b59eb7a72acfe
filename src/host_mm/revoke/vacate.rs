//! Pages leave their frames, which are free then.

use std::collections::VecDeque;

use super::batch::Revoked;
use super::free_frame::FreeFrame;
use crate::addr::Pfn;
use crate::export_rmap::PageFlags;
use crate::host_mm::HostMm;
use crate::host_mm::error::MmError;
use crate::host_mm::inject::PausePoint;
use crate::host_mm::object::pages::Place;

impl<'a> Revoked<'a> {
    /// Takes the frame from the page, which `place` has now.
    pub(in crate::host_mm) fn vacate(
        self,
        mm: &'a HostMm,
        place: Place,
    ) -> Result<FreeFrame<'a>, MmError> {
        mm.give_memory_back(self.page().pfn(), 1)?;
        self.leave(mm, place)
    }

    /// The page's memory is given back, if it had to be.
    fn leave(self, mm: &'a HostMm, place: Place) -> Result<FreeFrame<'a>, MmError> {
        let entry = self.entry()?;
        mm.pause(PausePoint::Saved);
        self.log_written();
        let page = self.page();
        entry.store(place, page);
        page.clear_flags(PageFlags::IN_USE | PageFlags::BY_WRITE | PageFlags::FRESH);
        page.set_slot(None);
        mm.check_not_exported(page);
        Ok(FreeFrame::from_revoked(mm, page.pfn()))
    }
}

/// Takes the frames from pages, each of which has its place outside by now. The memory of neighbours
/// is given back at once: each time, the host looks through all mappings and processors.
pub(in crate::host_mm) fn vacate_all<'a>(
    mm: &'a HostMm,
    pages: Vec<(Revoked<'a>, Place)>,
) -> impl Iterator<Item = Result<FreeFrame<'a>, MmError>> {
    let mut pages: VecDeque<_> = pages.into();
    // Pages whose memory was given back together, and is gone.
    let mut given_back = 0;
    std::iter::from_fn(move || {
        if given_back == 0 {
            let run = neighbours(pages.iter().map(|(page, _)| page.page().pfn()));
            let first = pages.front()?.0.page().pfn();
            // If the host refuses them all at once, each is told by itself.
            given_back = mm.give_memory_back(first, run).map_or(0, |()| run);
        }
        let (page, place) = pages.pop_front()?;
        if given_back == 0 {
            return Some(page.vacate(mm, place));
        }
        given_back -= 1;
        Some(page.leave(mm, place))
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
