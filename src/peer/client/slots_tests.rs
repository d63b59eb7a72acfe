//! What a client makes of what its slots hold, and of their emptying.

use super::*;

const TICK: Duration = Duration::from_millis(5);
const HOUR: Duration = Duration::from_secs(3600);

/// A peer that holds a page in slot 1, which is then emptied under it.
fn emptied() -> Slots {
    let mut slots = Slots::new(2, MmapRegion::new(2 * PAGE_SIZE).unwrap());
    slots.asked(1, 0, Gfn::new(5), 1);
    write(&slots, &[7; PAGE_SIZE]);
    slots.mapped(1, (0, Gfn::new(5)), HOUR);
    slots.verify(1);
    write(&slots, &[0; PAGE_SIZE]);
    slots.verify(1);
    assert_eq!((slots.findings.verified, slots.findings.violations), (2, 0));
    slots
}

fn write(slots: &Slots, page: &[u8]) {
    slots.region.as_volatile_slice().write_slice(page, PAGE_SIZE).unwrap();
}

#[test]
fn a_slot_that_the_end_of_the_connection_emptied_is_no_violation() {
    for why in [Closing::EndOfRun, Closing::TooSlow] {
        let mut slots = emptied();
        slots.closed(why);
        assert_eq!((slots.findings.violations, slots.findings.empty), (0, 2));
    }
}

#[test]
fn a_slot_that_is_emptied_and_no_end_follows_is_a_violation() {
    let mut slots = emptied();
    slots.expire(Instant::now());
    assert_eq!(slots.findings.violations, 0);
    // Neither a server that is silent nor a peer that did not run is the end of that time.
    slots.tick(2 * CLOSED_LIMIT, true);
    (0..100_000).for_each(|_| slots.tick(TICK, false));
    slots.expire(Instant::now());
    assert_eq!(slots.findings.violations, 0);
    while slots.life.lived < 2 * CLOSED_LIMIT {
        slots.tick(TICK, true);
    }
    slots.expire(Instant::now());
    assert_eq!(slots.findings.violations, 1);

    let mut slots = emptied();
    slots.closed(Closing::Left);
    assert_eq!(slots.findings.violations, 1, "emptied before the peer said that it leaves");
}

#[test]
fn a_slot_that_holds_something_else_is_a_violation_at_once() {
    let mut slots = emptied();
    write(&slots, &[8; PAGE_SIZE]);
    slots.verify(1);
    assert_eq!(slots.findings.violations, 1);
}

/// Three requests, of two, one and one pages.
fn asked() -> Slots {
    let mut slots = Slots::new(8, MmapRegion::new(8 * PAGE_SIZE).unwrap());
    slots.asked(0, 0, Gfn::new(10), 2);
    slots.asked(2, 0, Gfn::new(20), 1);
    slots.asked(3, 0, Gfn::new(30), 1);
    slots
}

#[test]
fn answers_that_belong_to_their_requests_are_no_violation() {
    let mut slots = asked();
    slots.refused(1, Gfn::new(11), Refusal::Unavailable);
    slots.mapped(0, (0, Gfn::new(10)), HOUR);
    assert_eq!(slots.unanswered(), 2);
    // The same page in the same slot once more.
    slots.asked(1, 0, Gfn::new(11), 1);
    slots.mapped(2, (0, Gfn::new(20)), HOUR);
    slots.mapped(3, (0, Gfn::new(30)), HOUR);
    slots.mapped(1, (0, Gfn::new(11)), HOUR);
    assert_eq!(slots.unanswered(), 0);
    assert_eq!((slots.findings.asked, slots.findings.mapped, slots.findings.refused), (5, 4, 1));
    assert_eq!(slots.findings.violations, 0, "{:?}", slots.findings);
}

#[test]
fn an_answer_that_belongs_to_no_request_is_a_violation() {
    type Answer = fn(&mut Slots);
    let wrong: [(&str, Answer); 7] = [
        ("slot 0 was refused page 0xb", |it| it.refused(0, Gfn::new(11), Refusal::Unavailable)),
        ("slot 5 was refused", |it| it.refused(5, Gfn::new(10), Refusal::Unavailable)),
        ("page 0xa exists", |it| it.refused(0, Gfn::new(10), Refusal::Outside)),
        ("slot 0 was lent page 0xb", |it| it.mapped(0, (0, Gfn::new(11)), HOUR)),
        ("slot 2, of request 1, was answered before", |it| {
            it.mapped(2, (0, Gfn::new(20)), HOUR);
        }),
        ("slot 0 was refused page 0xa", |it| {
            it.mapped(0, (0, Gfn::new(10)), HOUR);
            it.refused(0, Gfn::new(10), Refusal::Unavailable);
        }),
        ("4 pages were asked for and never answered", Slots::never_answered),
    ];
    for (said, answer) in wrong {
        let mut slots = asked();
        answer(&mut slots);
        assert_eq!(slots.findings.violations, 1, "{said}: {:?}", slots.findings);
        assert!(slots.findings.first[0].starts_with(said), "{:?}", slots.findings);
    }
}
