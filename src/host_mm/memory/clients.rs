//! Export clients of a host memory.

use std::sync::Arc;

use crate::error::MmError;
#[cfg(feature = "lab")]
use crate::hooks::slowed;
use crate::memory::HostMm;
use gnomon_export_rmap::lab::Lab;
use gnomon_export_rmap::{ExportNotifier, Membership, Reservation};

impl HostMm {
    /// What is broken on purpose, for the layers above to ask, too.
    #[doc(hidden)]
    #[must_use]
    pub fn lab(&self) -> &Lab {
        self.pager.lab()
    }

    /// A number for an export client of this memory.
    ///
    /// # Errors
    /// [`MmError::Host`] if no number is left.
    pub fn reserve_client(&self) -> Result<Reservation, MmError> {
        self.pager.notifiers.reserve().map_err(|error| {
            let source = std::io::Error::other(error);
            MmError::Host { what: "an export client", source }
        })
    }

    /// Registers the client that was made with a [reserved](Self::reserve_client) number, as
    /// [`Reservation::register`] does.
    pub fn register_client(
        &self,
        reservation: Reservation,
        client: Arc<dyn ExportNotifier>,
    ) -> Membership {
        #[cfg(feature = "lab")]
        let client = slowed(self.lab(), client);
        reservation.register(client)
    }
}
