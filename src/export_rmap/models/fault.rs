//! A fault against an invalidation's begin and end.

use crate::addr::Pfn;
use crate::models::client::Client;
use crate::models::host::Host;
use crate::models::{FRAME, check, check_bounded, thread};
use crate::sync::{Arc, AtomicU32, Ordering};
use crate::{Invalidation, LockedPage};

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
            let page = host.table.lock(FRAME);
            (host.frame_of(PAGE) == Some(FRAME)).then(|| page.sequence())
        };
        if let Some(token) = token {
            client.install(&host.table, PAGE, false, token);
        }
        let evicted = evictor.join().unwrap();
        if evicted == 1 {
            assert!(client.entries_for(FRAME).is_empty(), "I1: an SPTE outlived its frame");
        }
        host.check_books(&[&client]);
    });
}

/// A page that the host moves to another frame, as migration does.
struct Moving {
    host: Host,
    place: AtomicU32,
}

const OLD: Pfn = Pfn::new(0);
const NEW: u32 = 1;

impl Moving {
    fn lock_page(&self) -> LockedPage<'_> {
        loop {
            let place = self.place.load(Ordering::Acquire);
            let page = self.host.table.lock(Pfn::new(place));
            if self.place.load(Ordering::Acquire) == place {
                return page;
            }
        }
    }

    fn migrate(&self) {
        let old = self.host.table.lock(OLD);
        old.begin_invalidation();
        self.host.notifiers.invalidate_page(&old, Invalidation::Unmap);
        self.place.store(NEW, Ordering::Release);
    }
}

/// With retry: the fault ends at the page's new place, and an invalidation costs it one retry.
#[test]
fn a_fault_that_was_overtaken_starts_over_and_finds_the_new_frame() {
    check_bounded(|| {
        let moving = Arc::new(Moving { host: Host::new(1, 2), place: AtomicU32::new(0) });
        let (client, _membership) = Client::register(&moving.host, 1, 0);
        let migration = thread::spawn({
            let moving = moving.clone();
            move || moving.migrate()
        });
        let mut retries = 0;
        loop {
            let token = moving.lock_page().sequence();
            if client.install(&moving.host.table, PAGE, false, token) {
                break;
            }
            retries += 1;
        }
        assert!(retries <= 1, "{retries} retries for one invalidation");
        migration.join().unwrap();
        assert!(client.entries_for(OLD).is_empty(), "I1: an SPTE for the frame that was left");
        moving.host.check_books(&[&client]);
    });
}
