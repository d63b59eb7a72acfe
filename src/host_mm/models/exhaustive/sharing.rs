//! A right that is added to a mapping, against its page becoming one that nobody may write.

use crate::models::client::{Client, WRITABLE};
use crate::models::host::Host;
use gnomon_export_rmap::explore::{check, thread};
use gnomon_export_rmap::sync::Arc;

const PAGE: usize = 0;

/// The page is mapped for reading. A write fault has looked at it and is about to add the right, which
/// it does not start over for, while the host makes the page read-only by `protect`.
fn upgrade_against(protect: impl Fn(&Host) + Copy + Send + Sync + 'static) {
    check(move || {
        let host = Arc::new(Host::new(1, 1));
        let (client, _membership) = Client::register(&host, 1, 0);
        let token = host.lock_page(PAGE).sequence();
        assert!(client.install_with(host.table(), PAGE, false, token, 0));
        let protecting = thread::spawn({
            let host = host.clone();
            move || protect(&host)
        });
        let page = host.lock_page(PAGE);
        let (read_only, token) = (page.is_read_only(), page.sequence());
        drop(page);
        if !read_only {
            client.install_with(host.table(), PAGE, true, token, WRITABLE);
        }
        protecting.join().unwrap();
        assert!(host.lock_page(PAGE).is_read_only());
        assert!(!client.may_write(PAGE), "a page that nobody may write can be written");
        host.check_books(&[&client]);
    });
}

#[test]
fn the_right_to_write_is_not_added_once_the_page_is_shared() {
    upgrade_against(|host| host.share(PAGE));
}

#[test]
fn the_right_to_write_is_not_added_once_a_copy_is_out() {
    upgrade_against(|host| host.lend(PAGE, |_, _| ()));
}
