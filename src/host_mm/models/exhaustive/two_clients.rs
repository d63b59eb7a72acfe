//! Two clients on one page: the reverse map between them, the flag, and their harvests.

use crate::models::client::Client;
use crate::models::exhaustive::FRAME;
use crate::models::host::Host;
use gnomon_export_rmap::explore::{check, check_bounded, thread};
use gnomon_export_rmap::sync::Arc;
use gnomon_export_rmap::{Membership, PageFlags};

const PAGE: usize = 0;

struct Two {
    host: Arc<Host>,
    first: Arc<Client>,
    second: Arc<Client>,
    _memberships: [Membership; 2],
}

impl Two {
    /// The page is in its frame and nobody maps it yet.
    fn new() -> Self {
        let host = Arc::new(Host::new(1, 1));
        let (first, one) = Client::register(&host, 1, 0);
        let (second, two) = Client::register(&host, 1, 1);
        drop(host.lock_page(PAGE));
        Self { host, first, second, _memberships: [one, two] }
    }

    /// The first client gives its mapping up of its own accord, on a thread of its own.
    fn first_lets_go(&self) -> thread::JoinHandle<()> {
        let (host, client) = (self.host.clone(), self.first.clone());
        thread::spawn(move || client.remove(&host, PAGE))
    }

    fn check_books(&self) {
        self.host.check_books(&[&self.first, &self.second]);
    }
}

/// Insert against the visit of an invalidation: the map goes from one entry to a few and back.
#[test]
fn a_mapping_added_while_the_page_is_invalidated_is_in_the_map_or_backed_out() {
    check_bounded(|| {
        let two = Two::new();
        two.second.fault(&two.host, PAGE, true);
        let cleaner = thread::spawn({
            let host = two.host.clone();
            move || host.clean(&[FRAME])
        });
        two.first.fault(&two.host, PAGE, false);
        cleaner.join().unwrap();
        assert_eq!(two.first.entries_for(FRAME).len(), 1);
        assert_eq!(two.second.entries_for(FRAME).len(), 1);
        two.check_books();
    });
}

/// One lets go of its own accord while the other is being told.
#[test]
fn neither_client_clears_the_flag_while_the_other_maps() {
    check(|| {
        let two = Two::new();
        two.first.fault(&two.host, PAGE, false);
        two.second.fault(&two.host, PAGE, false);
        let remover = two.first_lets_go();
        assert_eq!(two.host.evict(&[FRAME]), 1);
        assert!(two.second.entries_for(FRAME).is_empty(), "I1: the second client was not told");
        remover.join().unwrap();
        two.check_books();
    });
}

/// Both let go at once: the flag goes with the last, and not before.
#[test]
fn the_flag_goes_with_the_last_of_two_clients() {
    check(|| {
        let two = Two::new();
        two.first.fault(&two.host, PAGE, false);
        two.second.fault(&two.host, PAGE, false);
        let remover = two.first_lets_go();
        assert!(two.host.table().get(FRAME).unwrap().is_exported(), "I4: the second still maps it");
        two.second.remove(&two.host, PAGE);
        remover.join().unwrap();
        two.check_books();
    });
}

/// One lets go as the other comes: whoever adds sees the flag that the one before left.
#[test]
fn a_client_that_comes_as_the_other_goes_sets_the_flag_again() {
    check(|| {
        let two = Two::new();
        two.first.fault(&two.host, PAGE, false);
        let remover = two.first_lets_go();
        two.second.fault(&two.host, PAGE, false);
        assert!(two.host.table().get(FRAME).unwrap().is_exported(), "I4: the second maps it");
        remover.join().unwrap();
        two.check_books();
    });
}

/// The first has written, the second has only read: the page is dirty whoever is asked last.
#[test]
fn the_harvests_of_two_clients_are_combined() {
    check(|| {
        let two = Two::new();
        two.second.fault(&two.host, PAGE, false);
        two.first.fault(&two.host, PAGE, false);
        let writer = thread::spawn({
            let (host, client) = (two.host.clone(), two.first.clone());
            move || client.touch(&host, PAGE, Some(7)).is_some()
        });
        assert_eq!(two.host.evict(&[FRAME]), 1);
        let written = writer.join().unwrap();
        let copy = two.host.copy(PAGE, 0);
        assert_eq!(copy, if written { 7 } else { 0 }, "I2: a write was lost");
        assert!(!two.host.table().lock(FRAME).flags().contains(PageFlags::DIRTY));
        two.check_books();
    });
}
