//! What came of `--inject`: how often each item struck, and whether the guest's pages are all still
//! there.
//!
//! Guarantee: an item that never struck is an error of its own unless the run failed anyway or was
//! ended early, by a signal or the user: what was asked for has not been tested.

use std::sync::Arc;

use super::inject::concerns_peers;
use super::text::human_count;
use super::violations::{Check, EndCheck, Violations};
use crate::host_mm::{
    Audit, HostMm, InjectionCount, InjectionPlan, MemoryObject, PauseCount, When,
};
use crate::sys::signal;

/// What is told before a run: a user should not take a fault for the host's own. The seed, only if
/// anything hangs on it.
pub fn announcement(plan: &InjectionPlan) -> Option<String> {
    if plan.items.is_empty() {
        return None;
    }
    let items: Vec<String> = plan.items.iter().map(ToString::to_string).collect();
    let is_random = plan.items.iter().any(|item| matches!(item.when, When::Chance(_)));
    let seed = if is_random { format!(", with seed {}", plan.seed) } else { String::new() };
    Some(format!("injected on purpose: {}{seed}", items.join(", ")))
}

/// The part of a report that is about injected faults.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Injected {
    /// What came of each item.
    pub items: Vec<Item>,
    /// How often each point of the protocol was passed and paused at, with an item `pause`.
    pub pauses: Vec<Pause>,
    /// Where the guest's pages were at the end, once nothing was injected any more; `None` if nobody
    /// looked for all of them, since the end was to be quick.
    pub pages: Option<Pages>,
    #[cfg_attr(feature = "serde", serde(skip))]
    /// The first of the lost, a sentence each.
    pub lost: Vec<String>,
}

/// One item.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Item {
    /// As on the command line.
    pub item: String,
    /// Calls that it could have struck.
    pub calls: u64,
    /// Those that it did.
    pub struck: u64,
    #[cfg_attr(feature = "serde", serde(skip))]
    /// What it strikes, in the plural.
    pub kind: &'static str,
    #[cfg_attr(feature = "serde", serde(skip))]
    /// How it comes to strike at all.
    pub advice: &'static str,
}

/// A point of the protocol.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Pause {
    /// Its name.
    pub point: &'static str,
    /// How often it was passed.
    pub passed: u64,
    /// At how many of these there was a pause.
    pub paused: u64,
}

/// The guest's pages by where they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Pages {
    /// In a frame.
    pub in_frames: u64,
    /// Read back from swap, with the right checksum.
    pub in_swap: u64,
    /// In swap, and not to be had.
    pub lost: u64,
}

impl Injected {
    /// Ends the injection and looks for the guests' pages, which are in `memory`; `None` if nothing
    /// was injected. Neither vCPU, device nor storm may run any more.
    pub fn conclude<'a>(
        mm: &HostMm,
        memory: impl IntoIterator<Item = &'a Arc<MemoryObject>>,
    ) -> Option<Self> {
        let counts = mm.lab().injected();
        if counts.is_empty() {
            return None;
        }
        mm.lab().end_injection();
        let mut audit = Audit::default();
        if !signal::is_stop_asked() {
            let quiet = mm.quiet();
            for object in memory {
                audit.add(object.audit(&quiet));
            }
        }
        let audit = (!signal::is_stop_asked()).then_some(audit);
        Some(Self::new(&counts, &mm.lab().pauses(), audit.as_ref()))
    }

    /// Without an audit nobody has looked for all pages.
    fn new(counts: &[InjectionCount], pauses: &[PauseCount], audit: Option<&Audit>) -> Self {
        let pages =
            |&Audit { in_frames, in_swap, lost, .. }: &Audit| Pages { in_frames, in_swap, lost };
        let pages = audit.map(pages);
        let first_lost = audit.map_or(&[][..], |audit| &audit.first_lost);
        Self {
            items: counts.iter().map(Item::from).collect(),
            pauses: pauses.iter().map(Pause::from).collect(),
            pages,
            lost: first_lost
                .iter()
                .map(|(gfn, error)| format!("I2: guest frame {gfn} is lost in swap: {error}"))
                .collect(),
        }
    }

    /// Adds what is wrong. `ended_early` says that a signal, the user or a failure
    /// ended the run.
    pub fn add_violations(&self, all: &mut Violations, ended_early: bool) {
        let lost = self.pages.map_or(0, |pages| pages.lost);
        all.add(Check::SwapChecksum, self.lost.iter().cloned(), lost);
        if self.pages.is_none() {
            all.unchecked.insert(EndCheck::InjectedPages);
        }
        if all.total > 0 || ended_early {
            return;
        }
        let idle = self.items.iter().filter(|item| item.struck == 0);
        all.add(Check::Injection, idle.map(Item::complaint), 0);
    }

    /// A line for each item, and one for the pages.
    pub fn lines(&self) -> Vec<String> {
        let mut lines: Vec<String> = self.items.iter().map(Item::line).collect();
        let told = self.pauses.iter().filter(|pause| pause.passed > 0).map(Pause::told);
        let told: Vec<String> = told.collect();
        if !told.is_empty() {
            lines.push(format!("pauses by point, of so many passings: {}", told.join(", ")));
        }
        let Some(Pages { in_frames, in_swap, lost }) = self.pages else {
            return lines;
        };
        lines.push(format!(
            "guest's pages at the end: {} in frames, {} read back from swap, {} lost",
            human_count(in_frames),
            human_count(in_swap),
            human_count(lost)
        ));
        lines
    }
}

impl From<&PauseCount> for Pause {
    fn from(count: &PauseCount) -> Self {
        let &PauseCount { point, passed, paused } = count;
        Self { point: point.name(), passed, paused }
    }
}

impl Pause {
    fn told(&self) -> String {
        format!("{} {} of {}", self.point, human_count(self.paused), human_count(self.passed))
    }
}

impl From<&InjectionCount> for Item {
    fn from(count: &InjectionCount) -> Self {
        Self {
            item: count.item.to_string(),
            calls: count.calls,
            struck: count.struck,
            kind: count.item.fault.kind.calls(),
            advice: if concerns_peers(&count.item) {
                "let gnomon peer stay for longer, or have it hold more pages"
            } else {
                "run longer with more memory than host memory"
            },
        }
    }
}

impl Item {
    fn line(&self) -> String {
        let (calls, kind) = (human_count(self.calls), self.kind);
        match self.struck {
            0 => format!("injected {}: never struck, in {calls} {kind}", self.item),
            struck => {
                format!("injected {}: struck {} of {calls} {kind}", self.item, human_count(struck))
            }
        }
    }

    fn complaint(&self) -> String {
        format!(
            "--inject {} never struck: there were {} {}; let it strike earlier, or {}",
            self.item,
            human_count(self.calls),
            self.kind,
            self.advice
        )
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU64;

    use super::*;
    use crate::addr::{Gfn, SwapSlot};
    use crate::host_mm::Injection;
    use crate::host_mm::hooks::{COUNTED, EINTR, SHORT_WRITE, SLOT_FREED, SWAP_FULL};
    use crate::host_mm::swap::SwapError;
    use crate::lab::Violation;

    fn injected(struck: u64, audit: &Audit) -> Injected {
        let when = When::Once(NonZeroU64::new(9).unwrap());
        let item = Injection { fault: SHORT_WRITE.plain(), when };
        Injected::new(&[InjectionCount { item, calls: 1234, struck }], &[], Some(audit))
    }

    fn violations(injected: &Injected, ended_early: bool) -> Violations {
        let mut all = Violations::default();
        injected.add_violations(&mut all, ended_early);
        all
    }

    #[test]
    fn the_announcement_has_the_seed_if_it_matters() {
        let full = Injection { fault: SWAP_FULL.plain(), when: When::ALWAYS };
        let rare = Injection { fault: EINTR.plain(), when: When::Chance(0.5) };
        let told = |items: &[Injection]| {
            announcement(&InjectionPlan {
                items: items.to_vec(),
                seed: 7,
                ..InjectionPlan::default()
            })
        };
        assert_eq!(told(&[]), None);
        assert_eq!(told(&[full]).unwrap(), "injected on purpose: swap-full@1+");
        let both = "injected on purpose: swap-full@1+, eintr=0.5, with seed 7";
        assert_eq!(told(&[full, rare]).unwrap(), both);
    }

    #[test]
    fn the_lines_tell_how_often_each_item_struck() {
        let audit = Audit { in_frames: 1000, in_swap: 5, ..Audit::default() };
        let lines = injected(2, &audit).lines();
        let struck = "injected short-write@9: struck 2 of 1,234 system calls that write to swap";
        assert_eq!(lines[0], struck);
        assert!(lines[1].contains("1,000 in frames, 5 read back from swap, 0 lost"), "{lines:?}");
        let lines = injected(0, &audit).lines();
        assert!(lines[0].contains("short-write@9: never struck, in 1,234"), "{lines:?}");
    }

    #[test]
    fn pauses_are_told_by_point() {
        let point = |point, passed, paused| PauseCount { point, passed, paused };
        let points = [point(COUNTED, 2000, 31), point(SLOT_FREED, 0, 0)];
        let injected = Injected::new(&[], &points, Some(&Audit::default()));
        let lines = injected.lines();
        assert_eq!(lines[0], "pauses by point, of so many passings: counted 31 of 2,000");
        assert_eq!((lines.len(), injected.pauses[1].point), (2, "slot-freed"));
    }

    #[test]
    fn an_item_that_never_struck_is_an_error_unless_there_is_a_better_one() {
        let audit = Audit::default();
        assert_eq!(violations(&injected(1, &audit), false).total, 0);
        let idle = violations(&injected(0, &audit), false);
        assert_eq!((idle.total, idle.first[0].by), (1, Check::Injection));
        assert!(idle.first[0].text.contains("--inject short-write@9 never struck"));
        assert_eq!(violations(&injected(0, &audit), true).total, 0, "it had no time to");
        let mut failed = Violations::default();
        failed.add_one(Violation::of_run("the disk is gone"));
        injected(0, &audit).add_violations(&mut failed, false);
        assert_eq!(failed.total, 1);
    }

    #[test]
    fn a_lost_page_is_a_violation_that_names_it() {
        let error = SwapError::NotInUse { slot: SwapSlot::new(3).unwrap() };
        let audit =
            Audit { lost: 70, first_lost: vec![(Gfn::new(0x1234), error)], ..Audit::default() };
        let found = violations(&injected(1, &audit), false);
        assert_eq!((found.total, found.first[0].by), (70, Check::SwapChecksum));
        assert!(found.first[0].text.contains("guest frame 0x1234 is lost"), "{found:?}");
    }
}
