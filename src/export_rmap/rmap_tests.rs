//! The reverse map against a plain set, through all its kinds; and what it costs, in comparisons.

use std::cell::Cell;
use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::sync::Arc;

const FRAME: Pfn = Pfn::new(0);
/// As many as a guest may have with the bound on its shadow pages at half a million.
const MANY: u64 = 1 << 16;

thread_local! {
    /// Comparisons of entries by this thread.
    static COMPARISONS: Cell<u64> = const { Cell::new(0) };
}

pub(super) fn count_comparison() {
    COMPARISONS.set(COMPARISONS.get() + 1);
}

fn client(raw: u16) -> ClientId {
    ClientId::new(raw).unwrap()
}

fn entry(raw: u16, location: u64) -> RmapEntry {
    RmapEntry::new(client(raw), location)
}

/// A table of one frame with so many mappings of client 1, at every second location.
fn with_mappings(count: u64) -> FrameTable {
    let table = FrameTable::new(1);
    for location in 0..count {
        assert!(table.rmap_add(FRAME, entry(1, 2 * location)));
    }
    table
}

/// The most comparisons that one of these calls makes.
fn most_comparisons(calls: impl IntoIterator<Item = impl FnOnce()>) -> u64 {
    let one = |call: &mut dyn FnMut()| {
        let before = COMPARISONS.get();
        call();
        COMPARISONS.get() - before
    };
    let calls = calls.into_iter().map(|call| {
        let mut call = Some(call);
        one(&mut || call.take().into_iter().for_each(|call| call()))
    });
    calls.max().unwrap_or(0)
}

/// What an ordered set of so many entries may cost: nodes of 6 to 11 entries, each looked through from
/// the front.
fn comparisons_allowed(entries: u64) -> u64 {
    11 * u64::from(entries.ilog(6) + 1)
}

#[test]
fn the_largest_entry_survives_each_kind() {
    let table = FrameTable::new(1);
    let largest = entry(ClientId::MAX, RmapEntry::MAX_LOCATION);
    assert!(table.rmap_add(FRAME, largest));
    for others in 0..20 {
        let entries = table.rmap_entries(FRAME);
        assert!(entries.contains(&largest), "beside {others}: {entries:?}");
        assert!(table.rmap_add(FRAME, entry(0, others)));
    }
    assert!(table.rmap_remove(FRAME, largest));
    assert!(!table.rmap_entries(FRAME).contains(&largest));
}

#[test]
fn an_entry_that_is_there_is_not_added_again() {
    for others in 0..20 {
        let table = with_mappings(others);
        assert!(table.rmap_add(FRAME, entry(2, 7)));
        assert!(!table.rmap_add(FRAME, entry(2, 7)), "beside {others}");
        assert!(table.rmap_remove(FRAME, entry(2, 7)));
        assert!(!table.rmap_remove(FRAME, entry(2, 7)), "beside {others}");
    }
}

#[test]
fn a_client_sees_only_its_own_mappings() {
    let table = FrameTable::new(1);
    table.rmap_add(FRAME, entry(1, 10));
    table.rmap_add(FRAME, entry(2, 20));
    let mut seen = Vec::new();
    table.rmap_visit(FRAME, client(2), |location| {
        seen.push(location);
        Retain::Drop
    });
    assert_eq!(seen, [20]);
    assert!(table.get(FRAME).unwrap().is_exported(), "client 1 still maps it");
    table.rmap_visit(FRAME, client(1), |_| Retain::Drop);
    assert!(!table.get(FRAME).unwrap().is_exported());
}

#[test]
fn memory_is_used_again() {
    let table = FrameTable::new(1);
    for _ in 0..100 {
        for location in 0..50 {
            table.rmap_add(FRAME, entry(1, location));
        }
        table.rmap_visit(FRAME, client(1), |_| Retain::Drop);
    }
    let pools = lock(&table.rmap_memory.0);
    assert_eq!((pools.few.all.len(), pools.many.all.len()), (1, 1));
    assert!(pools.many.all[0].is_empty());
}

/// The fault that this map had: a removal looked at every mapping of the frame. Here it costs the
/// same, but for the logarithm, from which end and whoever else maps the frame.
#[test]
fn a_removal_costs_the_same_however_many_mappings_there_are() {
    for count in [1, 7, 8, 64, 4096, MANY] {
        let table = with_mappings(count);
        let every = (count / 64).max(1);
        let adds = (0..count).step_by(usize::try_from(every).unwrap()).map(|location| {
            let table = &table;
            move || assert!(table.rmap_add(FRAME, entry(1, 2 * location + 1)))
        });
        let most = most_comparisons(adds);
        assert!(most <= comparisons_allowed(2 * count), "adding to {count} took {most}");
        for backwards in [false, true] {
            let removals = (0..count).map(|location| {
                let location = if backwards { count - 1 - location } else { location };
                let table = &table;
                move || assert!(table.rmap_remove(FRAME, entry(1, 2 * location)))
            });
            let most = most_comparisons(removals);
            assert!(most <= comparisons_allowed(2 * count), "removing from {count} took {most}");
            for location in 0..count {
                table.rmap_add(FRAME, entry(1, 2 * location));
            }
        }
    }
}

/// The oracle of the test above sees a map that looks at all its entries.
#[test]
fn the_count_of_comparisons_tells_a_chain_from_a_set() {
    let mut chain: Vec<RmapEntry> = (0..4096).map(|location| entry(1, location)).collect();
    let most = most_comparisons([|| {
        let wanted = entry(1, 0);
        chain.retain(|other| other.cmp(&wanted).is_ne());
    }]);
    assert!(most > comparisons_allowed(4096), "{most}");
}

/// What a client pays for a visit is its own mappings, not those of others.
#[test]
fn a_visit_of_one_client_does_not_look_at_the_others() {
    let table = with_mappings(MANY);
    for location in 0..3 {
        table.rmap_add(FRAME, entry(2, location));
    }
    let visit = |raw| {
        let table = &table;
        move || table.rmap_visit(FRAME, client(raw), |_| Retain::Keep)
    };
    for raw in [0, 2, 3] {
        let most = most_comparisons([visit(raw)]);
        assert!(most <= 4 * comparisons_allowed(MANY), "client {raw}: {most}");
    }
}

/// Who has any of them is found without a look at all that they have.
#[test]
fn the_clients_of_a_frame_are_found_without_a_look_at_their_mappings() {
    let table = FrameTable::new(1);
    let mut expected = Vec::new();
    assert_eq!(table.rmap_clients(FRAME), expected);
    // One, a line, and an ordered set, each in an order that is not the clients'.
    for raw in [7, 0, ClientId::MAX, 3] {
        table.rmap_add(FRAME, entry(raw, RmapEntry::MAX_LOCATION));
        expected.push(client(raw));
        expected.sort_by_key(|client| client.as_u16());
        assert_eq!(table.rmap_clients(FRAME), expected);
    }
    for location in 0..MANY {
        table.rmap_add(FRAME, entry(3, location));
    }
    assert_eq!(table.rmap_clients(FRAME), expected);
    let most = most_comparisons([|| drop(table.rmap_clients(FRAME))]);
    assert!(most <= 4 * 5 * comparisons_allowed(MANY), "{most}");
}

#[test]
fn a_batch_is_bounded_and_the_next_goes_on_where_it_stopped() {
    let count = 3 * VISIT_BATCH as u64 + 5;
    for retain in [Retain::Keep, Retain::Drop] {
        let table = with_mappings(count);
        table.rmap_add(FRAME, entry(0, 1));
        table.rmap_add(FRAME, entry(2, 1));
        let (mut seen, mut from, mut batches) = (Vec::new(), Some(0), 0);
        while let Some(first) = from {
            let before = seen.len();
            from = table.rmap_visit_batch(FRAME, client(1), first, |location| {
                seen.push(location);
                retain
            });
            assert!(seen.len() - before <= VISIT_BATCH);
            batches += 1;
        }
        assert_eq!(seen, (0..count).map(|location| 2 * location).collect::<Vec<_>>());
        assert_eq!(batches, 4);
        let left = if retain == Retain::Keep { count + 2 } else { 2 };
        assert_eq!(table.rmap_entries(FRAME).len() as u64, left);
    }
}

/// Whoever else wants the frame's map gets it between two batches, and the maps of other frames are
/// not locked in a visit.
#[test]
fn others_get_at_the_map_between_two_batches() {
    let table = Arc::new(with_mappings(2 * VISIT_BATCH as u64));
    let mut from = Some(0);
    let mut came = 0;
    while let Some(first) = from {
        from = table.rmap_visit_batch(FRAME, client(1), first, |_| Retain::Keep);
        let other = table.clone();
        let adder = std::thread::spawn(move || other.rmap_add(FRAME, entry(2, first)));
        came += u64::from(adder.join().unwrap());
    }
    assert_eq!(came, 2);
    for mappings in [1, 5, 50] {
        let table = with_mappings(mappings);
        table.rmap_visit(FRAME, client(1), |_| {
            assert!(table.rmap_memory.0.try_lock().is_ok(), "with {mappings}");
            Retain::Keep
        });
    }
}

#[derive(Clone, Debug)]
enum Step {
    Add(u16, u64),
    Remove(u16, u64),
    AddMany(u16, u64),
    RemoveMany(u16, u64),
    DropAll(u16),
    DropOdd(u16),
}

/// Locations few enough to meet again, and enough to go through all kinds.
fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..3u16, 0..12u64).prop_map(|(client, at)| Step::Add(client, at)),
        6 => (0..3u16, 0..12u64).prop_map(|(client, at)| Step::Remove(client, at)),
        1 => (0..3u16, 0..200u64).prop_map(|(client, end)| Step::AddMany(client, end)),
        1 => (0..3u16, 0..200u64).prop_map(|(client, end)| Step::RemoveMany(client, end)),
        1 => (0..3u16).prop_map(Step::DropAll),
        1 => (0..3u16).prop_map(Step::DropOdd),
    ]
}

proptest! {
    /// Against a plain set: same entries and, after each step, I4.
    #[test]
    fn it_is_a_set_and_the_flag_follows_it(steps in prop::collection::vec(step(), 0..200)) {
        let table = FrameTable::new(1);
        let mut model: BTreeSet<(u16, u64)> = BTreeSet::new();
        for step in steps {
            match step {
                Step::Add(raw, at) => {
                    prop_assert_eq!(table.rmap_add(FRAME, entry(raw, at)), model.insert((raw, at)));
                }
                Step::Remove(raw, at) => {
                    let found = table.rmap_remove(FRAME, entry(raw, at));
                    prop_assert_eq!(found, model.remove(&(raw, at)));
                }
                Step::AddMany(raw, end) => {
                    for at in (0..end).rev() {
                        let added = table.rmap_add(FRAME, entry(raw, at));
                        prop_assert_eq!(added, model.insert((raw, at)));
                    }
                }
                Step::RemoveMany(raw, end) => {
                    for at in 0..end {
                        let found = table.rmap_remove(FRAME, entry(raw, at));
                        prop_assert_eq!(found, model.remove(&(raw, at)));
                    }
                }
                Step::DropAll(raw) => {
                    table.rmap_visit(FRAME, client(raw), |_| Retain::Drop);
                    model.retain(|entry| entry.0 != raw);
                }
                Step::DropOdd(raw) => {
                    let mut seen = Vec::new();
                    table.rmap_visit(FRAME, client(raw), |location| {
                        seen.push((raw, location));
                        if location % 2 == 1 { Retain::Drop } else { Retain::Keep }
                    });
                    seen.sort_unstable();
                    let own: Vec<_> = model.iter().filter(|entry| entry.0 == raw).copied().collect();
                    prop_assert_eq!(seen, own);
                    model.retain(|entry| entry.0 != raw || entry.1 % 2 == 0);
                }
            }
            let entries = table.rmap_entries(FRAME);
            let entries = entries.iter().map(|entry| (entry.client().as_u16(), entry.location()));
            let mut entries: Vec<_> = entries.collect();
            entries.sort_unstable();
            prop_assert_eq!(entries, model.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(table.get(FRAME).unwrap().is_exported(), !model.is_empty());
        }
    }
}
