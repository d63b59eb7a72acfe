//! What of devices' accesses can be broken on purpose, where they can be made to pause, and how devices
//! themselves may go wrong.

use crate::export_rmap::lab::{Fault, Point, Rule};

/// Rule: a flush waits for accesses in flight (which dawdle where that is broken, so that there is often
/// one). Broken for reads of what goes, and for writes to what becomes read-only.
pub const SKIP_IOTLB_WAIT: Rule = Rule::new("skip-iotlb-wait");

/// A device has noted its page's sequence, and holds no lock.
pub const DEVICE_NOTED: Point = Point::new("device-noted");
/// A device is in the middle of an access.
pub const DEVICE_ACCESS: Point = Point::new("device-access");

/// An access of a device to a page takes longer, which is asked in the middle of each.
pub const SLOW_DEVICE: Fault = Fault::new("slow-device", "accesses of devices");
