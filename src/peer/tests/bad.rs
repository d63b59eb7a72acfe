//! Peers that hang, die, lie, flood or do not listen: they are cut off, what they had is gone from
//! their mappings, and nobody else is held up for longer than the limit.

use std::io::Write;
use std::num::NonZeroU64;
use std::time::{Duration, Instant};

use super::rig::{RawPeer, Rig, SLOTS, content};
use crate::addr::{Gfn, PAGE_SIZE};
use crate::export_rmap::{ClientId, Retain, RmapEntry};
use crate::host_mm::{HostFault, When};
use crate::peer::client::{Client, ClientConfig};
use crate::peer::hooks::{PEER_HANG, PEER_KILL};
use crate::peer::protocol::{Closing, MAX_REQUESTS, MESSAGE_BYTES, Reply, Request};
use crate::peer::server::MAX_PEERS;
use crate::sync::lock;
use crate::sys::signal;

/// Short enough to be waited for.
const SHORT: Duration = Duration::from_millis(100);
const LONG: Duration = Duration::from_secs(60);
const EMPTY: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

fn map(first: u64, count: u32, slot: u32) -> Request {
    Request::Map { object: 0, first: Gfn::new(first), count, slot }
}

fn closed(why: Closing) -> Option<Reply> {
    Some(Reply::Closed { why })
}

#[test]
fn a_peer_that_hangs_is_cut_off_and_sees_nothing_any_more() {
    let rig = Rig::new(SHORT);
    (0..8).for_each(|gfn| rig.write(gfn, 1));
    let mut peer = rig.raw();
    peer.map(0, 8, 0);
    let begun = Instant::now();
    rig.write(3, 2);
    assert!(begun.elapsed() >= SHORT, "it had its time");
    assert!(rig.read(3) == content(3, 2));
    // It has its mapping still, and keeps looking: at none of the slots there is ever anything again.
    (0..8).for_each(|gfn| rig.write(gfn, 3));
    assert!((0..8).all(|slot| peer.page(slot) == EMPTY));
    assert_eq!(rig.exported(), 0);
    assert_eq!(peer.hear(), Some(Reply::Invalidate { sequence: 1, slots: vec![3] }));
    assert_eq!(peer.hear_out(), closed(Closing::TooSlow));
    rig.wait_for("the sentence", |rig| !lock(&rig.told).is_empty());
    assert_eq!(
        lock(&rig.told)[0],
        "peer 1 was cut off: it did not acknowledge an invalidation in time"
    );
    rig.assert_sound();
    assert_eq!(rig.server.stats().cut_off, 1);
}

/// The client's own bad mode, against the client's own checks.
#[test]
fn a_client_that_hangs_finds_that_everything_was_taken_from_it() {
    let rig = Rig::new(SHORT);
    (0..64).for_each(|gfn| rig.write(gfn, 1));
    // However busy the machine is, it hangs before it would leave.
    let duration = Duration::from_secs(3600);
    let config = ClientConfig { duration, pages: 32, hold: LONG, seed: 1, hang_after: Some(2) };
    let client = Client::on(rig.connect(), config).unwrap();
    let report = std::thread::scope(|scope| {
        let client = scope.spawn(|| client.run(|| false).unwrap());
        for round in 2.. {
            (0..64).for_each(|gfn| rig.write(gfn, round));
            if client.is_finished() {
                break;
            }
        }
        client.join().unwrap()
    });
    assert_eq!(report.closed, Some(Closing::TooSlow));
    assert_eq!(report.findings.violations, 0, "{report:?}");
    assert!(report.findings.empty >= u64::from(SLOTS), "{report:?}");
    rig.assert_sound();
}

/// Whoever wants the page may be the thread that is to end the run.
#[test]
fn a_peer_that_hangs_is_not_waited_for_at_the_end_that_a_signal_asks_for() {
    let rig = Rig::new(Duration::from_secs(3600));
    rig.write(3, 1);
    let mut peer = rig.raw();
    peer.map(0, 8, 0);
    {
        let _stop = signal::pretended::Stop::after(2);
        rig.write(3, 2);
    }
    assert!(rig.read(3) == content(3, 2));
    assert_eq!(peer.hear(), Some(Reply::Invalidate { sequence: 1, slots: vec![3] }));
    assert_eq!(peer.hear_out(), closed(Closing::EndOfRun));
    assert!((0..8).all(|slot| peer.page(slot) == EMPTY));
    rig.assert_sound();
    assert_eq!(rig.server.stats().cut_off, 0, "it is not the peer's fault");
}

#[test]
fn a_peer_that_dies_leaves_nothing_behind() {
    let rig = Rig::new(LONG);
    let mut peer = rig.raw();
    peer.map(0, 8, 0);
    assert_eq!(rig.exported(), 8);
    drop(peer);
    rig.wait_for("its end", |rig| rig.server.stats().cut_off == 1);
    assert_eq!(rig.exported(), 0);
    rig.write(0, 1);
    rig.assert_sound();
}

#[test]
fn a_peer_that_dies_while_it_is_waited_for_holds_nobody_up() {
    let rig = Rig::new(LONG);
    let mut peer = rig.raw();
    peer.map(0, 1, 0);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| rig.write(0, 1));
        assert!(matches!(peer.hear(), Some(Reply::Invalidate { .. })));
        let begun = Instant::now();
        drop(peer);
        writer.join().unwrap();
        assert!(begun.elapsed() < LONG, "long before the limit");
    });
    rig.assert_sound();
}

#[test]
fn a_message_that_is_wrong_at_any_byte_is_answered_or_ends_the_connection() {
    let rig = Rig::new(LONG);
    let good = map(1, 2, 3).bytes();
    let mut cut_off = 0;
    for at in 0..MESSAGE_BYTES {
        for byte in [0xff, 0x80, good[at] ^ 1] {
            let mut peer = rig.raw();
            let mut bytes = good;
            bytes[at] = byte;
            // One byte at a time: a message may come in any pieces.
            for byte in bytes {
                (&peer.socket).write_all(&[byte]).unwrap();
            }
            // Whatever came of it, this is out of turn.
            let _ = (&peer.socket).write_all(&Request::Ack { sequence: 1 }.bytes());
            assert_eq!(peer.hear_out(), closed(Closing::Malformed), "byte {at} is {byte:#x}");
            cut_off += 1;
        }
    }
    rig.wait_for("all sentences", |rig| lock(&rig.told).len() == cut_off);
    let mut peer = rig.raw();
    peer.map(1, 2, 3);
    rig.assert_sound();
}

#[test]
fn what_is_out_of_turn_ends_the_connection() {
    let rig = Rig::new(LONG);
    let cases: [(&[Request], &str); 9] = [
        (&[Request::Ack { sequence: 0 }], "acknowledgement 0 is out of turn"),
        (&[map(0, 1, SLOTS)], "slot 64 does not exist"),
        (&[map(0, 2, u32::MAX)], "does not exist"),
        (&[map(0, 1, 5), map(1, 1, 5)], "slot 5 is in use"),
        (&[Request::Unmap { slot: 0, count: 1 }], "slot 0 holds nothing"),
        (&[Request::Unmap { slot: 63, count: 2 }], "slot 64 does not exist"),
        (&[Request::Unmap { slot: 1, count: u32::MAX }], "does not exist"),
        (&[map(0, 1, 5), map(0, 1, 6), Request::Unmap { slot: 4, count: 3 }], "slot 4 holds"),
        (&[map(0, 1, 5), Request::Ack { sequence: 1 }], "acknowledgement 1 is out of turn"),
    ];
    for (number, (requests, said)) in cases.into_iter().enumerate() {
        let mut peer = rig.raw();
        requests.iter().for_each(|&request| peer.say(request));
        assert_eq!(peer.hear_out(), closed(Closing::Malformed), "{requests:?}");
        rig.wait_for("the sentence", |rig| lock(&rig.told).len() > number);
        let told = lock(&rig.told)[number].clone();
        assert!(told.contains("it broke the protocol: ") && told.contains(said), "{told}");
    }
    rig.assert_sound();
}

#[test]
fn a_flood_of_requests_is_bounded() {
    let rig = Rig::new(LONG);
    let mut peer = rig.raw();
    // The lender waits for this page: nothing is answered meanwhile.
    let locked = rig.object.lock_page(Gfn::new(0)).unwrap();
    for slot in 0..u32::try_from(MAX_REQUESTS + 1).unwrap() {
        peer.say(map(0, 1, slot));
    }
    assert_eq!(peer.hear_out(), closed(Closing::Malformed));
    drop(locked);
    rig.assert_sound();
}

#[test]
fn a_peer_that_never_reads_is_cut_off() {
    let rig = Rig::new(LONG);
    let peer = rig.raw();
    // Each is refused at once, which takes no frame and no slot, but many bytes.
    let flood = map(1 << 40, 64, 0).bytes();
    let mut sent = 0;
    while (&peer.socket).write_all(&flood).is_ok() {
        sent += 1;
        assert!(sent < 100_000, "it may go on for ever");
    }
    rig.wait_for("its end", |rig| rig.server.stats().cut_off == 1);
    rig.wait_for("the sentence", |rig| !lock(&rig.told).is_empty());
    assert!(lock(&rig.told)[0].ends_with("it does not read its socket"), "{:?}", rig.told);
    rig.assert_sound();
}

/// A peer that keeps to the protocol gives up two pages, one after the other; returns the last that
/// it heard. Its limit is short, to be waited for, but long enough for it to acknowledge the first:
/// how long that takes is the machine's affair.
fn invalidated_twice(fault: HostFault, when: When) -> (Rig, Option<Reply>) {
    let mut limit = SHORT;
    loop {
        let rig = Rig::with(limit, None, Some((fault, when)));
        let mut peer = rig.raw();
        peer.map(0, 2, 0);
        let (last, acknowledged) = std::thread::scope(|scope| {
            let peer = scope.spawn(move || {
                let mut last = None;
                while let Some(reply) = peer.hear() {
                    if let Reply::Invalidate { sequence, .. } = reply {
                        let _ = (&peer.socket).write_all(&Request::Ack { sequence }.bytes());
                    }
                    last = Some(reply);
                }
                last
            });
            rig.write(0, 1);
            let acknowledged = rig.server.stats().acknowledged;
            rig.write(1, 1);
            (peer.join().unwrap(), acknowledged)
        });
        if acknowledged == 1 {
            return (rig, last);
        }
        assert!(limit < LONG, "the first is as ever: {:?}", rig.server.stats());
        rig.assert_sound();
        limit *= 2;
    }
}

#[test]
fn an_injected_hang_cuts_the_peer_off_and_an_injected_kill_at_once() {
    let second = NonZeroU64::new(2).unwrap();
    for (fault, when, why) in [
        (PEER_HANG.plain(), When::Every { first: second, step: NonZeroU64::MIN }, Closing::TooSlow),
        (PEER_KILL.plain(), When::Once(second), Closing::Injected),
    ] {
        let (rig, last) = invalidated_twice(fault, when);
        assert_eq!(last, closed(why));
        assert_eq!(rig.mm.lab().injected()[0].struck, 1);
        assert!(rig.read(1) == content(1, 1));
        rig.assert_sound();
    }
}

#[test]
fn there_are_only_so_many_peers_at_a_time() {
    let rig = Rig::new(LONG);
    let peers: Vec<RawPeer> = (0..MAX_PEERS).map(|_| rig.raw()).collect();
    let config = ClientConfig { duration: LONG, pages: 1, hold: LONG, seed: 1, hang_after: None };
    let refused = Client::on(rig.connect(), config).map(drop).unwrap_err();
    assert!(refused.to_string().ends_with("there are too many peers"), "{refused}");
    drop(peers);
    rig.wait_for("their end", |rig| rig.server.stats().cut_off == MAX_PEERS as u64);
    let mut peer = rig.raw();
    peer.map(0, 1, 0);
    rig.assert_sound();
    assert_eq!(rig.server.stats().served, MAX_PEERS as u64 + 1);
}

/// However often they come: what is kept is of those that are there, or whose threads are ending (and
/// of the last one until the next comes).
#[test]
fn peers_that_come_and_go_leave_nothing_that_grows() {
    let rig = Rig::new(LONG);
    rig.write(0, 1);
    for _ in 0..4 * MAX_PEERS {
        let mut peer = rig.raw();
        peer.map(0, 1, 0);
        let (live, threads, _) = rig.server.kept();
        assert_eq!((live, threads), (1, 1));
        drop(peer);
        rig.wait_for("its end", |rig| rig.server.kept().2 == 0);
    }
    assert_eq!(rig.server.stats().refused, 0);
    rig.assert_sound();
}

#[test]
fn what_a_client_that_is_gone_has_left_is_told() {
    let rig = Rig::new(LONG);
    let mut peer = rig.raw();
    peer.map(0, 1, 0);
    assert!(rig.server.leftovers().is_empty(), "it is there");
    let table = rig.mm.frame_table();
    let pfn = rig.object.lock_page(Gfn::new(0)).unwrap().pfn();
    let gone = ClientId::new(4000).unwrap();
    (0..100).for_each(|slot| {
        assert!(crate::export_rmap::bare_entries::add_entry(table, pfn, RmapEntry::new(gone, slot)))
    });
    let left = rig.server.leftovers();
    assert_eq!(left.len(), 16, "{left:?}");
    let said = format!("I3: frame {pfn} is exported to slot 0 of client 4000, which is gone");
    assert_eq!(left[0], said);
    table.rmap_visit(pfn, gone, |_| Retain::Drop);
    rig.assert_sound();
}

#[test]
fn the_socket_comes_and_goes_with_the_server() {
    use crate::peer::server::{PeerServer, ServeError, ServerConfig, check_path};

    let rig = Rig::new(LONG);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("peers");
    let start = || {
        let objects = vec![rig.object.clone()];
        PeerServer::start(&path, &rig.mm, objects, ServerConfig::default(), Box::new(|_| {}))
    };
    // One that a process left behind.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let server = start().unwrap();
    let mut peer = RawPeer::on(std::os::unix::net::UnixStream::connect(&path).unwrap());
    peer.map(0, 1, 0);
    // Whoever looks whether the place is free is no peer. Connections are accepted in order: another
    // comes after all that were made for these looks.
    assert!(matches!(start(), Err(ServeError::InUse(_))));
    assert!(matches!(check_path(&path), Err(ServeError::InUse(_))));
    let mut late = RawPeer::on(std::os::unix::net::UnixStream::connect(&path).unwrap());
    // Served only once it is counted.
    late.map(1, 1, 1);
    let stats = server.stats();
    assert_eq!((stats.served, stats.refused), (2, 0), "{stats:?}");
    server.stop();
    assert!(!path.exists());
    assert_eq!(peer.hear_out(), closed(Closing::EndOfRun));
    std::fs::write(&path, "mine").unwrap();
    assert!(matches!(start(), Err(ServeError::NotASocket(_))));
    assert_eq!(std::fs::read(&path).unwrap(), b"mine");
    assert!(server.leftovers().is_empty());
}
