//! The completed form with all its rules at once: two clients that fault, write, unmap, unregister
//! and are freed, while the page that both map is evicted.

use crate::search::Then::{self, Go, Next, Wait};
use crate::search::{Actor, Step, assert_nothing_lost, explore, without};

#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
struct Client {
    noted: u8,
    /// Its entry in the reverse map.
    entry: bool,
    spte: bool,
    spte_dirty: bool,
    tlb: bool,
    tlb_dirty: bool,
    mmu_locked: bool,
    calls: u8,
    closed: bool,
    freed: bool,
}

/// A page with one word for each client; swap has the copy of the start, all 0.
#[derive(Clone, PartialEq, Eq, Hash, Default)]
struct State {
    clients: [Client; 2],
    page_locked: bool,
    count: u8,
    dirty: bool,
    frame: [u8; 2],
    swap: [u8; 2],
    /// The page has left its frame.
    evicted: bool,
    used_after_free: bool,
}

impl State {
    fn exported(&self) -> bool {
        self.clients.iter().any(|client| client.entry)
    }
}

fn lost(state: &State) -> Option<&'static str> {
    if state.used_after_free {
        return Some("a notifier was called that had been freed");
    }
    if state.evicted && state.clients.iter().any(|client| client.spte || client.tlb) {
        return Some("a mapping has outlived its frame");
    }
    (state.evicted && state.swap != state.frame).then_some("a completed write is lost")
}

fn take_mmu_lock<const C: usize>(state: &mut State) -> Then {
    if state.clients[C].mmu_locked {
        return Wait;
    }
    state.clients[C].mmu_locked = true;
    Next
}

fn drop_mmu_lock<const C: usize>(state: &mut State) -> Then {
    state.clients[C].mmu_locked = false;
    Next
}

fn clear_spte<const C: usize>(state: &mut State) -> Then {
    let client = &mut state.clients[C];
    state.dirty |= client.spte_dirty;
    (client.spte, client.spte_dirty) = (false, false);
    Next
}

fn take_entry_out<const C: usize>(state: &mut State) -> Then {
    state.clients[C].entry = false;
    Next
}

fn flush<const C: usize>(state: &mut State) -> Then {
    (state.clients[C].tlb, state.clients[C].tlb_dirty) = (false, false);
    Next
}

fn write<const C: usize>(state: &mut State) -> Then {
    let client = &mut state.clients[C];
    if !(client.tlb && client.tlb_dirty) {
        if !client.spte {
            client.tlb = false;
            return Next;
        }
        (client.spte_dirty, client.tlb, client.tlb_dirty) = (true, true, true);
    }
    state.frame[C] = 1;
    Next
}

fn client<const C: usize>(name: &'static str) -> Actor<State> {
    let steps = vec![
        Step("locks the page, notes the count, unlocks", |s: &mut State| {
            if s.page_locked {
                return Wait;
            }
            s.clients[C].noted = s.count;
            // Brought in again it would be another frame.
            if s.evicted { Go("unregisters: closes its entry") } else { Next }
        }),
        Step("takes its MMU lock", take_mmu_lock::<C>),
        Step("adds its rmap entry", |s: &mut State| {
            s.clients[C].entry = true;
            Next
        }),
        Step("has the count changed?", |s: &mut State| {
            if s.clients[C].noted == s.count { Go("installs its mapping") } else { Next }
        }),
        Step("takes its entry out again", take_entry_out::<C>),
        Step("starts over", |s: &mut State| {
            drop_mmu_lock::<C>(s);
            Go("locks the page, notes the count, unlocks")
        }),
        Step("installs its mapping", |s: &mut State| {
            s.clients[C].spte = true;
            Next
        }),
        Step("drops its MMU lock", drop_mmu_lock::<C>),
        Step("writes", write::<C>),
        Step("writes again", write::<C>),
        Step("unmaps: takes its MMU lock", take_mmu_lock::<C>),
        Step("unmaps: clears its mapping, notes its dirty state", clear_spte::<C>),
        Step("unmaps: flushes", flush::<C>),
        Step("unmaps: takes its entry out", take_entry_out::<C>),
        Step("unmaps: drops its MMU lock", drop_mmu_lock::<C>),
        Step("unregisters: closes its entry", |s: &mut State| {
            s.clients[C].closed = true;
            Next
        }),
        Step(
            "unregisters: waits for calls",
            |s: &mut State| {
                if s.clients[C].calls > 0 { Wait } else { Next }
            },
        ),
        Step("is freed", |s: &mut State| {
            s.clients[C].freed = true;
            Next
        }),
    ];
    Actor { name, steps }
}

/// A call into a client: `names` are those of counting in, of its steps and of counting out.
fn call<const C: usize>(
    enter: (&'static str, fn(&mut State) -> Then),
    steps: Vec<Step<State>>,
    leave: &'static str,
) -> Vec<Step<State>> {
    let mut all = vec![Step(enter.0, enter.1)];
    all.extend(steps);
    all.push(Step(leave, |s: &mut State| {
        s.clients[C].calls = s.clients[C].calls.saturating_sub(1);
        Next
    }));
    all
}

/// Counts a call in; whether the client's entry was open.
fn enters<const C: usize>(state: &mut State) -> bool {
    state.clients[C].calls += 1;
    !state.clients[C].closed
}

fn invalidate<const C: usize>(state: &mut State) -> Then {
    state.used_after_free |= state.clients[C].freed;
    if state.clients[C].entry {
        clear_spte::<C>(state);
        take_entry_out::<C>(state);
    }
    Next
}

fn eviction() -> Actor<State> {
    let mut steps = vec![
        Step("locks the page", |s: &mut State| {
            s.page_locked = true;
            Next
        }),
        Step("begins: counts up", |s: &mut State| {
            s.count += 1;
            Next
        }),
        Step("EXPORTED?", |s: &mut State| if s.exported() { Next } else { Go("flush: enters A") }),
    ];
    let tell_a = vec![
        Step("invalidate: takes A's MMU lock", take_mmu_lock::<0>),
        Step("invalidate: takes A's mappings", invalidate::<0>),
        Step("invalidate: drops A's MMU lock", drop_mmu_lock::<0>),
    ];
    let tell_b = vec![
        Step("invalidate: takes B's MMU lock", take_mmu_lock::<1>),
        Step("invalidate: takes B's mappings", invalidate::<1>),
        Step("invalidate: drops B's MMU lock", drop_mmu_lock::<1>),
    ];
    steps.extend(call::<0>(
        (
            "invalidate: enters A",
            |s| if enters::<0>(s) { Next } else { Go("invalidate: leaves A") },
        ),
        tell_a,
        "invalidate: leaves A",
    ));
    steps.extend(call::<1>(
        (
            "invalidate: enters B",
            |s| if enters::<1>(s) { Next } else { Go("invalidate: leaves B") },
        ),
        tell_b,
        "invalidate: leaves B",
    ));
    steps.extend(call::<0>(
        ("flush: enters A", |s| if enters::<0>(s) { Next } else { Go("flush: leaves A") }),
        vec![Step("flushes A", flush::<0>)],
        "flush: leaves A",
    ));
    steps.extend(call::<1>(
        ("flush: enters B", |s| if enters::<1>(s) { Next } else { Go("flush: leaves B") }),
        vec![Step("flushes B", flush::<1>)],
        "flush: leaves B",
    ));
    steps.extend([
        Step("writes the page to swap if it is dirty", |s: &mut State| {
            if s.dirty {
                s.swap = s.frame;
            }
            Next
        }),
        Step("the page is in swap, the frame free", |s: &mut State| {
            s.evicted = true;
            Next
        }),
        Step("ends: unlocks the page", |s: &mut State| {
            s.page_locked = false;
            Next
        }),
    ]);
    Actor { name: "eviction", steps }
}

fn actors() -> Vec<Actor<State>> {
    vec![client::<0>("A"), client::<1>("B"), eviction()]
}

#[test]
fn all_rules_together_lose_nothing() {
    let outcome = explore(&actors(), State::default(), lost);
    assert_nothing_lost(&outcome);
    // Said in docs/protocol.md.
    assert_eq!(outcome.states, 11710);
}

#[test]
fn each_rule_is_needed_beside_the_others() {
    for step in [
        "adds its rmap entry",
        "begins: counts up",
        "invalidate: takes A's MMU lock",
        "invalidate: takes A's mappings",
        "invalidate: takes B's mappings",
        "invalidate: enters A",
        "flushes A",
        "flushes B",
        "unregisters: closes its entry",
        "unregisters: waits for calls",
        "writes the page to swap if it is dirty",
    ] {
        let outcome = explore(&without(actors(), step), State::default(), lost);
        assert!(outcome.loss.is_some(), "not needed: {step}");
    }
}
