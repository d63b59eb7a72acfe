//! The page lock: exclusion, visibility of what was done under it, and no lost wake-up.

use crate::FrameTable;
use crate::explore::{check_bounded, thread};
use crate::models::FRAME;
use crate::sync::{Arc, AtomicU32, Ordering};

struct Protected {
    table: FrameTable,
    inside: AtomicU32,
    /// Read and written apart, so that a holder who does not see the one before loses a count.
    entries: AtomicU32,
}

impl Protected {
    fn enter(&self) {
        let _page = self.table.lock(FRAME);
        assert_eq!(self.inside.fetch_add(1, Ordering::Relaxed), 0, "two holders at once");
        let entries = self.entries.load(Ordering::Relaxed);
        self.entries.store(entries + 1, Ordering::Relaxed);
        self.inside.fetch_sub(1, Ordering::Relaxed);
    }
}

#[test]
fn the_page_lock_excludes_and_wakes() {
    check_bounded(|| {
        let page = Arc::new(Protected {
            table: FrameTable::new(1),
            inside: AtomicU32::new(0),
            entries: AtomicU32::new(0),
        });
        let threads: Vec<_> = (0..2)
            .map(|_| {
                let page = page.clone();
                thread::spawn(move || page.enter())
            })
            .collect();
        page.enter();
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(page.entries.load(Ordering::Relaxed), 3, "a holder did not see the one before");
    });
}
