//! What is broken on purpose, as the rooms of host memory ask for it.

use crate::addr::Gfn;
use crate::host_mm::books::Books;
use crate::host_mm::inject::{PausePoint, Sabotage};

impl Books {
    /// A point of the protocol: see [`PausePoint`].
    #[inline]
    pub(in crate::host_mm) fn pause(&self, point: PausePoint) {
        self.lab.pause(point);
    }

    /// Whether this rule is to be broken for this page.
    pub(in crate::host_mm) fn is_sabotaged(&self, rule: Sabotage, gfn: Gfn) -> bool {
        self.lab.is_sabotaged(rule, gfn)
    }
}
