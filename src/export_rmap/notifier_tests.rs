use super::*;
use crate::{FrameTable, Retain, RmapEntry};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::mpsc;

/// Keeps one mapping a frame and records the calls.
#[derive(Default)]
struct Recorder {
    id: OnceLock<ClientId>,
    calls: AtomicUsize,
    flushed: Mutex<Vec<Pfn>>,
    dirty: bool,
    /// It was not used, at any time.
    unused: bool,
    fails: bool,
}

impl ExportNotifier for Recorder {
    fn invalidate_page(&self, page: &LockedPage<'_>, _kind: Invalidation) -> Harvest {
        self.calls.fetch_add(1, Ordering::Relaxed);
        let id = *self.id.get().unwrap();
        page.table().rmap_visit(page.pfn(), id, |_| Retain::Drop);
        Harvest { dirty: self.dirty, accessed: !self.unused }
    }

    fn age_page(&self, _page: &LockedPage<'_>) -> bool {
        self.calls.fetch_add(1, Ordering::Relaxed);
        !self.unused
    }

    fn flush(&self, frames: &[Pfn], _reason: FlushReason) -> Result<(), RevokeError> {
        self.flushed.lock().unwrap().extend_from_slice(frames);
        if self.fails {
            return Err(RevokeError { frames: frames.len(), source: io::ErrorKind::Other.into() });
        }
        Ok(())
    }
}

fn add(list: &NotifierList, recorder: Recorder) -> (Arc<Recorder>, Membership) {
    let recorder = Arc::new(recorder);
    let registration = list.register(recorder.clone()).unwrap();
    recorder.id.set(registration.id()).unwrap();
    (recorder, registration)
}

const FRAME: Pfn = Pfn::new(0);

#[test]
fn a_frame_that_is_not_exported_is_nobodys_business() {
    let (table, list) = (FrameTable::new(1), NotifierList::default());
    let (recorder, _registration) = add(&list, Recorder::default());
    let page = table.lock(FRAME);
    assert_eq!(list.invalidate_page(&page, Invalidation::Unmap), Harvest::default());
    assert!(!list.age_page(&page));
    assert_eq!(recorder.calls.load(Ordering::Relaxed), 0);
}

#[test]
fn the_flag_stays_until_the_last_of_two_clients_has_let_go() {
    let (table, list) = (FrameTable::new(1), NotifierList::default());
    let (first, first_registration) = add(&list, Recorder::default());
    let (second, second_registration) = add(&list, Recorder { dirty: true, ..Recorder::default() });
    table.rmap_add(FRAME, RmapEntry::new(first_registration.id(), 1));
    table.rmap_add(FRAME, RmapEntry::new(second_registration.id(), 2));

    let page = table.lock(FRAME);
    table.rmap_visit(FRAME, first_registration.id(), |_| Retain::Drop);
    assert!(page.frame().is_exported(), "the mail's receiver would have cleared it here");
    let harvest = list.invalidate_page(&page, Invalidation::Unmap);
    assert!(!page.frame().is_exported());
    assert_eq!(harvest, Harvest { dirty: true, accessed: true });
    assert_eq!(first.calls.load(Ordering::Relaxed), 1);
    assert_eq!(second.calls.load(Ordering::Relaxed), 1);
}

/// Whichever of them was asked last.
#[test]
fn one_clients_answer_is_the_answer_of_all() {
    for used in 0..3 {
        let (table, list) = (FrameTable::new(1), NotifierList::default());
        let clients = [0, 1, 2].map(|number| {
            let unused = number != used;
            add(&list, Recorder { dirty: !unused, unused, ..Recorder::default() })
        });
        for (_, registration) in &clients {
            table.rmap_add(FRAME, RmapEntry::new(registration.id(), 0));
        }
        let page = table.lock(FRAME);
        assert!(list.age_page(&page), "client {used} has used it");
        let harvest = list.invalidate_page(&page, Invalidation::Unmap);
        assert_eq!(harvest, Harvest { dirty: true, accessed: true }, "client {used} has");
        for (client, _) in &clients {
            assert_eq!(client.calls.load(Ordering::Relaxed), 2);
        }
    }
}

#[test]
fn a_flush_is_of_all_frames_for_every_client() {
    let list = NotifierList::default();
    let clients = [0, 1].map(|_| add(&list, Recorder::default()));
    let frames = [5, 0, 7].map(Pfn::new);
    list.flush(&frames, FlushReason::Invalidated).unwrap();
    for (client, _) in &clients {
        assert_eq!(*client.flushed.lock().unwrap(), frames);
    }
}

#[test]
fn one_client_failing_to_flush_does_not_spare_the_others() {
    for failing in 0..3 {
        let list = NotifierList::default();
        let clients = [0, 1, 2]
            .map(|number| add(&list, Recorder { fails: number == failing, ..Recorder::default() }));
        let result = list.flush(&[FRAME], FlushReason::Invalidated);
        assert!(matches!(result, Err(RevokeError { frames: 1, .. })), "client {failing} failed");
        for (client, _) in &clients {
            assert_eq!(*client.flushed.lock().unwrap(), [FRAME]);
        }
    }
}

#[test]
fn an_unregistered_notifier_is_not_called_and_its_number_rests() {
    let list = NotifierList::default();
    let (recorder, registration) = add(&list, Recorder::default());
    let id = registration.id();
    drop(registration);
    list.notify(|_| panic!("called after unregister"));
    assert_eq!(Arc::strong_count(&recorder), 1, "the list kept a reference");
    let (_other, registration) = add(&list, Recorder::default());
    assert_ne!(registration.id(), id);
}

#[test]
fn client_numbers_run_out_with_an_error() {
    let list = NotifierList::default();
    *lock(&list.list.writers) = Numbers::below(1);
    let (_last, last) = add(&list, Recorder::default());
    let refused = list.register(Arc::new(Recorder::default())).map(|_| ());
    assert_eq!(refused, Err(TooManyClients));
    let id = last.id();
    drop(last);
    let (_next, next) = add(&list, Recorder::default());
    assert_eq!(next.id(), id, "all others had been given");
}

/// Sleeps in its call until told to go on.
struct Sleeper {
    entered: mpsc::SyncSender<()>,
    leave: Mutex<mpsc::Receiver<()>>,
    left: AtomicBool,
}

impl ExportNotifier for Sleeper {
    fn invalidate_page(&self, _page: &LockedPage<'_>, _kind: Invalidation) -> Harvest {
        Harvest::default()
    }

    fn age_page(&self, _page: &LockedPage<'_>) -> bool {
        self.entered.send(()).unwrap();
        self.leave.lock().unwrap().recv().unwrap();
        self.left.store(true, Ordering::SeqCst);
        true
    }

    fn flush(&self, _frames: &[Pfn], _reason: FlushReason) -> Result<(), RevokeError> {
        Ok(())
    }
}

/// I7: `unregister` waits for a call that is running, and others go on meanwhile.
#[test]
fn unregister_waits_for_a_running_call_but_register_does_not() {
    let (entered, has_entered) = mpsc::sync_channel(1);
    let (let_go, leave) = mpsc::channel();
    let sleeper =
        Arc::new(Sleeper { entered, leave: Mutex::new(leave), left: AtomicBool::new(false) });
    let list = Arc::new(NotifierList::default());
    let registration = list.register(sleeper.clone()).unwrap();
    let table = Arc::new(FrameTable::new(1));
    table.rmap_add(FRAME, RmapEntry::new(registration.id(), 0));

    let walker = std::thread::spawn({
        let (list, table) = (list.clone(), table.clone());
        move || list.age_page(&table.lock(FRAME))
    });
    has_entered.recv().unwrap();

    let unregistered = Arc::new(AtomicBool::new(false));
    let waiter = std::thread::spawn({
        let (sleeper, unregistered) = (sleeper.clone(), unregistered.clone());
        move || {
            drop(registration);
            unregistered.store(true, Ordering::SeqCst);
            sleeper.left.load(Ordering::SeqCst)
        }
    });
    // The writers' lock is not held while `unregister` waits.
    let (_other, _registration) = add(&list, Recorder::default());
    assert!(!unregistered.load(Ordering::SeqCst), "did not wait for the running call");
    let_go.send(()).unwrap();
    assert!(waiter.join().unwrap(), "unregister returned before the call had left");
    assert!(walker.join().unwrap());
}

/// A client that a walker dropped would end under the walker's page locks, and a memory object that
/// ends with it wants such locks.
#[test]
fn unregister_drops_the_client_though_a_walker_still_has_the_old_list() {
    let (entered, has_entered) = mpsc::sync_channel(1);
    let (let_go, leave) = mpsc::channel();
    let sleeper =
        Arc::new(Sleeper { entered, leave: Mutex::new(leave), left: AtomicBool::new(false) });
    let list = Arc::new(NotifierList::default());
    let registration = list.register(sleeper).unwrap();
    let table = Arc::new(FrameTable::new(1));
    table.rmap_add(FRAME, RmapEntry::new(registration.id(), 0));
    let (second, second_registration) = add(&list, Recorder::default());
    let walker = std::thread::spawn({
        let (list, table) = (list.clone(), table.clone());
        move || list.age_page(&table.lock(FRAME))
    });
    has_entered.recv().unwrap();

    let second = {
        let weak = Arc::downgrade(&second);
        drop(second);
        weak
    };
    assert!(second.upgrade().is_some(), "the list keeps its clients");
    drop(second_registration);
    assert!(second.upgrade().is_none(), "the walker would be the one to drop it");
    let_go.send(()).unwrap();
    assert!(walker.join().unwrap());
}
