//! Pauses at the points of the protocol: at each, one thread's step is over and the next has not
//! begun, so whatever other threads may do in between, they do it now and then. A rule that holds
//! only because that time is short does not hold for long.
//!
//! Guarantee: each point counts how often it was passed and paused at; whether its n-th passing is
//! paused at depends on the seed alone.

use std::fmt;
use std::time::Duration;

use super::trigger::Trigger;
use super::{Injection, InjectionPlan, Point};
use crate::lab::PAUSE;

/// How long a pause is: many times what any step takes.
pub(super) const LENGTH: Duration = Duration::from_micros(300);

/// How often a point was passed, and paused at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PauseCount {
    /// The point.
    pub point: Point,
    /// Times that somebody came by.
    pub passed: u64,
    /// Those that were pauses.
    pub paused: u64,
}

/// The points of one item.
pub(super) struct Pauses {
    points: &'static [Point],
    triggers: Box<[Trigger]>,
}

impl fmt::Debug for Pauses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.counts()).finish()
    }
}

impl Pauses {
    /// The pauses of an item; `None` if it is of another kind.
    pub(super) fn of(item: &Injection, plan: &InjectionPlan, number: u64) -> Option<Self> {
        let count = plan.points.len() as u64;
        let trigger = |point| Trigger::new(item.when, plan.seed, (number + 1) * count + point);
        let triggers = || (0..count).map(trigger).collect();
        (item.fault.kind == PAUSE).then(|| Self { points: plan.points, triggers: triggers() })
    }

    /// A point that the plan does not list is not one.
    pub(super) fn is_due(&self, point: Point) -> bool {
        let at = self.points.iter().position(|&known| known == point);
        at.is_some_and(|at| self.triggers[at].strikes())
    }

    pub(super) fn counts(&self) -> impl Iterator<Item = PauseCount> {
        self.points.iter().zip(&self.triggers).map(|(&point, trigger)| PauseCount {
            point,
            passed: trigger.calls(),
            paused: trigger.struck(),
        })
    }

    /// Calls and pauses at all points together.
    pub(super) fn total(&self) -> (u64, u64) {
        self.counts()
            .fold((0, 0), |(passed, paused), count| (passed + count.passed, paused + count.paused))
    }
}
