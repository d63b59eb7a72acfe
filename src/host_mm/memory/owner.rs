//! Host memory with its background reclaim, as whoever runs guests owns it.

use std::ops::Deref;
use std::sync::Arc;

use crate::config::HostMmConfig;
use crate::error::MmError;
use crate::memory::HostMm;
use crate::reclaim::BackgroundReclaim;

/// Host memory and its background reclaim. Dropping it ends that, and waits for it, so that host memory
/// goes at once and with this thread, unless others have it still.
///
/// ```
/// use gnomon_export_rmap::addr::Gpa;
/// use gnomon_host_mm::{HostMemory, HostMmConfig};
///
/// # fn main() -> Result<(), gnomon_host_mm::MmError> {
/// let mut mm = HostMemory::new(HostMmConfig::new(8 << 20))?;
/// mm.start_reclaim()?;
/// let guest = mm.create_object(1 << 30)?;
/// guest.write(Gpa::new(0x1000), b"a page")?;
/// // As long as this lives no page is taken away in the background: for whoever compares books.
/// let quiet = mm.quiet();
/// let audit = guest.audit(&quiet);
/// assert_eq!((audit.in_frames, audit.in_swap, audit.lost), (1, 0, 0));
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct HostMemory {
    // First of the two to go.
    reclaim: Option<BackgroundReclaim>,
    mm: Arc<HostMm>,
}

impl HostMemory {
    /// As [`HostMm::new`]; nothing is reclaimed in the background yet.
    ///
    /// # Errors
    /// As [`HostMm::new`].
    pub fn new(config: HostMmConfig) -> Result<Self, MmError> {
        Ok(Self { reclaim: None, mm: HostMm::new(config)? })
    }

    /// Reclaims in the background from now on. Again is harmless.
    ///
    /// # Errors
    /// As [`HostMm::start_background_reclaim`].
    pub fn start_reclaim(&mut self) -> Result<(), MmError> {
        if self.reclaim.is_none() {
            self.reclaim = Some(self.mm.start_background_reclaim()?);
        }
        Ok(())
    }

    /// Ends background reclaim, and waits for its end.
    pub fn end_reclaim(&mut self) {
        self.reclaim = None;
    }
}

impl Deref for HostMemory {
    type Target = Arc<HostMm>;

    fn deref(&self) -> &Arc<HostMm> {
        &self.mm
    }
}
