//! The whole protocol at once, under shuttle: two guests that fault, read, write and unmap, two
//! reclaimers and a client that comes and goes, over several pages that all of them share and too
//! few frames. The oracle is that of the test guest: a page says which page it is and which version
//! its writer left in it.

use crate::models::client::Client;
use crate::models::host::{Host, WORDS};
use gnomon_export_rmap::Membership;
use gnomon_export_rmap::addr::Pfn;
use gnomon_export_rmap::explore::rand::{Rng, thread_rng};
use gnomon_export_rmap::explore::scheduler::{PctScheduler, RandomScheduler};
use gnomon_export_rmap::explore::{check, thread};
use gnomon_export_rmap::sync::{Arc, Ordering};

const PAGES: usize = 4;
const FRAMES: u32 = 3;
const GUEST_STEPS: u32 = 8;
const RECLAIM_ROUNDS: u32 = 4;
const VISITS: u32 = 2;
/// Schedules of each of the two tests: half a minute on a busy machine.
const SCHEDULES: usize = 10_000;
/// Of the search with priorities: how many times it lets a thread overtake at the worst moment.
const PCT_DEPTH: usize = 4;

impl Client {
    /// Unregisters; from here on any call is a violation of I7.
    fn unregister(&self, membership: Membership) {
        drop(membership);
        self.unregistered.store(1, Ordering::Relaxed);
    }
}

/// What a guest leaves in its word of a page.
fn stamp(page: usize, version: u32) -> u32 {
    (u32::try_from(page + 1).unwrap() << 16) | version
}

/// The versions of the pages in one word, as their writer or a reader knows them.
struct Ledger([u32; PAGES]);

impl Ledger {
    /// A read by the writer itself: nobody else may have changed the word.
    fn check_own(&self, page: usize, found: u32) {
        let expected = if self.0[page] == 0 { 0 } else { stamp(page, self.0[page]) };
        assert_eq!(found, expected, "I1, I2: page {page} is not as its writer left it");
    }

    /// A read by someone else: the right page, and never older than what was seen before.
    fn check_foreign(&mut self, page: usize, found: u32) {
        let version = found & 0xffff;
        assert!(found == 0 || found == stamp(page, version), "I1: another page's content");
        assert!(version >= self.0[page], "I1: page {page} went back in time");
        self.0[page] = version;
    }
}

/// A guest's instruction, as often as it takes.
fn access(host: &Host, client: &Client, page: usize, write: Option<u32>) -> u32 {
    loop {
        if let Some(found) = client.touch(host, page, write) {
            return found;
        }
        client.fault(host, page, write.is_some());
    }
}

/// A guest with its word of every page.
fn guest(host: &Host, client: &Client) {
    let mut ledger = Ledger([0; PAGES]);
    for step in 1..=GUEST_STEPS {
        let page = thread_rng().gen_range(0..PAGES);
        match thread_rng().gen_range(0..5) {
            0 => client.remove(host, page),
            1 | 2 => {
                access(host, client, page, Some(stamp(page, step)));
                ledger.0[page] = step;
            }
            _ => ledger.check_own(page, access(host, client, page, None)),
        }
    }
    for page in 0..PAGES {
        ledger.check_own(page, access(host, client, page, None));
    }
}

/// Evicts and cleans batches of frames.
fn reclaim(host: &Host) {
    for _ in 0..RECLAIM_ROUNDS {
        let batch: Vec<Pfn> =
            (0..FRAMES).filter(|_| thread_rng().gen_bool(0.5)).map(Pfn::new).collect();
        if thread_rng().gen_bool(0.3) {
            host.clean(&batch);
        } else {
            host.evict(&batch);
        }
    }
}

/// A client that registers, looks at some pages of the first guest, gives them up and leaves.
fn visitor(host: &Host) {
    let mut ledger = Ledger([0; PAGES]);
    for _ in 0..VISITS {
        let (client, membership) = Client::register(host, PAGES, 0);
        for _ in 0..2 {
            let page = thread_rng().gen_range(0..PAGES);
            ledger.check_foreign(page, access(host, &client, page, None));
        }
        for page in 0..PAGES {
            client.remove(host, page);
        }
        client.unregister(membership);
    }
}

fn run() {
    let host = Arc::new(Host::new(PAGES, FRAMES));
    let mut clients = Vec::new();
    let mut threads = Vec::new();
    for word in 0..WORDS {
        let (client, membership) = Client::register(&host, PAGES, word);
        clients.push((client.clone(), membership));
        let host = host.clone();
        threads.push(thread::spawn(move || guest(&host, &client)));
    }
    let works: [fn(&Host); 3] = [reclaim, reclaim, visitor];
    for work in works {
        let host = host.clone();
        threads.push(thread::spawn(move || work(&host)));
    }
    for thread in threads {
        thread.join().unwrap();
    }
    let clients: Vec<&Client> = clients.iter().map(|(client, _)| &**client).collect();
    host.check_books(&clients);
}

#[test]
fn two_guests_two_reclaimers_and_a_visitor_lose_nothing_in_random_schedules() {
    check(RandomScheduler::new(SCHEDULES), run);
}

#[test]
fn two_guests_two_reclaimers_and_a_visitor_lose_nothing_with_a_few_late_threads() {
    check(PctScheduler::new(PCT_DEPTH, SCHEDULES), run);
}
