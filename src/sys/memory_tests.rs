use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, VolatileMemory};

use super::*;
use crate::small_pages;

fn shared(pages: usize) -> (File, MmapRegion) {
    let bytes = pages * PAGE_SIZE;
    let file = create_memfd("gnomon-test", bytes as u64).unwrap();
    let region = small_pages::map(file.try_clone().unwrap(), bytes as u64).unwrap();
    (file, region)
}

/// Fills each page with its own number, through the mapping.
fn touch_all(region: &MmapRegion) {
    let slice = region.as_volatile_slice();
    for page in 0..region.size() / PAGE_SIZE {
        slice.write_obj(page as u64 + 1, page * PAGE_SIZE).unwrap();
    }
}

/// Which pages this process's page tables map, from /proc/self/pagemap (bit 63: present).
fn mapped(region: &MmapRegion) -> Vec<bool> {
    let pages = region.size() / PAGE_SIZE;
    let mut entries = vec![0u8; pages * 8];
    let first = region.as_ptr() as u64 / PAGE_SIZE as u64;
    File::open("/proc/self/pagemap").unwrap().read_exact_at(&mut entries, first * 8).unwrap();
    entries.chunks_exact(8).map(|entry| entry[7] & 0x80 != 0).collect()
}

#[test]
fn discard_unmaps_exactly_the_range_and_keeps_content() {
    let (_file, region) = shared(8);
    touch_all(&region);
    assert_eq!(mapped(&region), [true; 8]);
    discard(&region, 2 * PAGE_SIZE, 3 * PAGE_SIZE).unwrap();
    assert_eq!(mapped(&region), [true, true, false, false, false, true, true, true]);
    for page in 0..8 {
        let number: u64 = region.as_volatile_slice().read_obj(page * PAGE_SIZE).unwrap();
        assert_eq!(number, page as u64 + 1);
    }
}

#[test]
fn discard_refuses_what_is_not_inside_and_whole() {
    let (_file, region) = shared(4);
    let bad = [
        (5 * PAGE_SIZE, 0),
        (3 * PAGE_SIZE, 2 * PAGE_SIZE),
        (usize::MAX - PAGE_SIZE + 1, PAGE_SIZE),
        (1, PAGE_SIZE),
        (0, 1),
    ];
    touch_all(&region);
    for (offset, len) in bad {
        let one = discard(&region, offset, len).unwrap_err();
        assert_eq!(one.kind(), io::ErrorKind::InvalidInput, "{offset:#x}+{len:#x}");
        let many = discard_scattered(
            &region,
            &[(0, PAGE_SIZE), (offset, len)],
            &ProcessMadvise::unsupported(),
        );
        assert_eq!(many.unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
    assert_eq!(mapped(&region), [true; 4], "checked before the first range is dropped");
    discard(&region, 4 * PAGE_SIZE, 0).unwrap();
}

#[test]
fn discard_refuses_private_memory() {
    let private = MmapRegion::new(PAGE_SIZE).unwrap();
    private.as_volatile_slice().write_obj(7u8, 0).unwrap();
    assert!(discard(&private, 0, PAGE_SIZE).is_err());
    assert!(discard_scattered(&private, &[(0, PAGE_SIZE)], &ProcessMadvise::probe()).is_err());
    assert_eq!(private.as_volatile_slice().read_obj::<u8>(0).unwrap(), 7);
}

fn scattered_drops_every_listed_page_and_no_other(support: &ProcessMadvise) {
    // 1300 separate ranges: three calls, the last not full.
    const PAGES: usize = 2600;
    let (_file, region) = shared(PAGES);
    touch_all(&region);
    let ranges: Vec<_> = (0..PAGES).step_by(2).map(|page| (page * PAGE_SIZE, PAGE_SIZE)).collect();
    discard_scattered(&region, &ranges, support).unwrap();
    for (page, present) in mapped(&region).into_iter().enumerate() {
        assert_eq!(present, page % 2 == 1, "page {page}");
    }
    // Neighbours, an empty range, and order that is not ascending.
    touch_all(&region);
    let ranges =
        [(9, 1), (3, 2), (5, 1), (7, 0), (0, 1)].map(|(page, n)| (page * PAGE_SIZE, n * PAGE_SIZE));
    discard_scattered(&region, &ranges, support).unwrap();
    let unmapped: Vec<_> =
        mapped(&region).iter().enumerate().filter(|(_, m)| !**m).map(|(page, _)| page).collect();
    assert_eq!(unmapped, [0, 3, 4, 5, 9]);
}

#[test]
fn scattered_with_what_the_kernel_has() {
    scattered_drops_every_listed_page_and_no_other(&ProcessMadvise::probe());
}

#[test]
fn scattered_one_by_one() {
    scattered_drops_every_listed_page_and_no_other(&ProcessMadvise::unsupported());
}

/// A vectored call stops after 2 GiB less a page; the rest must be dropped too.
#[test]
fn scattered_continues_after_a_short_count() {
    const GIB: usize = 1 << 30;
    let (_file, region) = shared(4 * GIB / PAGE_SIZE);
    let slice = region.as_volatile_slice();
    let witnesses =
        [0, GIB, 2 * GIB - 2 * PAGE_SIZE, 2 * GIB + 4 * PAGE_SIZE, 3 * GIB, 4 * GIB - PAGE_SIZE];
    for offset in witnesses {
        slice.write_obj(1u8, offset).unwrap();
    }
    let half = 2 * GIB - 4 * PAGE_SIZE;
    let ranges = [
        (0, GIB),
        (GIB + PAGE_SIZE, half - GIB),
        (half + 8 * PAGE_SIZE, GIB),
        (half + GIB + 12 * PAGE_SIZE, GIB - 8 * PAGE_SIZE),
    ];
    discard_scattered(&region, &ranges, &ProcessMadvise::probe()).unwrap();
    let entry = |offset: usize| {
        let mut raw = [0u8; 8];
        let page = (region.as_ptr() as u64 + offset as u64) / PAGE_SIZE as u64;
        File::open("/proc/self/pagemap").unwrap().read_exact_at(&mut raw, page * 8).unwrap();
        raw[7] & 0x80 != 0
    };
    for offset in witnesses {
        let listed = ranges.iter().any(|&(start, len)| (start..start + len).contains(&offset));
        assert_eq!(entry(offset), !listed, "offset {offset:#x}");
    }
    assert!(
        witnesses.iter().filter(|&&offset| !entry(offset)).count() >= 4,
        "both halves have witnesses"
    );
}

#[test]
fn without_first_stops_inside_a_range() {
    let mut ranges = [(0, 10), (20, 5), (40, 8)];
    assert_eq!(without_first(&mut ranges.clone(), 0), [(0, 10), (20, 5), (40, 8)]);
    assert_eq!(without_first(&mut ranges.clone(), 4), [(4, 6), (20, 5), (40, 8)]);
    assert_eq!(without_first(&mut ranges.clone(), 10), [(20, 5), (40, 8)]);
    assert_eq!(without_first(&mut ranges, 17), [(42, 6)]);
}

#[test]
fn a_hole_frees_memory_and_reads_as_zeros() {
    let (file, region) = shared(8);
    assert_eq!(allocated_bytes(&file).unwrap(), 0);
    touch_all(&region);
    assert_eq!(allocated_bytes(&file).unwrap(), 8 * PAGE_SIZE as u64);
    punch_hole(&file, PAGE_SIZE as u64, 2 * PAGE_SIZE as u64).unwrap();
    assert_eq!(allocated_bytes(&file).unwrap(), 6 * PAGE_SIZE as u64);
    let slice = region.as_volatile_slice();
    assert_eq!(slice.read_obj::<u64>(0).unwrap(), 1);
    assert_eq!(slice.read_obj::<u64>(PAGE_SIZE).unwrap(), 0);
    assert_eq!(slice.read_obj::<u64>(3 * PAGE_SIZE).unwrap(), 4);
    assert_eq!(punch_hole(&file, 0, 0).unwrap_err().raw_os_error(), Some(libc::EINVAL));
    assert_eq!(punch_hole(&file, u64::MAX, 1).unwrap_err().raw_os_error(), Some(libc::EINVAL));
}

#[test]
fn a_memfd_keeps_its_size() {
    let (file, _region) = shared(4);
    assert_eq!(file.set_len(PAGE_SIZE as u64).unwrap_err().raw_os_error(), Some(libc::EPERM));
    assert_eq!(file.set_len(64 * PAGE_SIZE as u64).unwrap_err().raw_os_error(), Some(libc::EPERM));
    assert_eq!(file.metadata().unwrap().len(), 4 * PAGE_SIZE as u64);
}

/// Where nothing filters system calls, what the probe finds follows from the kernel's version.
#[test]
fn the_probe_finds_the_vectored_call() {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let filtered = !status.lines().any(|line| line.split_whitespace().eq(["Seccomp:", "0"]));
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers =
        release.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap(), numbers.next().unwrap());
    if version >= (6, 13) && !filtered {
        assert!(ProcessMadvise::probe().is_supported(), "Linux {release}");
    } else if version < (5, 10) {
        assert!(!ProcessMadvise::probe().is_supported(), "Linux {release}");
    }
    assert!(!ProcessMadvise::unsupported().is_supported());
}

#[test]
fn what_was_touched_is_copied_and_the_rest_takes_no_memory() {
    const PAGES: usize = 1000;
    let ((from_file, from), (to_file, to)) = (shared(PAGES), shared(PAGES));
    for page in [0, 1, 7, PAGES - 1] {
        from.as_volatile_slice().write_slice(&[9; 5], page * PAGE_SIZE + 100).unwrap();
    }
    copy_touched(&from, &to).unwrap();
    let taken = allocated_bytes(&to_file).unwrap();
    assert_eq!(taken, allocated_bytes(&from_file).unwrap());
    assert!(taken < (PAGES * PAGE_SIZE / 2) as u64);
    for page in [0, 1, 2, 7, 8, PAGES - 1] {
        let mut found = [0; 5];
        to.as_volatile_slice().read_slice(&mut found, page * PAGE_SIZE + 100).unwrap();
        let expected = if [2, 8].contains(&page) { 0 } else { 9 };
        assert_eq!(found, [expected; 5], "page {page}");
    }
    let other_size = copy_touched(&from, &shared(1).1).unwrap_err();
    assert_eq!(other_size.kind(), io::ErrorKind::InvalidInput);
    let no_file = MmapRegion::new(PAGES * PAGE_SIZE).unwrap();
    assert!(copy_touched(&no_file, &to).is_err());
}
