//! The laboratory that is there, with the feature `lab`.
//!
//! Guarantee: without anything to break or to go wrong, what is asked of it costs one look at a `None`.
//! Each item counts the calls that it could have struck and those that it did, so that a run in which one
//! never struck can say so. With the same seed, the same calls by number are struck, whichever threads
//! make them.

mod names;
mod pauses;
mod plan;
mod sabotage;
mod trigger;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::errno::Errno;

use pauses::Pauses;
use sabotage::Sabotage;
use trigger::Trigger;

pub use names::{Fault, Point, Rule};
pub use pauses::PauseCount;
pub use plan::{HostFault, Injection, InjectionCount, InjectionPlan, With};
pub use trigger::When;

use super::DAWDLE;
use crate::LockedPage;
use crate::addr::Gfn;

/// The page that something is of, where it matters to the laboratory alone; `None`: one that several have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OfPage(Option<Gfn>);

impl OfPage {
    pub(crate) fn of(page: &LockedPage<'_>) -> Self {
        let owner = page.owner();
        Self((!owner.is_shared()).then_some(owner.gfn))
    }
}

/// What is broken on purpose, for whoever keeps a rule to ask. Clones are the same laboratory; the default is
/// one in which nothing is.
#[derive(Clone, Debug, Default)]
pub struct Lab(Option<Arc<Engine>>);

#[derive(Debug)]
struct Engine {
    sabotage: Sabotage,
    items: Vec<(Injection, Trigger)>,
    pauses: Vec<Pauses>,
    is_over: AtomicBool,
}

impl Lab {
    /// A laboratory with this rule broken, and this to go wrong.
    #[must_use]
    pub fn new(rule: Option<Rule>, plan: &InjectionPlan) -> Self {
        if rule.is_none() && plan.items.is_empty() {
            return Self(None);
        }
        let numbered = || (0..).zip(&plan.items);
        let trigger =
            |(number, &item): (u64, &Injection)| (item, Trigger::new(item.when, plan.seed, number));
        Self(Some(Arc::new(Engine {
            sabotage: Sabotage::new(rule),
            items: numbered().map(trigger).collect(),
            pauses: numbered()
                .filter_map(|(number, item)| Pauses::of(item, plan, number))
                .collect(),
            is_over: AtomicBool::new(false),
        })))
    }

    /// Whether anything is broken, or to go wrong.
    #[inline]
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// Whether this rule is broken, for whatever page.
    #[inline]
    #[must_use]
    pub fn is_broken(&self, rule: Rule) -> bool {
        self.0.as_ref().is_some_and(|engine| engine.sabotage.is(rule))
    }

    /// Whether this rule is broken for this page, whose number is only asked for if there is a
    /// laboratory.
    #[inline]
    #[must_use]
    pub fn breaks(&self, rule: Rule, gfn: impl FnOnce() -> Gfn) -> bool {
        self.0.as_ref().is_some_and(|on| on.sabotage.is(rule) && on.sabotage.includes(gfn()))
    }

    #[inline]
    pub(crate) fn breaks_for(&self, rule: Rule, page: OfPage) -> bool {
        self.0.as_ref().is_some_and(|on| on.sabotage.is(rule) && on.sabotage.includes_page(page))
    }

    /// A point of the protocol: whoever comes by may pause.
    #[inline]
    pub fn pause(&self, point: Point) {
        if let Some(engine) = &self.0 {
            engine.pause(point);
        }
    }

    /// As [`pause`](Self::pause), and a pause each time if `rule` is broken for this page, or
    /// [`DAWDLE`] is on: what a broken rule lets happen shows the sooner.
    #[inline]
    pub fn pause_for(&self, point: Point, rule: Rule, gfn: impl FnOnce() -> Gfn) {
        if let Some(engine) = &self.0 {
            engine.pause(point);
            let is_broken = engine.sabotage.is(rule) || engine.sabotage.is(DAWDLE);
            if is_broken && engine.sabotage.includes(gfn()) {
                std::thread::sleep(pauses::LENGTH);
            }
        }
    }

    /// Counts a call that this fault may strike; whether it does.
    #[inline]
    #[must_use]
    pub fn strikes(&self, fault: Fault) -> bool {
        self.strike(&[fault]).is_some()
    }

    /// The same, of several: the first item's that strikes.
    #[inline]
    #[must_use]
    pub fn strikes_one_of(&self, faults: &[Fault]) -> Option<Fault> {
        self.strike(faults).map(|struck| struck.kind)
    }

    /// The same, of a fault that makes a call take longer: how much.
    #[inline]
    #[must_use]
    pub fn slowness(&self, fault: Fault) -> Option<Duration> {
        match self.strike(&[fault])?.with {
            With::Time(time) => Some(time),
            With::Nothing | With::Errno(_) => None,
        }
    }

    /// The same, of a fault that makes a call fail: with what.
    #[must_use]
    pub fn errno(&self, fault: Fault) -> Option<Errno> {
        match self.strike(&[fault])?.with {
            With::Errno(errno) => Some(errno),
            With::Nothing | With::Time(_) => None,
        }
    }

    #[inline]
    fn strike(&self, faults: &[Fault]) -> Option<HostFault> {
        self.0.as_ref()?.strike(faults)
    }

    /// Whether any item has one of these faults.
    #[must_use]
    pub fn has(&self, faults: &[Fault]) -> bool {
        let has = |engine: &Arc<Engine>| {
            engine.items.iter().any(|(item, _)| faults.contains(&item.fault.kind))
        };
        self.0.as_ref().is_some_and(has)
    }

    /// Limits the sabotage to `count` guest frames from `first`, of every memory object: to the
    /// pages that an oracle watches, so that what it reports is a page, not a guest kernel that
    /// fell over itself. Without a limit every page is fair game.
    pub fn limit_sabotage(&self, first: Gfn, count: u64) {
        if let Some(engine) = &self.0 {
            engine.sabotage.limit(first, count);
        }
    }

    /// What came of each injected item so far, in the plan's order.
    #[must_use]
    pub fn injected(&self) -> Vec<InjectionCount> {
        self.0.as_ref().map(|engine| engine.counts()).unwrap_or_default()
    }

    /// How often each point was passed and paused at so far; nothing without an item `pause`.
    #[must_use]
    pub fn pauses(&self) -> Vec<PauseCount> {
        let first = self.0.iter().flat_map(|engine| engine.pauses.first());
        first.flat_map(Pauses::counts).collect()
    }

    /// Nothing is injected from now on: the disk is mended. Counts stay as they are.
    pub fn end_injection(&self) {
        if let Some(engine) = &self.0 {
            engine.is_over.store(true, Ordering::Relaxed);
        }
    }
}

impl Engine {
    fn is_over(&self) -> bool {
        // Relaxed: whoever ends the injection has stopped those who must not be struck any more.
        self.is_over.load(Ordering::Relaxed)
    }

    /// Counts a call for each item that has one of these faults; the first that strikes.
    fn strike(&self, faults: &[Fault]) -> Option<HostFault> {
        if self.is_over() {
            return None;
        }
        let mut struck = None;
        for (item, trigger) in &self.items {
            if faults.contains(&item.fault.kind) && trigger.strikes() {
                struck = struck.or(Some(item.fault));
            }
        }
        struck
    }

    /// Pauses if it is this passing's turn.
    fn pause(&self, point: Point) {
        if self.pauses.is_empty() || self.is_over() {
            return;
        }
        // Each item counts the passing, whichever pauses.
        let due = self.pauses.iter().filter(|pauses| pauses.is_due(point)).count();
        if due > 0 {
            std::thread::sleep(pauses::LENGTH);
        }
    }

    fn counts(&self) -> Vec<InjectionCount> {
        let mut pauses = self.pauses.iter().map(Pauses::total);
        let count = |&(item, ref trigger): &(Injection, Trigger)| {
            let of_item = (trigger.calls(), trigger.struck());
            // A pause is counted by point.
            let of_points = (item.fault.kind == super::PAUSE).then(|| pauses.next()).flatten();
            let (calls, struck) = of_points.unwrap_or(of_item);
            InjectionCount { item, calls, struck }
        };
        self.items.iter().map(count).collect()
    }
}

#[cfg(test)]
mod tests;
