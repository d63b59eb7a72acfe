//! Faults that the history of such protocols taught, each brought about step by step: once with the
//! rule that keeps it away, once without, to show that the test would notice.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use super::client::Page;
use super::rig::{FRAMES, Rig, config, gfn, page};
use crate::MemoryObject;
use gnomon_export_rmap::addr::{PAGE_SIZE, Pfn};
use gnomon_export_rmap::pausing_client::PausingClient;
use gnomon_export_rmap::sync::lock;

const ZEROS: Page = [0; PAGE_SIZE];
/// Long enough for a fault on any machine.
const GIVE_UP: Duration = Duration::from_secs(60);
/// Long enough for a fault that nothing holds up, on most machines.
const BRIEFLY: Duration = Duration::from_millis(200);

/// Whether the fault looks at the sequence before it installs.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    AsItShould,
    InstallsLate,
}

impl Fault {
    fn of(self, rig: Rig) -> Rig {
        rig.client.installs_late.store(self == Self::InstallsLate, Ordering::Relaxed);
        rig
    }
}

/// A page of the object's in frame `pfn`, of which there is one free.
fn fill_frame(object: &MemoryObject, pfn: Pfn, number: u64) {
    let mut content = ZEROS;
    object.read(gfn(number).base(), &mut content).unwrap();
    assert!(content == page(number), "it comes back from swap");
    let frame = object.try_lock_resident(gfn(number)).map(|page| page.pfn());
    assert_eq!(frame, Some(pfn), "there was no other free frame");
}

/// A rig whose every frame is in use, page 0 among them, and whose last page is in swap.
fn full(fault: Fault) -> (Rig, u64) {
    let last = FRAMES;
    let rig = fault.of(Rig::new(config(), FRAMES + 1));
    rig.host_write(gfn(last), &page(last));
    rig.evict(gfn(last));
    for number in 0..FRAMES {
        rig.host_write(gfn(number), &page(number));
    }
    (rig, last)
}

/// A fault that looked its page up before an invalidation installs after its end, when the frame has
/// another page's content. Returns what it read.
fn late_fault(fault: Fault) -> Page {
    let (rig, last) = full(fault);
    let pfn = rig.frame(gfn(0)).unwrap();
    let (mm, object) = (rig.mm.clone(), rig.object.clone());
    rig.client.overtake_next_fault(move || {
        assert_eq!(mm.evict_frames(&[pfn]).unwrap(), 1);
        fill_frame(&object, pfn, last);
    });
    rig.client.read(0, gfn(0)).unwrap()
}

#[test]
fn a_late_fault_after_the_end_does_not_map_a_reused_frame() {
    assert!(late_fault(Fault::AsItShould) == page(0));
    assert!(late_fault(Fault::InstallsLate) == page(FRAMES), "another page's content");
}

/// The page comes back to the same frame while a fault is under way: whoever compares places finds
/// nothing changed. But it is shared with a clone now. Returns what a write through the mapping that
/// the fault installed left in the clone.
fn page_back_in_its_frame(fault: Fault) -> Page {
    let (rig, _) = full(fault);
    let pfn = rig.frame(gfn(0)).unwrap();
    let (mm, object) = (rig.mm.clone(), rig.object.clone());
    let clone = Arc::new(Mutex::new(None));
    let made = clone.clone();
    rig.client.overtake_next_fault(move || {
        assert_eq!(mm.evict_frames(&[pfn]).unwrap(), 1);
        fill_frame(&object, pfn, 0);
        *lock(&made) = Some(object.share_pages([gfn(0)].into_iter()).unwrap());
    });
    rig.client.write(0, gfn(0), &page(99)).unwrap();
    assert!(rig.client.read(1, gfn(0)).unwrap() == page(99));
    let mut content = ZEROS;
    let clone = lock(&clone).take().unwrap();
    clone.read(gfn(0).base(), &mut content).unwrap();
    content
}

#[test]
fn a_page_that_comes_back_to_its_frame_is_not_taken_for_one_that_stayed() {
    assert!(page_back_in_its_frame(Fault::AsItShould) == page(0));
    assert!(page_back_in_its_frame(Fault::InstallsLate) == page(99), "a write to somebody else's");
}

/// One client writes a page that is shared, or zero, while a fault of another one is about to map the
/// page as it was. Returns what the latter reads after the write.
fn read_beside_the_first_write(fault: Fault, written_before: bool) -> Page {
    let rig = fault.of(Rig::new(config(), 8));
    let clone = written_before.then(|| {
        rig.host_write(gfn(0), &page(0));
        rig.object.copy_on_write_clone().unwrap()
    });
    let other = Rig::with_object_of(&rig);
    let writer = other.client.clone();
    rig.client.overtake_next_fault(move || writer.write(0, gfn(0), &page(99)).unwrap());
    let read = rig.client.read(0, gfn(0)).unwrap();
    drop(clone);
    read
}

#[test]
fn a_shared_page_is_not_mapped_again_after_its_copy_was_given_out() {
    assert!(read_beside_the_first_write(Fault::AsItShould, true) == page(99));
    assert!(read_beside_the_first_write(Fault::InstallsLate, true) == page(0), "before the write");
}

#[test]
fn the_page_of_zeros_is_not_mapped_again_after_the_first_write() {
    assert!(read_beside_the_first_write(Fault::AsItShould, false) == page(99));
    assert!(read_beside_the_first_write(Fault::InstallsLate, false) == ZEROS, "before the write");
}

/// In 2008 `page_mkclean` held a spin lock of the whole file's mappings around the call.
#[test]
fn a_client_that_sleeps_in_a_cleaning_holds_up_that_page_only() {
    let rig = Rig::new(config(), 8);
    for number in 0..4 {
        rig.client.write(0, gfn(number), &page(number)).unwrap();
    }
    let (sleeper, sleep) = PausingClient::new();
    let registration = rig.mm.notifiers().register(sleeper).unwrap();
    let faults = |numbers: [u64; 2]| {
        let (object, client) = (rig.object.clone(), rig.client.clone());
        let (done, is_done) = mpsc::channel();
        let thread = thread::spawn(move || {
            let mut content = ZEROS;
            object.read(gfn(numbers[0]).base(), &mut content).unwrap();
            client.write(2, gfn(numbers[1]), &content).unwrap();
            done.send(()).unwrap();
        });
        (thread, is_done)
    };
    let pfn = rig.frame(gfn(0)).unwrap();
    thread::scope(|scope| {
        let cleaning = scope.spawn(|| rig.mm.clean_frames(&[pfn]));
        sleep.wait();
        // Other pages: mapped and not, an old one and one that needs a frame.
        let (thread, others) = faults([1, 5]);
        others
            .recv_timeout(GIVE_UP)
            .expect("the cleaning of page 0 is no business of pages 1 and 5");
        thread.join().unwrap();
        let (thread, same) = faults([0, 6]);
        assert!(same.recv_timeout(BRIEFLY).is_err(), "its page lock is held");
        sleep.end();
        same.recv_timeout(GIVE_UP).unwrap();
        thread.join().unwrap();
        assert_eq!(cleaning.join().unwrap().unwrap(), 1);
    });
    drop(registration);
    rig.assert_sound();
}
