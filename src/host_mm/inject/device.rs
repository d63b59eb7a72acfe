//! Devices that take their time.

use std::time::Duration;

use super::{HostFault, Lab};

impl Lab {
    /// How much longer a device's access to a page is to take, which is asked in the middle of each.
    #[must_use]
    pub(in crate::host_mm) fn device_slowness(&self) -> Option<Duration> {
        let slowness =
            |fault| if let HostFault::SlowDevice(time) = fault { Some(time) } else { None };
        self.injector.as_ref()?.strike(slowness)
    }
}
