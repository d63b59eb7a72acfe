//! The notifier list: a walk against `register` and `unregister`.

use crate::addr::Pfn;
use crate::explore::{check, check_bounded, thread};
use crate::models::FRAME;
use crate::sync::{Arc, AtomicU32, Ordering};
use crate::{
    ExportNotifier, FlushReason, Harvest, Invalidation, LockedPage, NotifierList, RevokeError,
};

/// Counts its calls, and asserts in each that it is still registered.
struct Receiver {
    unregistered: AtomicU32,
    calls: AtomicU32,
}

impl Receiver {
    fn new() -> Arc<Self> {
        Arc::new(Self { unregistered: AtomicU32::new(0), calls: AtomicU32::new(0) })
    }

    fn calls(&self) -> u32 {
        self.calls.load(Ordering::Relaxed)
    }
}

impl ExportNotifier for Receiver {
    fn invalidate_page(&self, _page: &LockedPage<'_>, _kind: Invalidation) -> Harvest {
        Harvest::default()
    }

    fn age_page(&self, _page: &LockedPage<'_>) -> bool {
        false
    }

    fn flush(&self, _frames: &[Pfn], _reason: FlushReason) -> Result<(), RevokeError> {
        let unregistered = self.unregistered.load(Ordering::Relaxed) == 1;
        assert!(!unregistered, "I7: called after unregister had returned");
        self.calls.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

fn walk(list: &NotifierList) {
    list.flush(&[FRAME], FlushReason::Invalidated).unwrap();
}

#[test]
fn no_call_reaches_a_notifier_after_unregister_has_returned() {
    check(|| {
        let list = Arc::new(NotifierList::default());
        let receiver = Receiver::new();
        let membership = list.register(receiver.clone()).unwrap();
        let walkers = list.clone();
        let walker = thread::spawn(move || walk(&walkers));
        drop(membership);
        receiver.unregistered.store(1, Ordering::Relaxed);
        walker.join().unwrap();
    });
}

#[test]
fn a_walk_misses_nobody_who_stays_while_others_come_and_go() {
    check_bounded(|| {
        let list = Arc::new(NotifierList::default());
        let (stays, goes, comes) = (Receiver::new(), Receiver::new(), Receiver::new());
        let _stays = list.register(stays.clone()).unwrap();
        let going = list.register(goes.clone()).unwrap();
        let has_come = Arc::new(AtomicU32::new(0));

        let registrar = thread::spawn({
            let (list, comes, has_come) = (list.clone(), comes.clone(), has_come.clone());
            move || {
                let membership = list.register(comes).unwrap();
                has_come.store(1, Ordering::Release);
                membership
            }
        });
        let walker = thread::spawn({
            let (list, comes, has_come) = (list.clone(), comes.clone(), has_come.clone());
            move || {
                let must_find = has_come.load(Ordering::Acquire) == 1;
                walk(&list);
                assert!(!must_find || comes.calls() == 1, "a registered notifier was missed");
            }
        });
        drop(going);
        goes.unregistered.store(1, Ordering::Relaxed);
        walker.join().unwrap();
        let _comes = registrar.join().unwrap();
        assert_eq!(stays.calls(), 1, "who stays is called once in a walk");

        // Neither writer undid what the other did.
        walk(&list);
        assert_eq!(stays.calls(), 2);
        assert!((1..=2).contains(&comes.calls()), "the walk after register missed it");
    });
}
