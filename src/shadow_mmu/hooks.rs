//! Where the threads of a shadow MMU can be made to pause, beside the points of every
//! [client](crate::export_rmap::client).

use crate::export_rmap::lab::Point;

/// Fault-around has noted its pages' sequences, and holds no lock.
pub const AROUND_NOTED: Point = Point::new("around-noted");
/// A fault that only adds rights has made sure that nothing overtook it.
pub const UPGRADE_CHECKED: Point = Point::new("upgrade-checked");
/// The guest's own flush has cleared entries and not flushed them.
pub const ZAPPED: Point = Point::new("zapped");
/// The guest's own flush is over; the reverse map still has the entries.
pub const ZAP_FLUSHED: Point = Point::new("zap-flushed");
