//! The books of host memory: which page is in which frame, found and locked, and the rules that must
//! hold, looked at where they must.
//!
//! Guarantee: whoever has the books alone changes no place of a page, writes no content, and frees or
//! takes no frame.

pub(crate) mod find;
mod holes;
mod rules;

use std::sync::Arc;

use crate::config::HostMmConfig;
use crate::error::MmError;
use crate::frames::backing::Backing;
use crate::frames::host_view::{HostView, PageBuf};
use crate::object::commons::Commons;
use crate::object::pages::ObjectPages;
use crate::stats::Counters;
use crate::violations::Violations;
use gnomon_export_rmap::addr::Pfn;
use gnomon_export_rmap::lab::Lab;
use gnomon_export_rmap::sync::{AtomicBool, Snapshot};
use gnomon_export_rmap::{Frame, FrameTable, LockedPage, Owner};

/// What host memory knows: the frame table, the pages of all memory objects, and what is in a frame.
///
/// This is what a reader gets. Whoever does more has a value that holds the books and derefs to them, and
/// each holds the one before: `Revoker` tells clients and flushes, `Saver` has swap, too, `Vacator` frees
/// frames, [`Mover`](crate::Mover) takes them, `Pager` brings pages in. So what has more can be
/// handed on as what has less, and never the other way:
///
/// ```
/// use gnomon_export_rmap::LockedPage;
/// use gnomon_host_mm::{Books, Mover};
///
/// fn reads(of: &Books, page: &LockedPage<'_>) {
///     let _ = of.content(page);
/// }
/// fn moves(of: &Mover, page: &LockedPage<'_>) {
///     reads(of, page);
///     drop(of.take_free_frame(None));
/// }
/// ```
///
/// ```compile_fail
/// use gnomon_export_rmap::LockedPage;
/// use gnomon_host_mm::{Books, Mover};
///
/// fn reads(of: &Books, page: &LockedPage<'_>) {
///     let _ = of.content(page);
///     drop(of.take_free_frame(None));
/// }
/// ```
pub struct Books<B: Backing = HostView> {
    pub(crate) config: HostMmConfig,
    pub(crate) table: FrameTable,
    view: B,
    pub(crate) objects: Snapshot<Vec<Arc<ObjectPages>>>,
    pub(crate) commons: Commons,
    pub(crate) counters: Counters,
    pub(crate) violations: Violations,
    /// See [`Books::expect_holes`].
    holes_expected: AtomicBool,
}

impl<B: Backing> std::fmt::Debug for Books<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Books").field("config", &self.config).finish_non_exhaustive()
    }
}

impl<B: Backing> Books<B> {
    /// Of so many frames, none of which holds a page yet.
    pub(crate) fn new(frames: u32, config: HostMmConfig, view: B, lab: Lab) -> Self {
        let commons = Commons::new();
        Self {
            config,
            table: FrameTable::with_lab(frames, lab),
            view,
            objects: Snapshot::new(vec![commons.pages.clone()]),
            commons,
            counters: Counters::default(),
            violations: Violations::default(),
            holes_expected: AtomicBool::new(false),
        }
    }

    /// What is broken on purpose.
    pub(crate) fn lab(&self) -> &Lab {
        self.table.lab()
    }

    /// What is in a page.
    ///
    /// # Errors
    /// [`MmError::Host`] and [`MmError::View`].
    pub fn content(&self, page: &LockedPage<'_>) -> Result<PageBuf, MmError> {
        self.view.content(page)
    }

    /// The page numbers of the memory object that a frame holds, or held last. A hint.
    #[must_use]
    pub fn last_owner(&self, pfn: Pfn) -> Option<Owner> {
        self.table.get(pfn).map(Frame::owner)
    }
}
