//! A fault against an invalidation's begin and end.

use crate::models::client::Client;
use crate::models::exhaustive::FRAME;
use crate::models::host::Host;
use gnomon_export_rmap::explore::{check, check_bounded, thread};
use gnomon_export_rmap::sync::Arc;

const PAGE: usize = 0;

/// One fault, which does not start over, against one eviction.
#[test]
fn a_fault_never_installs_after_the_invalidation_that_overlapped_it() {
    check(|| {
        let host = Arc::new(Host::new(1, 1));
        let (client, _membership) = Client::register(&host, 1, 0);
        drop(host.lock_page(PAGE));
        let evictor = thread::spawn({
            let host = host.clone();
            move || host.evict(&[FRAME])
        });
        let token = {
            let page = host.table().lock(FRAME);
            (host.frame_of(PAGE) == Some(FRAME)).then(|| page.sequence())
        };
        if let Some(token) = token {
            client.install(host.table(), PAGE, false, token);
        }
        let evicted = evictor.join().unwrap();
        if evicted == 1 {
            assert!(client.entries_for(FRAME).is_empty(), "I1: an SPTE outlived its frame");
        }
        host.check_books(&[&client]);
    });
}

/// With retry: the fault ends at the page's new place, and an invalidation costs it one retry.
#[test]
fn a_fault_that_was_overtaken_starts_over_and_finds_the_new_frame() {
    check_bounded(|| {
        let host = Arc::new(Host::new(1, 2));
        let (client, _membership) = Client::register(&host, 1, 0);
        drop(host.lock_page(PAGE));
        let migration = thread::spawn({
            let host = host.clone();
            move || host.migrate(FRAME)
        });
        let mut retries = 0;
        loop {
            let token = host.lock_page(PAGE).sequence();
            if client.install(host.table(), PAGE, false, token) {
                break;
            }
            retries += 1;
        }
        assert!(retries <= 1, "{retries} retries for one invalidation");
        if migration.join().unwrap() {
            assert!(
                client.entries_for(FRAME).is_empty(),
                "I1: an SPTE for the frame that was left"
            );
        }
        host.check_books(&[&client]);
    });
}
