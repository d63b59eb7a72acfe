//! `export_notifier_unregister` does not wait for a walker that has found the notifier.

use crate::search::Then::{self, Go, Next, Wait};
use crate::search::{Actor, Outcome, Step, assert_lost, assert_nothing_lost, explore, without};

#[derive(Clone, PartialEq, Eq, Hash, Default)]
struct State {
    unlisted: bool,
    freed: bool,
    used_after_free: bool,
    /// Completed form: the entry's state word.
    closed: bool,
    calls: u8,
}

fn lost(state: &State) -> Option<&'static str> {
    state.used_after_free.then_some("a notifier was called that had been freed")
}

fn call(state: &mut State) -> Then {
    state.used_after_free |= state.freed;
    Next
}

fn unlist(state: &mut State) -> Then {
    state.unlisted = true;
    Next
}

fn free(state: &mut State) -> Then {
    state.freed = true;
    Next
}

fn as_written() -> Outcome {
    let walker =
        Actor {
            name: "try_to_unmap",
            steps: vec![
                Step("hlist_for_each_entry_rcu finds em", |s: &mut State| {
                    if s.unlisted { Then::End } else { Next }
                }),
                Step("em->ops->invalidate_page(em, page)", call),
            ],
        };
    let driver = Actor {
        name: "driver",
        steps: vec![
            Step("export_notifier_unregister(em): hlist_del_rcu", unlist),
            Step("kfree(em)", free),
        ],
    };
    explore(&[walker, driver], State::default(), lost)
}

fn completed() -> Vec<Actor<State>> {
    let walker = Actor {
        name: "invalidation",
        steps: vec![
            Step(
                "finds the entry in its snapshot",
                |s: &mut State| if s.unlisted { Then::End } else { Next },
            ),
            Step("counts itself in and looks whether it was closed", |s: &mut State| {
                s.calls += 1;
                if s.closed { Go("counts itself out") } else { Next }
            }),
            Step("calls invalidate_page", call),
            Step("is still in invalidate_page", call),
            Step("counts itself out", |s: &mut State| {
                s.calls = s.calls.saturating_sub(1);
                Next
            }),
        ],
    };
    let driver = Actor {
        name: "driver",
        steps: vec![
            Step("unregister: takes the entry off the list", unlist),
            Step("unregister: closes the entry", |s: &mut State| {
                s.closed = true;
                Next
            }),
            Step("unregister: waits until no call is counted", |s: &mut State| {
                if s.calls > 0 { Wait } else { Next }
            }),
            Step("frees the notifier", free),
        ],
    };
    vec![walker, driver]
}

#[test]
fn the_mail_frees_a_notifier_that_a_walker_is_about_to_call() {
    assert_lost(
        &as_written(),
        "a notifier was called that had been freed",
        &[
            "try_to_unmap: hlist_for_each_entry_rcu finds em",
            "driver: export_notifier_unregister(em): hlist_del_rcu",
            "driver: kfree(em)",
            "try_to_unmap: em->ops->invalidate_page(em, page)",
        ],
    );
}

#[test]
fn unregister_that_waits_loses_nothing() {
    assert_nothing_lost(&explore(&completed(), State::default(), lost));
}

#[test]
fn each_step_of_the_completed_form_is_needed() {
    for step in [
        "counts itself in and looks whether it was closed",
        "unregister: closes the entry",
        "unregister: waits until no call is counted",
    ] {
        let outcome = explore(&without(completed(), step), State::default(), lost);
        assert!(outcome.loss.is_some(), "not needed: {step}");
    }
}
