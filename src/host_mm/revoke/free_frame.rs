//! Frames that hold no page, on their way from one page to the next.
//!
//! Guarantee: a frame is free only once nobody can reach it by a translation of before, and it stands
//! for one unit of the ration until it is in use.

use std::ops::Deref;
use std::sync::Arc;

use crate::frames::alarm::Alarm;
use crate::frames::backing::Backing;
use crate::frames::host_view::HostView;
use crate::hooks::FRAME_ENOMEM;
use crate::revoke::vacate::Vacator;
use crate::violations::{MmViolation, ViolationKind};
use gnomon_export_rmap::addr::{Gfn, Pfn};
use gnomon_export_rmap::sync::yield_now;
use gnomon_export_rmap::{LockedPage, Owner, PageFlags};

/// A frame that holds no page and that only this value stands for. Dropping it gives it back.
///
/// Where each page has a frame of its own, it is a unit of the ration for that frame, and two faults
/// on one page may each have one: the frame's page lock says whose goes into use.
#[must_use]
pub struct FreeFrame<'a, B: Backing = HostView> {
    of: &'a Vacator<B>,
    pfn: Pfn,
}

impl<'a, B: Backing> FreeFrame<'a, B> {
    /// A frame that has just lost its page. Its translations have been revoked: only this room calls
    /// it, on what came out of a flush (and, on purpose too early, one sabotage).
    pub(super) fn from_revoked(of: &'a Vacator<B>, pfn: Pfn) -> Self {
        Self { of, pfn }
    }

    pub(crate) fn pfn(&self) -> Pfn {
        self.pfn
    }

    /// The frame now holds a page.
    pub(crate) fn into_use(self) {
        std::mem::forget(self);
    }

    /// Locks the frame and makes it the owner's, without content.
    pub(crate) fn prepare(&self, owner: Owner) -> LockedPage<'a> {
        let page = self.lock();
        claim(&page, owner);
        page
    }

    pub(crate) fn lock(&self) -> LockedPage<'a> {
        // Only a thread that lost sight of an older page of this frame can hold the lock, and it
        // waits for nothing. So no wait that the order of page locks would have to allow.
        loop {
            match self.of.table.try_lock(self.pfn) {
                Some(page) => return page,
                None => yield_now(),
            }
        }
    }
}

impl<B: Backing> Drop for FreeFrame<'_, B> {
    fn drop(&mut self) {
        if self.of.config.paranoid
            && !self.of.is_identity()
            && self.of.view.punch(self.pfn, 1).is_err()
            && let Some(owner) = self.of.last_owner(self.pfn)
        {
            // The frame is free all the same; but a stale access to it would go unseen.
            let kind = ViolationKind::NotPunched;
            self.of.violations.report(MmViolation { kind, pfn: self.pfn, owner });
        }
        self.of.free.push(self.pfn);
    }
}

/// A free frame becomes the owner's, without content.
pub(crate) fn claim(page: &LockedPage<'_>, owner: Owner) {
    page.clear_flags(PageFlags::BY_WRITE | PageFlags::LENT);
    page.set_uses(0);
    page.set_slot(None);
    page.set_owner(owner);
    page.set_flags(PageFlags::IN_USE | PageFlags::FRESH);
}

/// A [`Vacator`] that takes free frames, too.
pub struct Mover<B: Backing = HostView> {
    vacator: Vacator<B>,
    /// Who is told when few frames are left.
    pub(crate) alarm: Arc<Alarm>,
}

impl<B: Backing> Deref for Mover<B> {
    type Target = Vacator<B>;

    fn deref(&self) -> &Vacator<B> {
        &self.vacator
    }
}

impl<B: Backing> Mover<B> {
    pub(crate) fn new(vacator: Vacator<B>) -> Self {
        Self { vacator, alarm: Arc::default() }
    }

    /// Whether enough frames are free that one can go to a page that nobody has asked for yet.
    pub(crate) fn has_spare_frames(&self) -> bool {
        self.free.len() > self.free.low
    }

    /// Takes a frame from the free list, waking background reclaim below the low watermark.
    /// `page` is who it is for, where that is known.
    pub fn take_free_frame(&self, page: Option<Gfn>) -> Option<FreeFrame<'_, B>> {
        if self.lab().strikes(FRAME_ENOMEM) {
            return None;
        }
        let pfn = self.free.pop(page)?;
        let free = self.free.len();
        let in_use = u64::from(self.free.rationed.saturating_sub(free));
        self.counters.peak_frames_in_use.raise(in_use);
        if free < self.free.low {
            self.alarm.wake();
        }
        Some(FreeFrame { of: &self.vacator, pfn })
    }
}
