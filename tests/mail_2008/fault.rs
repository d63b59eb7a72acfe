//! Nothing joins the moment at which a client's fault reads a page to that at which it installs
//! its mapping. The reference that `get_user_pages` takes keeps the page only in between.

use crate::search::Then::{self, End, Go, Next, Wait};
use crate::search::{Actor, Outcome, Step, assert_lost, assert_nothing_lost, explore, without};

#[derive(Clone, PartialEq, Eq, Hash)]
struct State {
    /// The host's own mapping: the page is in the frame.
    pte: bool,
    exported: bool,
    /// The client's mapping.
    spte: bool,
    freed: bool,
    /// The mail's form: references beside the page cache's own.
    references: u8,
    /// Completed form.
    page_locked: bool,
    mmu_locked: bool,
    count: u8,
    noted: u8,
}

const START: State = State {
    pte: true,
    exported: false,
    spte: false,
    freed: false,
    references: 0,
    page_locked: false,
    mmu_locked: false,
    count: 0,
    noted: 0,
};

fn lost(state: &State) -> Option<&'static str> {
    (state.freed && state.spte).then_some("a mapping has outlived its frame")
}

/// The receiver: drops the client's mapping and clears the flag.
fn invalidate_page(state: &mut State) {
    state.spte = false;
    state.exported = false;
}

fn as_written() -> Outcome {
    let client = Actor {
        name: "client",
        steps: vec![
            Step("get_user_pages: finds the page, takes a reference", |s: &mut State| {
                if !s.pte {
                    return End;
                }
                s.references += 1;
                Next
            }),
            Step("SetPageExported(page)", |s: &mut State| {
                s.exported = true;
                Next
            }),
            Step("installs its mapping", |s: &mut State| {
                s.spte = true;
                Next
            }),
            Step("put_page", |s: &mut State| {
                s.references -= 1;
                Next
            }),
        ],
    };
    let reclaim = Actor {
        name: "shrink_page_list",
        steps: vec![
            Step("try_to_unmap: removes the pte", |s: &mut State| {
                s.pte = false;
                Next
            }),
            Step("try_to_unmap: PageExported? then invalidate_page", |s: &mut State| {
                if s.exported {
                    invalidate_page(s);
                }
                Next
            }),
            Step("no other reference: frees the frame", |s: &mut State| {
                s.freed = s.references == 0;
                // Otherwise the page stays for the next scan, which no longer finds it mapped.
                if s.freed { Next } else { Go("no other reference: frees the frame") }
            }),
        ],
    };
    explore(&[client, reclaim], START, lost)
}

fn take_mmu_lock(state: &mut State) -> Then {
    if state.mmu_locked {
        return Wait;
    }
    state.mmu_locked = true;
    Next
}

fn drop_mmu_lock(state: &mut State) -> Then {
    state.mmu_locked = false;
    Next
}

fn completed() -> Vec<Actor<State>> {
    let client = Actor {
        name: "client",
        steps: vec![
            Step("locks the page, notes the count, unlocks", |s: &mut State| {
                if s.page_locked {
                    return Wait;
                }
                if !s.pte {
                    return End;
                }
                s.noted = s.count;
                Next
            }),
            Step("takes its MMU lock", take_mmu_lock),
            Step("adds its rmap entry: EXPORTED", |s: &mut State| {
                s.exported = true;
                Next
            }),
            Step("has the count changed?", |s: &mut State| {
                if s.count == s.noted { Go("installs its mapping") } else { Next }
            }),
            Step("takes its entry out and drops its MMU lock", |s: &mut State| {
                s.exported = false;
                s.mmu_locked = false;
                Go("locks the page, notes the count, unlocks")
            }),
            Step("installs its mapping", |s: &mut State| {
                s.spte = true;
                Next
            }),
            Step("drops its MMU lock", drop_mmu_lock),
        ],
    };
    let reclaim = Actor {
        name: "eviction",
        steps: vec![
            Step("locks the page", |s: &mut State| {
                s.page_locked = true;
                Next
            }),
            Step("begin: counts up", |s: &mut State| {
                s.count += 1;
                Next
            }),
            Step(
                "EXPORTED?",
                |s: &mut State| if s.exported { Next } else { Go("frees the frame") },
            ),
            Step("notify: takes the client's MMU lock", take_mmu_lock),
            Step("notify: invalidate_page", |s: &mut State| {
                invalidate_page(s);
                Next
            }),
            Step("notify: drops the client's MMU lock", drop_mmu_lock),
            Step("frees the frame", |s: &mut State| {
                s.pte = false;
                s.freed = true;
                Next
            }),
            Step("end: unlocks the page", |s: &mut State| {
                s.page_locked = false;
                Next
            }),
        ],
    };
    vec![client, reclaim]
}

#[test]
fn the_mail_lets_a_fault_install_after_the_invalidation() {
    assert_lost(
        &as_written(),
        "a mapping has outlived its frame",
        &[
            "client: get_user_pages: finds the page, takes a reference",
            "client: SetPageExported(page)",
            "shrink_page_list: try_to_unmap: removes the pte",
            "shrink_page_list: try_to_unmap: PageExported? then invalidate_page",
            "client: installs its mapping",
            "client: put_page",
            "shrink_page_list: no other reference: frees the frame",
        ],
    );
}

#[test]
fn a_fault_that_looks_at_the_sequence_loses_nothing() {
    assert_nothing_lost(&explore(&completed(), START, lost));
}

#[test]
fn each_step_of_the_completed_form_is_needed() {
    for step in [
        "adds its rmap entry: EXPORTED",
        "takes its MMU lock",
        "begin: counts up",
        "notify: takes the client's MMU lock",
        "notify: invalidate_page",
    ] {
        let outcome = explore(&without(completed(), step), START, lost);
        assert!(outcome.loss.is_some(), "not needed: {step}");
    }
}
