//! `do_wp_page`, which the mail leaves open: it holds the pte lock, under which no receiver may
//! sleep, and not the page lock. A call that may sleep can only come after the lock is let go, when
//! the new page is in place and in use.

use crate::search::Then::{self, End, Go, Next, Wait};
use crate::search::{Actor, Outcome, Step, assert_lost, assert_nothing_lost, explore, without};

/// Two mappings of one page of a guest: the process's own, and that of an export client.
#[derive(Clone, PartialEq, Eq, Hash)]
struct State {
    pte: Page,
    /// What the client maps.
    spte: Page,
    /// The process's write to its copy is done.
    written: bool,
    stale_read: bool,
    page_locked: bool,
    count: u8,
    noted: u8,
    found: Page,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Page {
    None,
    Old,
    New,
}

fn lost(state: &State) -> Option<&'static str> {
    state.stale_read.then_some("a read finds the page as it was before a completed write")
}

/// A read by the client that begins after whatever has been done so far.
fn read(state: &mut State) -> Then {
    state.stale_read |= state.written && state.spte == Page::Old;
    if state.spte == Page::None { Go("faults") } else { End }
}

fn clear_pte(state: &mut State) -> Then {
    state.pte = Page::None;
    Next
}

fn set_pte(state: &mut State) -> Then {
    state.pte = Page::New;
    Next
}

fn process_writes(state: &mut State) -> Then {
    state.written = true;
    Next
}

fn invalidate_page(state: &mut State) -> Then {
    if state.spte == Page::Old {
        state.spte = Page::None;
    }
    Next
}

fn start(spte: Page) -> State {
    State {
        pte: Page::Old,
        spte,
        written: false,
        stale_read: false,
        page_locked: false,
        count: 0,
        noted: 0,
        found: Page::None,
    }
}

fn mails_client() -> Actor<State> {
    Actor {
        name: "client",
        steps: vec![
            Step("reads through its mapping", read),
            Step("faults", |s: &mut State| {
                s.found = s.pte;
                // No pte: the fault waits for the pte lock.
                if s.found == Page::None { Wait } else { Next }
            }),
            Step("installs what it found", |s: &mut State| {
                s.spte = s.found;
                Go("reads through its mapping")
            }),
        ],
    }
}

fn as_written() -> Outcome {
    let process = Actor {
        name: "do_wp_page",
        steps: vec![
            Step("pte lock, copies the page, ptep_clear_flush", clear_pte),
            Step("set_pte_at(new page), pte unlock", set_pte),
            Step("the process writes", process_writes),
            Step("export_notifier(invalidate_page, old page)", invalidate_page),
        ],
    };
    explore(&[mails_client(), process], start(Page::Old), lost)
}

/// Were the receivers such that they could be called under the pte lock.
fn notified_in_time() -> Outcome {
    let process = Actor {
        name: "do_wp_page",
        steps: vec![
            Step("pte lock, copies the page, ptep_clear_flush", clear_pte),
            Step("export_notifier(invalidate_page, old page)", invalidate_page),
            Step("set_pte_at(new page), pte unlock", set_pte),
            Step("the process writes", process_writes),
        ],
    };
    explore(&[mails_client(), process], start(Page::None), lost)
}

fn completed() -> Vec<Actor<State>> {
    let client = Actor {
        name: "client",
        steps: vec![
            Step("reads through its mapping", read),
            Step("faults", |s: &mut State| {
                if s.page_locked {
                    return Wait;
                }
                s.found = s.pte;
                s.noted = s.count;
                Next
            }),
            // Under the MMU lock, which a call from an invalidation takes too.
            Step("looks at the count, installs what it found", |s: &mut State| {
                if s.count != s.noted {
                    return Go("faults");
                }
                s.spte = s.found;
                Go("reads through its mapping")
            }),
        ],
    };
    let process = Actor {
        name: "copy-on-write",
        steps: vec![
            Step("locks the old page", |s: &mut State| {
                s.page_locked = true;
                Next
            }),
            Step("begin: counts up", |s: &mut State| {
                s.count += 1;
                Next
            }),
            Step("copies the page, clears the pte", clear_pte),
            Step("notify and flush: clients let go of the old page", invalidate_page),
            Step("sets the new page", set_pte),
            Step("end: unlocks", |s: &mut State| {
                s.page_locked = false;
                Next
            }),
            Step("the process writes", process_writes),
        ],
    };
    vec![client, process]
}

const STALE: &str = "a read finds the page as it was before a completed write";

#[test]
fn the_mail_shows_the_old_page_after_a_write_to_its_copy() {
    assert_lost(
        &as_written(),
        STALE,
        &[
            "do_wp_page: pte lock, copies the page, ptep_clear_flush",
            "do_wp_page: set_pte_at(new page), pte unlock",
            "do_wp_page: the process writes",
            "client: reads through its mapping",
        ],
    );
}

/// Even were the call in time: there is no page lock and no count to stop a fault.
#[test]
fn the_mail_lets_a_fault_install_the_page_that_was_copied() {
    assert_lost(
        &notified_in_time(),
        STALE,
        &[
            "client: reads through its mapping",
            "client: faults",
            "do_wp_page: pte lock, copies the page, ptep_clear_flush",
            "do_wp_page: export_notifier(invalidate_page, old page)",
            "client: installs what it found",
            "do_wp_page: set_pte_at(new page), pte unlock",
            "do_wp_page: the process writes",
            "client: reads through its mapping",
        ],
    );
}

#[test]
fn clear_and_notify_first_and_set_after_loses_nothing() {
    for spte in [Page::Old, Page::None] {
        assert_nothing_lost(&explore(&completed(), start(spte), lost));
    }
}

#[test]
fn each_step_of_the_completed_form_is_needed() {
    let notify = "notify and flush: clients let go of the old page";
    assert!(explore(&without(completed(), notify), start(Page::Old), lost).loss.is_some());
    for step in ["locks the old page", "begin: counts up"] {
        let outcome = explore(&without(completed(), step), start(Page::None), lost);
        assert!(outcome.loss.is_some(), "not needed: {step}");
    }
}
