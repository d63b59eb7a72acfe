//! The receiver "is also responsible for tracking page dirty state", but `invalidate_page` returns
//! nothing, and nothing says how the state is to be taken and when the content may be looked at.

use crate::search::Then::{self, End, Go, Next};
use crate::search::{Actor, Outcome, Step, assert_lost, assert_nothing_lost, explore};

/// The page's content is a version: 0 in swap and in the frame, 1 once the guest has written.
#[derive(Clone, PartialEq, Eq, Hash, Default)]
struct State {
    spte: bool,
    spte_dirty: bool,
    /// What the processor caches, and whether it knows there that the SPTE is dirty.
    tlb: bool,
    tlb_dirty: bool,
    frame: u8,
    swap: u8,
    page_dirty: bool,
    /// The receiver's look at the dirty bit, if it looks before it clears.
    seen_dirty: bool,
    /// The content is in swap alone.
    gone: bool,
    written: bool,
}

fn lost(state: &State) -> Option<&'static str> {
    (state.gone && state.written && state.swap == 0).then_some("a completed write is lost")
}

/// The guest's instruction, which a fault ends.
fn write(state: &mut State) -> Then {
    if !(state.tlb && state.tlb_dirty) {
        if !state.spte {
            state.tlb = false;
            return End;
        }
        // A processor sets the bit in the SPTE before it writes through a clean translation.
        state.spte_dirty = true;
        (state.tlb, state.tlb_dirty) = (true, true);
    }
    state.frame = 1;
    state.written = true;
    Next
}

fn guest() -> Actor<State> {
    Actor { name: "guest", steps: vec![Step("writes", write)] }
}

/// What the host does once the receivers have been called.
fn write_out() -> Vec<Step<State>> {
    vec![
        Step("PageDirty?", |s: &mut State| if s.page_dirty { Next } else { Go("drops the page") }),
        Step("writes the page to swap", |s: &mut State| {
            s.swap = s.frame;
            Next
        }),
        Step("drops the page", |s: &mut State| {
            s.gone = true;
            Next
        }),
    ]
}

fn drop_spte(state: &mut State) -> Then {
    (state.spte, state.spte_dirty) = (false, false);
    Next
}

fn flush(state: &mut State) -> Then {
    (state.tlb, state.tlb_dirty) = (false, false);
    Next
}

fn search(name: &'static str, receiver: Vec<Step<State>>) -> Outcome {
    let mut steps = receiver;
    steps.extend(write_out());
    let start = State { spte: true, tlb: true, ..State::default() };
    explore(&[guest(), Actor { name, steps }], start, lost)
}

/// The interface taken by its word: nothing is returned.
#[test]
fn the_mail_drops_a_written_page_as_clean() {
    let receiver = vec![
        Step("invalidate_page: drops the mapping", drop_spte),
        Step("invalidate_page: flushes", flush),
    ];
    assert_lost(
        &search("shrink_page_list", receiver),
        "a completed write is lost",
        &[
            "guest: writes",
            "shrink_page_list: invalidate_page: drops the mapping",
            "shrink_page_list: invalidate_page: flushes",
            "shrink_page_list: PageDirty?",
            "shrink_page_list: drops the page",
        ],
    );
}

/// A receiver that calls `set_page_dirty`, but looks first and clears after.
#[test]
fn a_dirty_bit_that_is_read_before_it_is_cleared_loses_the_write_in_between() {
    let receiver = vec![
        Step("invalidate_page: is the mapping dirty?", |s: &mut State| {
            s.seen_dirty = s.spte_dirty;
            Next
        }),
        Step("invalidate_page: drops the mapping", |s: &mut State| {
            s.page_dirty |= s.seen_dirty;
            drop_spte(s)
        }),
        Step("invalidate_page: flushes", flush),
    ];
    assert_lost(
        &search("shrink_page_list", receiver),
        "a completed write is lost",
        &[
            "shrink_page_list: invalidate_page: is the mapping dirty?",
            "guest: writes",
            "shrink_page_list: invalidate_page: drops the mapping",
            "shrink_page_list: invalidate_page: flushes",
            "shrink_page_list: PageDirty?",
            "shrink_page_list: drops the page",
        ],
    );
}

fn harvest(state: &mut State) -> Then {
    state.page_dirty |= state.spte_dirty;
    drop_spte(state)
}

/// A page written twice: the second write goes through a translation that is known to be dirty.
fn search_with_dirty_tlb(name: &'static str, receiver: Vec<Step<State>>) -> Outcome {
    let mut steps = receiver;
    steps.extend(write_out());
    let start =
        State { spte: true, spte_dirty: true, tlb: true, tlb_dirty: true, ..State::default() };
    explore(&[guest(), Actor { name, steps }], start, lost)
}

/// A receiver that hands the bit over, and leaves the flush for later.
#[test]
fn a_page_that_is_written_out_before_the_flush_loses_the_write_in_between() {
    assert_lost(
        &search_with_dirty_tlb(
            "shrink_page_list",
            vec![Step("invalidate_page: exchanges the SPTE, hands the dirty bit over", harvest)],
        ),
        "a completed write is lost",
        &[
            "shrink_page_list: invalidate_page: exchanges the SPTE, hands the dirty bit over",
            "shrink_page_list: PageDirty?",
            "shrink_page_list: writes the page to swap",
            "guest: writes",
            "shrink_page_list: drops the page",
        ],
    );
}

#[test]
fn a_harvest_in_one_step_and_a_flush_before_the_copy_lose_nothing() {
    let receiver = || {
        vec![Step("exchanges the SPTE, hands the dirty bit over", harvest), Step("flushes", flush)]
    };
    assert_nothing_lost(&search("eviction", receiver()));
    assert_nothing_lost(&search_with_dirty_tlb("eviction", receiver()));
}
