//! `__xip_unmap`, the mail's other open case: the zero page stands for every page that was never
//! written. The first write to one of them takes it out of the process's mapping, without the page
//! lock and without a call.

use crate::search::Then::{self, End, Go, Next, Wait};
use crate::search::{Actor, Outcome, Step, assert_lost, assert_nothing_lost, explore, without};

#[derive(Clone, PartialEq, Eq, Hash, Default)]
struct State {
    /// The page has a frame of its own.
    has_frame: bool,
    /// The client maps the zero page for it, or its frame.
    maps_zero: bool,
    maps_frame: bool,
    written: bool,
    stale_read: bool,
    /// Completed form: lock and count of the zero page.
    zero_locked: bool,
    count: u8,
    noted: u8,
    found_frame: bool,
}

fn lost(state: &State) -> Option<&'static str> {
    state.stale_read.then_some("a read finds zeros after a completed write")
}

fn read(state: &mut State) -> Then {
    state.stale_read |= state.written && state.maps_zero;
    if state.maps_zero || state.maps_frame { End } else { Go("faults") }
}

fn install(state: &mut State) -> Then {
    (state.maps_zero, state.maps_frame) = (!state.found_frame, state.found_frame);
    Go("reads")
}

fn as_written() -> Outcome {
    let client = Actor {
        name: "client",
        steps: vec![
            Step("reads", read),
            Step("faults", |s: &mut State| {
                s.found_frame = s.has_frame;
                Next
            }),
            Step("installs what it found", install),
        ],
    };
    let process = Actor {
        name: "process",
        steps: vec![
            Step(
                "first write: get_xip_page allocates, __xip_unmap clears the ptes",
                |s: &mut State| {
                    s.has_frame = true;
                    Next
                },
            ),
            Step("writes to the new page", |s: &mut State| {
                s.written = true;
                Next
            }),
        ],
    };
    explore(&[client, process], State { maps_zero: true, ..State::default() }, lost)
}

/// The zero page is a page like any other: its lock, its count, its reverse map.
fn completed() -> Vec<Actor<State>> {
    let client = Actor {
        name: "client",
        steps: vec![
            Step("reads", read),
            Step("faults", |s: &mut State| {
                if s.zero_locked {
                    return Wait;
                }
                s.found_frame = s.has_frame;
                s.noted = s.count;
                Next
            }),
            Step("looks at the count, installs what it found", |s: &mut State| {
                if s.count == s.noted { install(s) } else { Go("faults") }
            }),
        ],
    };
    let process = Actor {
        name: "first write",
        steps: vec![
            Step("locks the zero page", |s: &mut State| {
                s.zero_locked = true;
                Next
            }),
            Step("begin: counts up", |s: &mut State| {
                s.count += 1;
                Next
            }),
            Step("notify and flush: clients let go of the zero page", |s: &mut State| {
                s.maps_zero = false;
                Next
            }),
            Step("gives the page a frame", |s: &mut State| {
                s.has_frame = true;
                Next
            }),
            Step("end: unlocks", |s: &mut State| {
                s.zero_locked = false;
                Next
            }),
            Step("writes", |s: &mut State| {
                s.written = true;
                Next
            }),
        ],
    };
    vec![client, process]
}

#[test]
fn the_mail_shows_zeros_after_the_first_write() {
    assert_lost(
        &as_written(),
        "a read finds zeros after a completed write",
        &[
            "process: first write: get_xip_page allocates, __xip_unmap clears the ptes",
            "process: writes to the new page",
            "client: reads",
        ],
    );
}

#[test]
fn a_zero_page_with_lock_and_count_loses_nothing() {
    for maps_zero in [true, false] {
        let start = State { maps_zero, ..State::default() };
        assert_nothing_lost(&explore(&completed(), start, lost));
    }
}

#[test]
fn each_step_of_the_completed_form_is_needed() {
    let notify = "notify and flush: clients let go of the zero page";
    let start = State { maps_zero: true, ..State::default() };
    assert!(explore(&without(completed(), notify), start, lost).loss.is_some());
    for step in ["locks the zero page", "begin: counts up"] {
        let outcome = explore(&without(completed(), step), State::default(), lost);
        assert!(outcome.loss.is_some(), "not needed: {step}");
    }
}
