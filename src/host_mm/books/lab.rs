//! What is broken on purpose, as the rooms of host memory ask for it.

use crate::books::Books;
use crate::frames::backing::Backing;
use crate::inject::{PausePoint, Sabotage};
use gnomon_export_rmap::addr::Gfn;

impl<B: Backing> Books<B> {
    /// A point of the protocol: see [`PausePoint`].
    #[inline]
    pub(crate) fn pause(&self, point: PausePoint) {
        self.lab.pause(point);
    }

    /// Whether this rule is to be broken for this page.
    pub(crate) fn is_sabotaged(&self, rule: Sabotage, gfn: Gfn) -> bool {
        self.lab.is_sabotaged(rule, gfn)
    }
}
