//! Where the bytes of frames live.
//!
//! Guarantee: what the rooms above do with a page's content they do by these calls alone, so that they are
//! the same code over the memfd that guests are given ([`HostView`](super::host_view::HostView)) and over
//! a few words of memory that a model checker looks into.
//!
//! Content is read and written only under the page lock, whose guard every access takes.

use crate::error::MmError;
use crate::frames::host_view::PageBuf;
use gnomon_export_rmap::LockedPage;
use gnomon_export_rmap::addr::Pfn;

/// The memory of all frames. Copies of the value are of the same memory.
pub trait Backing: Clone + Send + Sync + 'static {
    /// What is in a page.
    ///
    /// # Errors
    /// [`MmError::Host`] and [`MmError::View`].
    fn content(&self, page: &LockedPage<'_>) -> Result<PageBuf, MmError>;

    /// Makes this the content of a page that nobody uses yet. The caller sets `DIRTY`.
    ///
    /// # Errors
    /// As [`content`](Self::content).
    fn fill(&self, page: &LockedPage<'_>, content: &PageBuf) -> Result<(), MmError>;

    /// Gives the memory of `count` frames from `first` back.
    ///
    /// # Errors
    /// [`MmError::Host`].
    fn punch(&self, first: Pfn, count: u32) -> Result<(), MmError>;

    /// Whether a frame takes up no memory.
    ///
    /// # Errors
    /// [`MmError::Host`].
    fn is_hole(&self, pfn: Pfn) -> Result<bool, MmError>;

    /// Copies a whole page into another.
    ///
    /// # Errors
    /// As [`content`](Self::content).
    fn copy(&self, from: &LockedPage<'_>, to: &LockedPage<'_>) -> Result<(), MmError> {
        self.fill(to, &self.content(from)?)
    }
}
