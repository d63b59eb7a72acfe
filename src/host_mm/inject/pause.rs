//! Pauses at the points of the protocol: at each, one thread's step is over and the next has not
//! begun, so whatever other threads may do in between, they do it now and then. A rule that holds
//! only because that time is short does not hold for long.
//!
//! Guarantee: without an item `pause` (and without the sabotage that dawdles) a point costs one look
//! at a `None`. Each point counts how often it was passed and paused at; whether its n-th passing is
//! paused at depends on the seed alone.

use std::fmt;
use std::time::Duration;

use super::Sabotage;
use super::trigger::Trigger;
use super::{HostFault, Injection, InjectionPlan, Injector, Lab};
use crate::addr::Gfn;

/// How long a pause is: many times what any step takes.
const PAUSE: Duration = Duration::from_micros(300);

macro_rules! points {
    ($($(#[$doc:meta])* $name:ident => $text:literal,)*) => {
        /// A point of the protocol.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum PausePoint {
            $($(#[$doc])* $name,)*
        }

        impl PausePoint {
            const ALL: &[Self] = &[$(Self::$name,)*];

            /// As it is written in reports.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                }
            }
        }
    };
}

points! {
    /// A fault has noted its page's sequence, and holds no lock.
    FaultNoted => "fault-noted",
    /// Fault-around has noted its pages' sequences, and holds no lock.
    AroundNoted => "around-noted",
    /// A fault has made sure that nothing overtook it; its entry is about to be set.
    FaultChecked => "fault-checked",
    /// The same, of a fault that only adds rights.
    UpgradeChecked => "upgrade-checked",
    /// A device has noted its page's sequence, and holds no lock.
    DeviceNoted => "device-noted",
    /// A device is in the middle of an access.
    DeviceAccess => "device-access",
    /// A frame's count has gone up; clients are about to be told.
    Counted => "counted",
    /// A client has changed its mappings of a page, and let go of its lock.
    Told => "told",
    /// The clients know; the flush is about to begin.
    Detached => "detached",
    /// A client's flush is about to begin, or go on with its next part.
    Flushing => "flushing",
    /// The flush is over; the content is about to be looked at.
    Flushed => "flushed",
    /// The content is where it will be; the page's entry is about to say so.
    Saved => "saved",
    /// A frame is its page's, and has no content yet.
    Filling => "filling",
    /// The guest's own flush has cleared entries and not flushed them.
    Zapped => "zapped",
    /// The guest's own flush is over; the reverse map still has the entries.
    ZapFlushed => "zap-flushed",
    /// A page can be written by nobody and is about to be shared.
    Sharing => "sharing",
    /// A writer's copy of a shared page is made; its entry is about to say so.
    Copied => "copied",
    /// A page can be written by nobody and is about to be lent.
    Lending => "lending",
    /// Copies of a page have been taken back; it is about to be written.
    Recalled => "recalled",
    /// Two pages have been found to be the same.
    Compared => "compared",
    /// A page has been copied to another frame; its entry is about to say so.
    Moved => "moved",
    /// One of two pages that change places has its new place.
    Exchanging => "exchanging",
    /// A page that the guest gave back is about to lose its place.
    Freeing => "freeing",
    /// The dirty log has harvested pages; it is about to take the bits.
    Harvested => "harvested",
    /// A slot of swap has been taken and not been written.
    SlotTaken => "slot-taken",
    /// A slot of swap is free again; who freed it is about to go on.
    SlotFreed => "slot-freed",
}

/// How often a point was passed, and paused at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PauseCount {
    /// The point.
    pub point: PausePoint,
    /// Times that somebody came by.
    pub passed: u64,
    /// Those that were pauses.
    pub paused: u64,
}

/// The points of one item.
pub(super) struct Pauses(Box<[Trigger]>);

impl fmt::Debug for Pauses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.counts()).finish()
    }
}

impl Pauses {
    /// The pauses of an item; `None` if it is of another kind.
    pub(super) fn of(item: &Injection, plan: &InjectionPlan, number: u64) -> Option<Self> {
        let points = PausePoint::ALL.len() as u64;
        let trigger = |point| Trigger::new(item.when, plan.seed, (number + 1) * points + point);
        (item.fault == HostFault::Pause).then(|| Self((0..points).map(trigger).collect()))
    }

    fn is_due(&self, point: PausePoint) -> bool {
        self.0.get(point as usize).is_some_and(Trigger::strikes)
    }

    pub(super) fn counts(&self) -> impl Iterator<Item = PauseCount> {
        PausePoint::ALL.iter().zip(&self.0).map(|(&point, trigger)| PauseCount {
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

impl Injector {
    /// Pauses if it is this passing's turn.
    pub(in crate::host_mm) fn pause(&self, point: PausePoint) {
        if self.pauses.is_empty() || self.is_over() {
            return;
        }
        // Each item counts the passing, whichever pauses.
        let due = self.pauses.iter().filter(|pauses| pauses.is_due(point)).count();
        if due > 0 {
            std::thread::sleep(PAUSE);
        }
    }
}

impl Lab {
    /// A point of the protocol: see [`PausePoint`].
    #[inline]
    pub(in crate::host_mm) fn pause(&self, point: PausePoint) {
        if let Some(injector) = &self.injector {
            injector.pause(point);
        }
    }

    /// As [`pause`](Self::pause), and a pause each time if `rule` is broken for this page, or
    /// [`Sabotage::Dawdle`] is on: what a broken rule lets happen shows the sooner.
    pub(in crate::host_mm) fn pause_for(&self, point: PausePoint, rule: Sabotage, gfn: Gfn) {
        self.pause(point);
        if self.sabotage.is_some()
            && [rule, Sabotage::Dawdle].iter().any(|&rule| self.is_sabotaged(rule, gfn))
        {
            std::thread::sleep(PAUSE);
        }
    }

    /// How often each point was passed and paused at so far; nothing without an item `pause`.
    #[must_use]
    pub(in crate::host_mm) fn pauses(&self) -> Vec<PauseCount> {
        let first = self.injector.iter().flat_map(|injector| injector.pauses.first());
        first.flat_map(Pauses::counts).collect()
    }
}
