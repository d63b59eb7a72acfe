//! Peers that keep to the protocol find what it promises, and notice where it is broken.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::rig::{PAGES, RawPeer, Rig, SLOTS, content};
use crate::addr::{Gfn, PAGE_SIZE};
use crate::host_mm::Sabotage;
use crate::peer::client::{Client, ClientConfig, Findings};
use crate::peer::protocol::{Closing, Reply, Request};

const LIMIT: Duration = Duration::from_secs(30);
/// Longest time to work until that has come about which must.
const GIVE_UP: Duration = Duration::from_secs(60);
const EMPTY: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

/// Peers work, one after the other, until what they have found so far is `enough`.
fn work_until(sabotage: Option<Sabotage>, enough: impl Fn(&Findings) -> bool) -> Findings {
    let begun = Instant::now();
    let mut all = work(sabotage);
    while !enough(&all) && begun.elapsed() < GIVE_UP {
        let found = work(sabotage);
        all.mapped += found.mapped;
        all.acknowledged += found.acknowledged;
        all.unmapped += found.unmapped;
        all.verified += found.verified;
        all.twins += found.twins;
        all.empty += found.empty;
        all.violations += found.violations;
        all.first.extend(found.first);
    }
    assert!(enough(&all), "{all:?}");
    all
}

/// A peer works while pages are written, evicted, cleaned, moved, merged, shared and given back.
fn work(sabotage: Option<Sabotage>) -> Findings {
    let rig = Rig::with(LIMIT, sabotage, None);
    (0..PAGES).for_each(|gfn| rig.write(gfn, 1));
    let is_over = AtomicBool::new(false);
    let config = ClientConfig {
        duration: Duration::from_secs(60),
        pages: 48,
        hold: Duration::from_millis(20),
        seed: 3,
        hang_after: None,
    };
    let report = std::thread::scope(|scope| {
        let (rig, is_over) = (&rig, &is_over);
        let until_over = move |mut work: Box<dyn FnMut(u64) + Send>| {
            scope.spawn(move || {
                for round in 0.. {
                    if is_over.load(Ordering::Relaxed) {
                        return;
                    }
                    work(round);
                    std::thread::sleep(Duration::from_micros(200));
                }
            });
        };
        until_over(Box::new(|round| rig.write(round * 7 % PAGES, round + 2)));
        until_over(Box::new(|round| {
            let frames = rig.frames();
            match round % 5 {
                0 => drop(rig.mm.evict_frames(&frames[..8])),
                1 => drop(rig.mm.clean_frames(&frames[..64])),
                2 => drop(rig.mm.migrate_frames(&frames[16..24])),
                3 => drop(rig.object.share_pages((0..8).map(|at| Gfn::new(round % 200 + at)))),
                _ => drop(rig.object.free_pages(Gfn::new(round % PAGES), 1)),
            }
        }));
        let client = Client::on(rig.connect(), config).unwrap();
        let begun = Instant::now();
        let report = client.run(|| {
            let stats = rig.server.stats();
            (stats.lent > 2000 && stats.acknowledged > 200) || begun.elapsed() > LIMIT
        });
        is_over.store(true, Ordering::Relaxed);
        report.unwrap()
    });
    assert_eq!(report.closed, None, "{report:?}");
    rig.assert_sound();
    assert_eq!(rig.server.stats().cut_off, 0);
    report.findings
}

#[test]
fn a_peer_finds_each_copy_right_until_it_gives_it_up() {
    let some_of_everything = |found: &Findings| {
        let all = [found.mapped, found.acknowledged, found.unmapped, found.verified, found.twins];
        all.iter().all(|&count| count > 100) && found.empty > 100
    };
    let found = work_until(None, some_of_everything);
    assert_eq!(found.violations, 0, "{found:?}");
}

#[test]
fn sabotage_skip_recall_is_found_by_a_peer() {
    let changed = |text: &String| text.contains("has changed while slot");
    work_until(Some(Sabotage::SkipRecall), |found| found.first.iter().any(changed));
}

#[test]
fn sabotage_skip_punch_is_found_by_a_peer() {
    let readable = |text: &String| text.contains("can still be read after it was freed");
    work_until(Some(Sabotage::SkipPunch), |found| found.first.iter().any(readable));
}

#[test]
fn a_write_waits_for_the_acknowledgement() {
    let rig = Rig::new(LIMIT);
    rig.write(5, 1);
    let mut peer = rig.raw();
    peer.map(5, 1, 9);
    assert!(peer.page(9) == content(5, 1));
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| rig.write(5, 2));
        assert_eq!(peer.hear(), Some(Reply::Invalidate { sequence: 1, slots: vec![9] }));
        assert!(!writer.is_finished() && peer.page(9) == content(5, 1));
        peer.say(Request::Ack { sequence: 1 });
        writer.join().unwrap();
    });
    assert_eq!(peer.hear(), Some(Reply::Freed { sequence: 1 }));
    assert!(peer.page(9) == EMPTY);
    peer.map(5, 1, 9);
    assert!(peer.page(9) == content(5, 2));
    rig.assert_sound();
    assert_eq!(peer.hear(), Some(Reply::Closed { why: Closing::EndOfRun }));
    assert!(peer.page(9) == EMPTY);
}

#[test]
fn one_flush_is_one_invalidation() {
    let rig = Rig::new(LIMIT);
    (0..16).for_each(|gfn| rig.write(gfn, 1));
    let mut peer = rig.raw();
    peer.map(0, 16, 4);
    std::thread::scope(|scope| {
        let evict = scope.spawn(|| rig.mm.evict_frames(&rig.frames()).unwrap());
        let Some(Reply::Invalidate { sequence, mut slots }) = peer.hear() else { panic!() };
        slots.sort_unstable();
        assert_eq!((sequence, slots), (1, (4..20).collect()));
        peer.say(Request::Ack { sequence });
        assert_eq!(evict.join().unwrap(), 16);
    });
    assert_eq!(rig.server.stats().sent, 1);
    rig.assert_sound();
}

#[test]
fn two_peers_both_give_up_a_page_that_is_written() {
    let rig = Rig::new(LIMIT);
    rig.write(1, 1);
    let mut peers = [rig.raw(), rig.raw()];
    peers.iter_mut().for_each(|peer| peer.map(1, 1, 0));
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| rig.write(1, 2));
        for peer in &mut peers {
            assert!(matches!(peer.hear(), Some(Reply::Invalidate { .. })));
            assert!(!writer.is_finished());
            peer.say(Request::Ack { sequence: 1 });
        }
    });
    rig.assert_sound();
}

#[test]
fn a_slot_that_is_given_up_is_empty_and_can_be_used_again() {
    let rig = Rig::new(LIMIT);
    rig.write(1, 1);
    let mut peer = rig.raw();
    peer.map(1, 2, 0);
    assert_eq!(rig.exported(), 2);
    peer.say(Request::Unmap { slot: 0, count: 1 });
    assert_eq!(peer.hear(), Some(Reply::Unmapped { slot: 0 }));
    assert!(peer.page(0) == EMPTY);
    assert_eq!(rig.exported(), 1);
    rig.write(1, 2);
    peer.map(1, 1, 0);
    assert!(peer.page(0) == content(1, 2));
    peer.say(Request::Bye);
    assert_eq!(peer.hear_out(), Some(Reply::Closed { why: Closing::Left }));
    assert!(peer.page(0) == EMPTY && peer.page(1) == EMPTY);
    rig.assert_sound();
    assert_eq!(rig.server.stats().cut_off, 0);
}

/// A page is lent, given up and another asked for in its slot, while the rest of the first request
/// waits for a page.
#[test]
fn a_slot_that_is_asked_for_again_gets_the_answer_to_the_later_request() {
    let rig = Rig::new(LIMIT);
    (0..8).for_each(|gfn| rig.write(gfn, 1));
    let mut peer = rig.raw();
    let map = |first, count, slot| Request::Map { object: 0, first: Gfn::new(first), count, slot };
    // The lender gives away what it has before it waits for this one.
    let locked = rig.object.lock_page(Gfn::new(1)).unwrap();
    peer.say(map(0, 2, 0));
    assert_eq!(peer.hear_prompted(), Reply::Mapped { slot: 0, object: 0, gfn: Gfn::new(0) });
    peer.say(Request::Unmap { slot: 0, count: 1 });
    assert_eq!(peer.hear(), Some(Reply::Unmapped { slot: 0 }));
    assert!(peer.page(0) == EMPTY);
    peer.say(map(7, 1, 0));
    // What is refused at once tells that the server has heard what came before it.
    peer.say(map(1 << 40, 1, SLOTS - 1));
    assert!(matches!(peer.hear(), Some(Reply::Refused { .. })));
    drop(locked);
    assert_eq!(peer.hear(), Some(Reply::Mapped { slot: 1, object: 0, gfn: Gfn::new(1) }));
    assert_eq!(peer.hear(), Some(Reply::Mapped { slot: 0, object: 0, gfn: Gfn::new(7) }));
    assert!(peer.page(0) == content(7, 1) && peer.page(1) == content(1, 1));
    assert_eq!(rig.exported(), 2);
    rig.assert_sound();
}

/// Time in which the server is stopped is not the peer's: here the clock leaps while it waits.
#[test]
fn a_peer_is_not_cut_off_for_time_in_which_the_server_did_not_run() {
    let begun = Instant::now();
    let (stopped, looks) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let clock = {
        let (stopped, looks) = (stopped.clone(), looks.clone());
        // An hour, and otherwise no time passes.
        move || {
            looks.fetch_add(1, Ordering::SeqCst);
            begun + Duration::from_secs(3600) * u32::from(stopped.load(Ordering::SeqCst))
        }
    };
    let rig = Rig::with_clock(Duration::from_secs(1), None, None, Box::new(clock));
    rig.write(5, 1);
    let mut peer = rig.raw();
    peer.map(5, 1, 9);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| rig.write(5, 2));
        assert_eq!(peer.hear(), Some(Reply::Invalidate { sequence: 1, slots: vec![9] }));
        rig.wait_for("a look at the clock", |_| looks.load(Ordering::SeqCst) > 1);
        stopped.store(true, Ordering::SeqCst);
        let before = looks.load(Ordering::SeqCst);
        rig.wait_for("looks after the leap", |_| looks.load(Ordering::SeqCst) > before + 2);
        peer.say(Request::Ack { sequence: 1 });
        writer.join().unwrap();
    });
    assert_eq!(peer.hear(), Some(Reply::Freed { sequence: 1 }));
    assert_eq!(rig.server.stats().cut_off, 0);
    rig.assert_sound();
}

#[test]
fn pages_that_do_not_exist_are_refused() {
    let rig = Rig::new(LIMIT);
    let mut peer = rig.raw();
    for (object, first) in [(0, PAGES), (0, PAGES - 1), (1, 0)] {
        peer.say(Request::Map { object, first: Gfn::new(first), count: 2, slot: 0 });
        for _ in 0..2 {
            assert!(matches!(peer.hear(), Some(Reply::Refused { .. })));
        }
    }
    peer.map(PAGES - 1, 1, 0);
    rig.assert_sound();
}

#[test]
fn what_is_noted_of_an_object_is_told_once_to_those_who_are_there_and_who_come() {
    let rig = Rig::new(LIMIT);
    let mut here = rig.raw();
    for note in [[1, 2], [1, 2], [3, 4]] {
        rig.server.note(0, note);
    }
    let told = |note| Some(Reply::Note { object: 0, note });
    assert_eq!([here.hear(), here.hear()], [told([1, 2]), told([3, 4])]);
    let mut late = RawPeer::on(rig.connect());
    assert_eq!(late.hear(), told([3, 4]));
    drop((here, late));
    rig.assert_sound();
}
