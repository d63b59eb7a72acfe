//! Each fault by itself: what it does to the call that it strikes, and that it is survived.

use std::io::{self, ErrorKind};
use std::num::NonZeroU64;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use nix::errno::Errno;

use crate::hooks::{EINTR, FRAME_ENOMEM, SHORT_WRITE, SWAP_FULL, SWAP_READ, SWAP_WRITE};
use crate::swap::injecting::InjectingFile;
use crate::swap::{SwapConfig, SwapError, SwapOp};
use crate::{HostFault, Injection, InjectionPlan, When};
use crate::{HostMm, HostMmConfig, MIN_HOST_MEMORY_BYTES, MemoryObject, MmError};
use gnomon_export_rmap::addr::{Gfn, PAGE_SIZE, PAGE_SIZE_U64, Pfn};
use gnomon_export_rmap::lab::Lab;

fn once(number: u64) -> When {
    When::Once(NonZeroU64::new(number).unwrap())
}

fn from(number: u64) -> When {
    When::Every { first: NonZeroU64::new(number).unwrap(), step: NonZeroU64::MIN }
}

fn plan(items: &[(HostFault, When)]) -> InjectionPlan {
    let items = items.iter().map(|&(fault, when)| Injection { fault, when }).collect();
    InjectionPlan { items, seed: 5, ..InjectionPlan::default() }
}

/// An object of so many pages, with swap in a file.
fn object(items: &[(HostFault, When)], pages: u64) -> Arc<MemoryObject> {
    let mm = HostMm::new(HostMmConfig {
        swap: SwapConfig { path: None, dir: None, bytes: 64 << 20 },
        inject: plan(items),
        check_evictions: true,
        ..HostMmConfig::new(MIN_HOST_MEMORY_BYTES)
    });
    mm.unwrap().create_object(pages * PAGE_SIZE_U64).unwrap()
}

fn page(seed: u64) -> [u8; PAGE_SIZE] {
    let mut page = [0; PAGE_SIZE];
    for (index, byte) in page.iter_mut().enumerate() {
        *byte = u8::try_from((seed * 31 + index as u64 * 7) % 251).unwrap() | 1;
    }
    page
}

fn write(object: &MemoryObject, number: u64, seed: u64) {
    object.write(Gfn::new(number).base(), &page(seed)).unwrap();
}

fn read(object: &MemoryObject, number: u64) -> Result<[u8; PAGE_SIZE], MmError> {
    let mut found = [0; PAGE_SIZE];
    object.read(Gfn::new(number).base(), &mut found).map(|()| found)
}

fn evict_all(object: &MemoryObject) -> Result<usize, MmError> {
    let mm = object.host_mm();
    let frames: Vec<Pfn> = (0..mm.frame_count()).map(Pfn::new).collect();
    mm.evict_frames(&frames)
}

fn counts(object: &MemoryObject) -> Vec<(u64, u64)> {
    object.host_mm().lab().injected().iter().map(|count| (count.calls, count.struck)).collect()
}

#[test]
fn nothing_is_injected_without_an_item() {
    assert!(!Lab::new(None, &plan(&[])).is_on());
    let object = object(&[], 4);
    write(&object, 0, 1);
    assert_eq!(evict_all(&object).unwrap(), 1);
    assert!(object.host_mm().lab().injected().is_empty());
}

#[test]
fn a_write_that_fails_once_is_repeated_by_reclaim() {
    let object = object(&[(SWAP_WRITE.failing(Errno::EIO), once(2))], 4);
    (0..3).for_each(|number| write(&object, number, number + 1));
    let error = evict_all(&object).unwrap_err();
    assert!(
        matches!(&error, MmError::Swap(SwapError::Io { op: SwapOp::Write, source, .. })
            if source.raw_os_error() == Some(libc::EIO)),
        "{error}"
    );
    assert_eq!(object.audit(&object.host_mm().quiet()).in_frames, 1, "the struck page stayed");
    assert_eq!(evict_all(&object).unwrap(), 1);
    assert_eq!(counts(&object), [(4, 1)]);
    for number in 0..3 {
        assert!(read(&object, number).unwrap() == page(number + 1));
    }
}

#[test]
fn a_disk_that_is_full_has_its_own_sentence() {
    let object = object(&[(SWAP_WRITE.failing(Errno::ENOSPC), When::ALWAYS)], 4);
    write(&object, 0, 1);
    let said = evict_all(&object).unwrap_err().to_string();
    assert!(said.contains("file system of the swap file is full"), "{said}");
    assert!(read(&object, 0).unwrap() == page(1));
}

#[test]
fn a_read_that_fails_once_is_repeated_at_once_and_one_that_goes_on_failing_is_not() {
    let object = object(
        &[(SWAP_READ.failing(Errno::ENOMEM), once(1)), (SWAP_READ.failing(Errno::EIO), from(4))],
        4,
    );
    (0..2).for_each(|number| write(&object, number, number + 1));
    evict_all(&object).unwrap();
    assert!(read(&object, 0).unwrap() == page(1));
    assert_eq!(counts(&object), [(2, 1), (2, 0)]);
    evict_all(&object).unwrap();
    assert!(read(&object, 0).unwrap() == page(1), "the third read");
    let error = read(&object, 1).unwrap_err();
    assert!(matches!(error, MmError::Swap(SwapError::Io { op: SwapOp::Read, .. })), "{error}");
    assert_eq!(counts(&object), [(6, 1), (6, 3)], "three attempts");
    object.host_mm().lab().end_injection();
    let audit = object.audit(&object.host_mm().quiet());
    assert_eq!((audit.in_frames, audit.in_swap, audit.lost), (1, 1, 0));
    assert!(read(&object, 1).unwrap() == page(2), "the disk is mended");
    assert_eq!(counts(&object), [(6, 1), (6, 3)], "and nothing is counted any more");
}

#[test]
fn an_audit_names_the_page_that_cannot_be_read() {
    let object = object(&[(SWAP_READ.failing(Errno::EIO), When::ALWAYS)], 4);
    write(&object, 3, 1);
    evict_all(&object).unwrap();
    let audit = object.audit(&object.host_mm().quiet());
    assert_eq!((audit.in_frames, audit.in_swap, audit.lost), (0, 0, 1));
    assert_eq!(audit.first_lost[0].0, Gfn::new(3));
}

#[test]
fn swap_that_says_that_it_is_full_leaves_pages_in_their_frames() {
    let object = object(&[(SWAP_FULL.plain(), from(3))], 8);
    (0..4).for_each(|number| write(&object, number, number + 1));
    let error = evict_all(&object).unwrap_err();
    assert!(matches!(error, MmError::Swap(SwapError::Full { .. })), "{error}");
    let audit = object.audit(&object.host_mm().quiet());
    assert_eq!((audit.in_frames, audit.in_swap), (2, 2));
    for number in 0..4 {
        assert!(read(&object, number).unwrap() == page(number + 1));
    }
}

#[test]
fn a_write_is_finished_after_it_was_cut_short() {
    let object = object(&[(SHORT_WRITE.plain(), once(1))], 4);
    write(&object, 0, 1);
    evict_all(&object).unwrap();
    assert_eq!(counts(&object), [(2, 1)], "one system call more");
    assert!(read(&object, 0).unwrap() == page(1));
}

#[test]
fn interrupted_calls_are_repeated() {
    let object = object(&[(EINTR.plain(), When::Chance(0.5))], 64);
    let view = object.host_mm().map_guest_view().unwrap();
    for round in 0..10 {
        (0..64).for_each(|number| write(&object, number, round * 100 + number));
        evict_all(&object).unwrap();
        view.revoke(&[Pfn::new(1), Pfn::new(7)]).unwrap();
        for number in 0..64 {
            assert!(read(&object, number).unwrap() == page(round * 100 + number));
        }
    }
    let [(calls, struck)] = counts(&object)[..] else { panic!("one item") };
    assert!(struck > calls / 3 && calls - struck == 64 * 10 * 2 + 10, "{struck} of {calls}");
}

/// A caller that takes one call for all, as `eintr` and `short-write` exist to catch.
#[test]
fn a_caller_that_does_not_go_on_is_caught() {
    let lab = Lab::new(
        None,
        &plan(&[(SHORT_WRITE.plain(), once(1)), (EINTR.plain(), When::Chance(0.9))]),
    );
    let file = InjectingFile::new(tempfile::tempfile().unwrap(), lab);
    let mut results: Vec<io::Result<usize>> = Vec::new();
    for _ in 0..20 {
        results.push(file.write_at(&page(1), 0));
        results.push(file.read_at(&mut page(0), 0));
    }
    let interrupted = |result: &&io::Result<usize>| {
        result.as_ref().is_err_and(|error| error.kind() == ErrorKind::Interrupted)
    };
    assert!(results.iter().filter(interrupted).count() > 20, "{results:?}");
    let lab = Lab::new(None, &plan(&[(SHORT_WRITE.plain(), once(1))]));
    let file = InjectingFile::new(tempfile::tempfile().unwrap(), lab);
    let written = file.write_at(&page(1), 0).unwrap();
    assert!(written > 0 && written < PAGE_SIZE, "{written}");
    file.write_all_at(&page(1)[written..], written as u64).unwrap();
    let mut found = [0; PAGE_SIZE];
    file.read_exact_at(&mut found, 0).unwrap();
    assert!(found == page(1));
}

#[test]
fn frames_that_cannot_be_had_are_asked_for_again() {
    let object = object(&[(FRAME_ENOMEM.plain(), When::Chance(0.3))], 64);
    for round in 0..5 {
        (0..64).for_each(|number| write(&object, number, round * 100 + number));
        evict_all(&object).unwrap();
        for number in 0..64 {
            assert!(read(&object, number).unwrap() == page(round * 100 + number));
        }
        evict_all(&object).unwrap();
    }
    let [(calls, struck)] = counts(&object)[..] else { panic!("one item") };
    assert!(struck > calls / 6 && calls - struck >= 5 * 128, "{struck} of {calls}");
    let mm = object.host_mm().clone();
    drop(object);
    assert_eq!(mm.stats().frames_in_use, 0, "none was lost");
}

#[cfg(feature = "export-notifier")]
#[test]
fn a_slow_client_is_slow_and_otherwise_itself() {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;

    use gnomon_export_rmap::{ExportNotifier, FlushReason, Harvest, Invalidation, LockedPage};
    use gnomon_export_rmap::{RevokeError, RmapEntry};

    struct Client(AtomicBool);
    impl ExportNotifier for Client {
        fn invalidate_page(&self, page: &LockedPage<'_>, _: Invalidation) -> Harvest {
            let id = gnomon_export_rmap::ClientId::new(0).unwrap();
            assert!(gnomon_export_rmap::bare_entries::remove_entry(
                page.table(),
                page.pfn(),
                RmapEntry::new(id, 0)
            ));
            Harvest { dirty: true, accessed: true }
        }
        fn age_page(&self, _: &LockedPage<'_>) -> bool {
            false
        }
        fn flush(&self, _: &[Pfn], _: FlushReason) -> Result<(), RevokeError> {
            self.0.store(true, Ordering::Relaxed);
            Ok(())
        }
    }

    let slow = Duration::from_millis(30);
    let object = object(&[(crate::hooks::SLOW_NOTIFIER.lasting(slow), When::ALWAYS)], 4);
    let mm = object.host_mm();
    let client = Arc::new(Client(AtomicBool::new(false)));
    let registration = mm.register_client(mm.reserve_client().unwrap(), client.clone());
    write(&object, 0, 1);
    let pfn = object.try_lock_resident(Gfn::new(0)).unwrap().pfn();
    gnomon_export_rmap::bare_entries::add_entry(
        mm.frame_table(),
        pfn,
        RmapEntry::new(registration.id(), 0),
    );
    let begin = std::time::Instant::now();
    assert_eq!(evict_all(&object).unwrap(), 1);
    assert!(begin.elapsed() >= slow * 2, "{:?}", begin.elapsed());
    assert!(client.0.load(Ordering::Relaxed), "the calls reached it");
    assert_eq!(counts(&object), [(2, 2)], "one invalidation, one flush");
    assert!(read(&object, 0).unwrap() == page(1));
    drop(registration);
}

#[test]
fn items_of_one_kind_count_the_same_calls() {
    let object = object(
        &[(SWAP_WRITE.failing(Errno::EIO), once(1)), (SWAP_WRITE.failing(Errno::ENOSPC), once(2))],
        4,
    );
    write(&object, 0, 1);
    assert!(evict_all(&object).unwrap_err().to_string().contains("Input/output error"));
    assert!(evict_all(&object).unwrap_err().to_string().contains("No space left"));
    assert_eq!(evict_all(&object).unwrap(), 1);
    assert_eq!(counts(&object), [(3, 1), (3, 1)]);
}
