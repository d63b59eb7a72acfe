//! Host memory with its background reclaim, as whoever runs guests owns it.

use std::ops::Deref;
use std::sync::Arc;

use crate::host_mm::config::HostMmConfig;
use crate::host_mm::error::MmError;
use crate::host_mm::memory::HostMm;
use crate::host_mm::reclaim::BackgroundReclaim;

/// Host memory and its background reclaim. Dropping it ends that, and waits for it, so that host memory
/// goes at once and with this thread, unless others have it still.
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
