//! The limits of the host that may be behind an error, for the end of its sentence, as
//! [`limits::behind`](super::limits::behind) names them.

use std::error::Error;

use super::limits::{HostLimits, behind};
use crate::lab::errno_of;

/// The limits that may be behind an error, as the rest of its sentence; empty if there are none.
pub(super) fn of(error: &(dyn Error + 'static)) -> String {
    errno_of(error).map_or_else(String::new, |errno| {
        let behind = behind(errno, &HostLimits::at_worst(), 0);
        behind.map_or_else(String::new, |sentence| format!("; {sentence}"))
    })
}
