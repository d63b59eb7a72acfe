use std::num::NonZeroU64;

use super::*;
use crate::lab::PAUSE;
use crate::{FrameTable, Owner};

const RULE: Rule = Rule::new("some-rule");
const DISK: Fault = Fault::new("disk", "writes");
const TAPE: Fault = Fault::new("tape", "writes");
const POINTS: [Point; 2] = [Point::new("here"), Point::new("there")];

fn once(number: u64) -> When {
    When::Once(NonZeroU64::new(number).unwrap())
}

fn lab(items: &[(HostFault, When)]) -> Lab {
    let items = items.iter().map(|&(fault, when)| Injection { fault, when }).collect();
    Lab::new(None, &InjectionPlan { items, seed: 5, points: &POINTS })
}

fn counts(lab: &Lab) -> Vec<(u64, u64)> {
    lab.injected().iter().map(|count| (count.calls, count.struck)).collect()
}

#[test]
fn a_laboratory_without_anything_to_do_is_none() {
    assert!(!Lab::new(None, &InjectionPlan::default()).is_on());
    assert!(Lab::new(Some(RULE), &InjectionPlan::default()).is_on());
    assert!(lab(&[(DISK.plain(), once(1))]).is_on());
}

#[test]
fn one_rule_is_broken_for_the_pages_that_it_is_limited_to() {
    let lab = Lab::new(Some(RULE), &InjectionPlan::default());
    let page = |gfn| move || Gfn::new(gfn);
    assert!(lab.is_broken(Rule::new("some-rule")) && lab.breaks(RULE, page(1 << 40)));
    assert!(!lab.is_broken(DAWDLE) && !lab.breaks(DAWDLE, page(5)));
    lab.limit_sabotage(Gfn::new(5), 2);
    assert_eq!([4, 5, 6, 7].map(|gfn| lab.breaks(RULE, page(gfn))), [false, true, true, false]);
}

/// Its number is none of the guest's.
#[test]
fn a_shared_page_is_watched_by_nobody() {
    let table = FrameTable::new(1);
    let page = table.lock(crate::addr::Pfn::new(0));
    let lab = Lab::new(Some(RULE), &InjectionPlan::default());
    let of = |object| {
        page.set_owner(Owner { object, gfn: Gfn::new(5) });
        OfPage::of(&page)
    };
    let (own, shared) = (of(1), of(Owner::SHARED));
    assert!(lab.breaks_for(RULE, own) && lab.breaks_for(RULE, shared), "all pages are fair game");
    lab.limit_sabotage(Gfn::new(5), 1);
    assert!(lab.breaks_for(RULE, own) && !lab.breaks_for(RULE, shared));
}

#[test]
fn each_item_counts_and_the_first_that_strikes_is_told() {
    let eio = DISK.failing(Errno::EIO);
    let lab = lab(&[(TAPE.plain(), once(2)), (eio, When::ALWAYS), (eio, once(1))]);
    assert_eq!(lab.strikes_one_of(&[DISK, TAPE]), Some(DISK));
    assert_eq!(lab.strikes_one_of(&[DISK, TAPE]), Some(TAPE), "in the plan's order");
    assert_eq!(lab.errno(DISK), Some(Errno::EIO));
    assert!(!lab.strikes(TAPE) && lab.slowness(PAUSE).is_none());
    assert_eq!(counts(&lab), [(3, 1), (3, 3), (3, 1)]);
    assert!(lab.has(&[PAUSE, TAPE]) && !lab.has(&[PAUSE]));
    lab.end_injection();
    assert!(!lab.strikes(DISK));
    assert_eq!(counts(&lab), [(3, 1), (3, 3), (3, 1)], "nothing is counted any more");
}

#[test]
fn pauses_are_counted_by_point() {
    let lab = lab(&[(PAUSE.plain(), once(2))]);
    for point in [POINTS[0], POINTS[1], POINTS[0], Point::new("nowhere")] {
        lab.pause(point);
    }
    let seen: Vec<_> =
        lab.pauses().iter().map(|count| (count.point.name(), count.passed, count.paused)).collect();
    assert_eq!(seen, [("here", 2, 1), ("there", 1, 0)]);
    assert_eq!(counts(&lab), [(3, 1)]);
}
