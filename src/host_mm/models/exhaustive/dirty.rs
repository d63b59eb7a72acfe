//! The dirty harvest against a write.

use crate::models::client::Client;
use crate::models::exhaustive::FRAME;
use crate::models::host::Host;
use gnomon_export_rmap::Membership;
use gnomon_export_rmap::PageFlags;
use gnomon_export_rmap::explore::{check, thread};
use gnomon_export_rmap::sync::Arc;

const PAGE: usize = 0;
const VALUE: u32 = 7;

/// A page that one client maps, after a read or a write of [`VALUE`].
fn mapped(written: bool) -> (Arc<Host>, Arc<Client>, Membership) {
    let host = Arc::new(Host::new(1, 1));
    let (client, membership) = Client::register(&host, 1, 0);
    client.fault(&host, PAGE, written);
    client.touch(&host, PAGE, written.then_some(VALUE)).unwrap();
    (host, client, membership)
}

fn copy(host: &Host) -> u32 {
    host.copy(PAGE, 0)
}

#[test]
fn a_write_during_an_eviction_faults_or_is_in_the_copy() {
    check(|| {
        let (host, client, _membership) = mapped(false);
        let writer = thread::spawn({
            let (host, client) = (host.clone(), client.clone());
            move || client.touch(&host, PAGE, Some(VALUE)).is_some()
        });
        host.evict(&[FRAME]);
        let written = writer.join().unwrap();
        assert_eq!(copy(&host), if written { VALUE } else { 0 }, "I2: a write was lost");
        host.check_books(&[&client]);
    });
}

#[test]
fn a_write_during_a_cleaning_is_in_the_copy_or_leaves_the_page_dirty() {
    check(|| {
        let (host, client, _membership) = mapped(true);
        let writer = thread::spawn({
            let (host, client) = (host.clone(), client.clone());
            move || {
                while client.touch(&host, PAGE, Some(VALUE + 1)).is_none() {
                    client.fault(&host, PAGE, true);
                }
            }
        });
        host.clean(&[FRAME]);
        writer.join().unwrap();
        let noted = host.table().lock(FRAME).flags().contains(PageFlags::DIRTY);
        let dirty = noted || client.is_dirty(PAGE);
        assert!(dirty || copy(&host) == VALUE + 1, "I2: a write was lost");
        host.check_books(&[&client]);
    });
}

/// A guest's `invlpg` of a dirty SPTE against an eviction: whoever clears the SPTE answers for it.
#[test]
fn a_clients_own_removal_leaves_the_dirty_state_to_the_invalidation() {
    check(|| {
        let (host, client, _membership) = mapped(true);
        let remover = thread::spawn({
            let (host, client) = (host.clone(), client.clone());
            move || client.remove(&host, PAGE)
        });
        assert_eq!(host.evict(&[FRAME]), 1);
        assert_eq!(copy(&host), VALUE, "I2: a write was lost");
        remover.join().unwrap();
        host.check_books(&[&client]);
    });
}
