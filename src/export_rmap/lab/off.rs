//! The laboratory that is not there: what is asked of it is answered by the compiler.

use std::time::Duration;

use crate::LockedPage;
use crate::addr::Gfn;

const _: () = assert!(
    size_of::<(Lab, OfPage, Rule, Point, Fault)>() == 0,
    "nothing of the laboratory is in a library"
);

/// A rule that could be broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule;

/// A point at which a thread could pause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Point;

/// What could go wrong around a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault;

impl Rule {
    /// The rule of this name.
    #[must_use]
    pub const fn new(_name: &'static str) -> Self {
        Self
    }
}

impl Point {
    /// The point of this name.
    #[must_use]
    pub const fn new(_name: &'static str) -> Self {
        Self
    }
}

impl Fault {
    /// The fault of this name, which may strike such calls.
    #[must_use]
    pub const fn new(_name: &'static str, _calls: &'static str) -> Self {
        Self
    }

    /// The same, of a fault that strikes by chance only.
    #[must_use]
    pub const fn by_chance(_name: &'static str, _calls: &'static str) -> Self {
        Self
    }
}

/// The page that something is of, where it matters to the laboratory alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OfPage;

impl OfPage {
    #[inline(always)]
    pub(crate) fn of(_page: &LockedPage<'_>) -> Self {
        Self
    }
}

/// What is broken on purpose: nothing.
#[derive(Clone, Debug, Default)]
pub struct Lab(());

#[allow(clippy::unused_self, reason = "the laboratory that is there has the same methods")]
impl Lab {
    /// Whether anything is broken, or to go wrong.
    #[inline(always)]
    #[must_use]
    pub fn is_on(&self) -> bool {
        false
    }

    /// Whether this rule is broken, for whatever page.
    #[inline(always)]
    #[must_use]
    pub fn is_broken(&self, _rule: Rule) -> bool {
        false
    }

    /// Whether this rule is broken for this page, whose number is only asked for if there is a
    /// laboratory.
    #[inline(always)]
    #[must_use]
    pub fn breaks(&self, _rule: Rule, _gfn: impl FnOnce() -> Gfn) -> bool {
        false
    }

    #[inline(always)]
    pub(crate) fn breaks_for(&self, _rule: Rule, _page: OfPage) -> bool {
        false
    }

    /// A point of the protocol: whoever comes by may pause.
    #[inline(always)]
    pub fn pause(&self, _point: Point) {}

    /// As [`pause`](Self::pause), and a pause each time if `rule` is broken for this page, or
    /// [`DAWDLE`](super::DAWDLE) is on: what a broken rule lets happen shows the sooner.
    #[inline(always)]
    pub fn pause_for(&self, _point: Point, _rule: Rule, _gfn: impl FnOnce() -> Gfn) {}

    /// Counts a call that this fault may strike; whether it does.
    #[inline(always)]
    #[must_use]
    pub fn strikes(&self, _fault: Fault) -> bool {
        false
    }

    /// The same, of several: the one that strikes.
    #[inline(always)]
    #[must_use]
    pub fn strikes_one_of(&self, _faults: &[Fault]) -> Option<Fault> {
        None
    }

    /// The same, of a fault that makes a call take longer: how much.
    #[inline(always)]
    #[must_use]
    pub fn slowness(&self, _fault: Fault) -> Option<Duration> {
        None
    }
}
