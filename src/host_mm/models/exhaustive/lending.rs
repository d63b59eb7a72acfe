//! A page that is lent as a copy against a guest that writes it.

use crate::models::client::Client;
use crate::models::host::Host;
use gnomon_export_rmap::addr::Pfn;
use gnomon_export_rmap::explore::{check_bounded, thread};
use gnomon_export_rmap::sync::{Arc, Ordering};
use gnomon_export_rmap::{
    ClientId, ClientLock, ExportNotifier, FlushReason, Gone, Harvest, Invalidation, LockedPage,
    Retain, RevokeError, RmapEntry,
};

const PAGE: usize = 0;
const VALUE: u32 = 7;

/// Holds a copy of the page, and the frame that it came from. Stands in for `peer::session::Session`,
/// whose flush waits until the peer has given up what was dropped.
struct Borrower {
    id: ClientId,
    copy: ClientLock<Option<(Pfn, u32)>>,
}

impl Borrower {
    fn entry(&self) -> RmapEntry {
        RmapEntry::new(self.id, 0)
    }
}

impl ExportNotifier for Borrower {
    fn invalidate_page(&self, page: &LockedPage<'_>, kind: Invalidation) -> Harvest {
        if kind != Invalidation::Clean {
            let mut copy = self.copy.lock();
            page.table().rmap_visit(page.pfn(), self.id, |_| Retain::Drop);
            *copy = None;
        }
        Harvest::default()
    }

    fn age_page(&self, _page: &LockedPage<'_>) -> bool {
        false
    }

    fn flush(&self, _frames: &[Pfn], _reason: FlushReason) -> Result<(), RevokeError> {
        Ok(())
    }
}

/// Whatever the guest has done before: `mapped` says that it may have the right to write already.
fn lend_against_a_write(mapped: bool) {
    // A frame for each of two who want the page at once.
    let host = Arc::new(Host::new(1, 2));
    let reservation = host.notifiers().reserve().unwrap();
    let borrower = Arc::new(Borrower { id: reservation.id(), copy: ClientLock::new(None) });
    let _borrows = reservation.register(borrower.clone());
    let (client, _membership) = Client::register(&host, 1, 0);
    if mapped {
        client.fault(&host, PAGE, true);
    }
    let guest = thread::spawn({
        let (host, client) = (host.clone(), client.clone());
        move || {
            if !mapped {
                client.fault(&host, PAGE, false);
            }
            while client.touch(&host, PAGE, Some(VALUE)).is_none() {
                client.fault(&host, PAGE, true);
            }
        }
    });
    host.lend(PAGE, |page, content| {
        let mut copy = borrower.copy.lock();
        let exported = page.export(&copy, borrower.entry());
        *copy = Some((page.pfn(), content));
        exported.keep();
    });
    // While it is held, nobody takes the copy away, so nobody may write.
    let copy = borrower.copy.lock();
    if let Some((pfn, content)) = *copy {
        let now = host.word(pfn, 0).load(Ordering::Relaxed);
        assert_eq!(now, content, "the page was written while a copy of it was out");
    }
    drop(copy);
    guest.join().unwrap();
    let copy = borrower.copy.lock();
    if let Some((pfn, content)) = *copy {
        assert_eq!(content, VALUE, "the copy is older than a completed write");
        let gone = Gone { pfn, entry: borrower.entry(), dirty: false };
        host.table().give_up_uncached(&copy, &[gone]);
    }
    drop(copy);
    host.check_books(&[&client]);
}

#[test]
fn a_page_is_not_written_while_a_copy_is_out() {
    check_bounded(|| lend_against_a_write(false));
}

#[test]
fn the_right_to_write_goes_before_the_copy_is_made() {
    check_bounded(|| lend_against_a_write(true));
}
