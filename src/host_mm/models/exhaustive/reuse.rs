//! Detach, flush, reuse: a frame goes to another page only when no processor can use what it
//! cached of the old one.

use crate::models::client::Client;
use crate::models::exhaustive::FRAME;
use crate::models::host::Host;
use gnomon_export_rmap::Membership;
use gnomon_export_rmap::addr::Pfn;
use gnomon_export_rmap::explore::{check, check_bounded, thread};
use gnomon_export_rmap::sync::{Arc, Ordering};

const PAGE: usize = 0;
const OTHER_PAGE: usize = 1;
const VALUE: u32 = 7;
const OTHER_VALUE: u32 = 8;

/// Two pages, one frame; the client has written the first, and its processor caches the SPTE.
fn machine() -> (Arc<Host>, Arc<Client>, Membership) {
    let host = Arc::new(Host::new(2, 1));
    let (client, membership) = Client::register(&host, 2, 0);
    host.put(OTHER_PAGE, 0, OTHER_VALUE);
    client.fault(&host, PAGE, true);
    client.touch(&host, PAGE, Some(VALUE)).unwrap();
    (host, client, membership)
}

/// The guest reads its page if it can without a fault.
fn read(host: &Host, client: &Client) {
    let found = client.touch(host, PAGE, None);
    assert!(found.is_none_or(|found| found == VALUE), "I1: another page's content: {found:?}");
}

#[test]
fn a_frame_is_reused_only_after_the_flush() {
    check(|| {
        let (host, client, _membership) = machine();
        let guest = thread::spawn({
            let (host, client) = (host.clone(), client.clone());
            move || {
                read(&host, &client);
                read(&host, &client);
            }
        });
        assert_eq!(host.evict(&[FRAME]), 1);
        drop(host.lock_page(OTHER_PAGE));
        guest.join().unwrap();
        assert_eq!(host.word(FRAME, 0).load(Ordering::Relaxed), OTHER_VALUE);
        host.check_books(&[&client]);
    });
}

/// Two frames and one flush for both: whichever page the guest reads, its frame has been flushed.
#[test]
fn frames_of_a_batch_are_reused_only_after_the_flush_of_each() {
    for page in 0..2 {
        check_bounded(move || {
            let host = Arc::new(Host::new(4, 2));
            let (client, _membership) = Client::register(&host, 4, 0);
            for (number, value) in [(0, VALUE), (1, VALUE), (2, OTHER_VALUE), (3, OTHER_VALUE)] {
                host.put(number, 0, value);
            }
            for number in 0..2 {
                client.fault(&host, number, false);
                client.touch(&host, number, None).unwrap();
            }
            let guest = thread::spawn({
                let (host, client) = (host.clone(), client.clone());
                move || {
                    let found = client.touch(&host, page, None);
                    assert!(found.is_none_or(|found| found == VALUE), "I1: {found:?}");
                }
            });
            assert_eq!(host.evict(&[FRAME, Pfn::new(1)]), 2);
            drop((host.lock_page(2), host.lock_page(3)));
            guest.join().unwrap();
            host.check_books(&[&client]);
        });
    }
}

/// The old page is forgotten, which needs no flush if no client maps it: a removal is flushed
/// before it leaves the reverse map.
#[test]
fn a_frame_stays_exported_until_its_clients_own_removal_is_flushed() {
    check(|| {
        let (host, client, _membership) = machine();
        let guest = thread::spawn({
            let (host, client) = (host.clone(), client.clone());
            move || read(&host, &client)
        });
        let remover = thread::spawn({
            let (host, client) = (host.clone(), client.clone());
            move || client.remove(&host, PAGE)
        });
        host.discard(PAGE);
        drop(host.lock_page(OTHER_PAGE));
        guest.join().unwrap();
        remover.join().unwrap();
        host.check_books(&[&client]);
    });
}

/// An eviction whose flush failed has left the frame without an entry in the reverse map, and the
/// processor with what it caches: who forgets the page after it has to flush all the same.
#[test]
fn a_frame_whose_flush_failed_is_reused_only_after_one_that_succeeds() {
    check(|| {
        let (host, client, _membership) = machine();
        client.refuse_next_flush();
        assert_eq!(host.evict(&[FRAME]), 0);
        let guest = thread::spawn({
            let (host, client) = (host.clone(), client.clone());
            move || read(&host, &client)
        });
        host.discard(PAGE);
        drop(host.lock_page(OTHER_PAGE));
        guest.join().unwrap();
        host.check_books(&[&client]);
    });
}
