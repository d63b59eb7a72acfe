//! "Must clear PageExported()", says the mail to each receiver: the first to let go of a page
//! clears the flag for all.

use crate::search::Then::{self, End, Go, Next, Wait};
use crate::search::{Actor, Outcome, Step, assert_lost, assert_nothing_lost, explore};

#[derive(Clone, PartialEq, Eq, Hash)]
struct State {
    /// The flag of the mail's form. In the completed form it follows the two mappings.
    flag: bool,
    flag_follows_map: bool,
    a_maps: bool,
    b_maps: bool,
    pte: bool,
    freed: bool,
    /// `page_mkclean` is over: reclaim comes to the page.
    cleaned: bool,
}

impl State {
    fn page_exported(&self) -> bool {
        if self.flag_follows_map { self.a_maps || self.b_maps } else { self.flag }
    }
}

fn lost(state: &State) -> Option<&'static str> {
    (state.freed && (state.a_maps || state.b_maps)).then_some("a mapping has outlived its frame")
}

fn invalidate_b(state: &mut State) -> Then {
    state.b_maps = false;
    state.flag = false;
    Next
}

fn invalidate_a(state: &mut State) -> Then {
    state.a_maps = false;
    state.flag = false;
    Next
}

/// A maps the page; B's fault comes at any time. B registered last and is first on the list.
fn search(flag_follows_map: bool) -> Outcome {
    let client_b = Actor {
        name: "client B",
        steps: vec![Step(
            "faults: get_user_pages, SetPageExported, maps the page",
            |s: &mut State| {
                if !s.pte {
                    return End;
                }
                s.b_maps = true;
                s.flag = true;
                Next
            },
        )],
    };
    let cleaning = Actor {
        name: "page_mkclean",
        steps: vec![
            Step("PageExported? walks the list", |s: &mut State| {
                s.cleaned = !s.page_exported();
                if s.cleaned { End } else { Next }
            }),
            Step("B's invalidate_page: ClearPageExported", invalidate_b),
            Step("A's invalidate_page: ClearPageExported", invalidate_a),
            Step("done", |s: &mut State| {
                s.cleaned = true;
                Next
            }),
        ],
    };
    let reclaim = Actor {
        name: "shrink_page_list",
        steps: vec![
            Step("try_to_unmap: removes the pte", |s: &mut State| {
                if !s.cleaned {
                    return Wait;
                }
                s.pte = false;
                Next
            }),
            Step("try_to_unmap: PageExported? walks the list", |s: &mut State| {
                if s.page_exported() { Next } else { Go("frees the frame") }
            }),
            Step("B's invalidate_page: ClearPageExported", invalidate_b),
            Step("A's invalidate_page: ClearPageExported", invalidate_a),
            Step("frees the frame", |s: &mut State| {
                s.freed = true;
                Next
            }),
        ],
    };
    let start = State {
        flag: true,
        flag_follows_map,
        a_maps: true,
        b_maps: false,
        pte: true,
        freed: false,
        cleaned: false,
    };
    explore(&[client_b, cleaning, reclaim], start, lost)
}

#[test]
fn the_mail_lets_one_receiver_clear_the_flag_of_another() {
    assert_lost(
        &search(false),
        "a mapping has outlived its frame",
        &[
            "page_mkclean: PageExported? walks the list",
            "page_mkclean: B's invalidate_page: ClearPageExported",
            "client B: faults: get_user_pages, SetPageExported, maps the page",
            "page_mkclean: A's invalidate_page: ClearPageExported",
            "page_mkclean: done",
            "shrink_page_list: try_to_unmap: removes the pte",
            "shrink_page_list: try_to_unmap: PageExported? walks the list",
            "shrink_page_list: frees the frame",
        ],
    );
}

#[test]
fn a_flag_that_follows_the_reverse_map_loses_nothing() {
    assert_nothing_lost(&search(true));
}
