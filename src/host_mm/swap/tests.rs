use std::io;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::thread;

use super::*;
use crate::hooks::SWAP_CORRUPT;
use gnomon_export_rmap::lab::InjectionPlan;

fn file(slots: u64) -> FileSwap {
    let config = SwapConfig { path: None, dir: None, bytes: slots * PAGE_SIZE_U64 };
    FileSwap::open(&config).unwrap()
}

fn space(slots: u64) -> SwapSpace {
    SwapSpace::new(Box::new(file(slots)), &Lab::default())
}

/// A page that is different for each `seed`.
fn page(seed: u64) -> [u8; PAGE_SIZE] {
    let mut page = [0; PAGE_SIZE];
    for (i, word) in page.chunks_exact_mut(8).enumerate() {
        let value = (seed << 32 | i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        word.copy_from_slice(&value.to_le_bytes());
    }
    page
}

fn read(space: &SwapSpace, slot: Slot, tag: u64) -> Result<[u8; PAGE_SIZE], SwapError> {
    let mut buffer = [0xee; PAGE_SIZE];
    space.read_page(slot, tag, &mut buffer).map(|()| buffer)
}

#[test]
fn what_was_written_is_read() {
    let space = space(8);
    let slots: Vec<Slot> = (0..8).map(|_| space.alloc().unwrap()).collect();
    assert_eq!(
        slots.iter().map(|slot| slot.as_u32()).collect::<Vec<_>>(),
        [0, 1, 2, 3, 4, 5, 6, 7]
    );
    for (tag, &slot) in (100..).zip(&slots) {
        space.write_page(slot, tag, &page(tag)).unwrap();
    }
    space.write_page(slots[3], 103, &page(9)).unwrap();
    for (tag, &slot) in (100..).zip(&slots) {
        let seed = if tag == 103 { 9 } else { tag };
        assert_eq!(read(&space, slot, tag).unwrap(), page(seed));
        assert_eq!(read(&space, slot, tag).unwrap(), page(seed), "reading does not use it up");
    }
    assert_eq!(space.stats(), SwapStats { slots: 8, used: 8, pages_read: 16, pages_written: 9 });
}

#[test]
fn full_is_full_until_a_slot_is_freed() {
    let space = space(3);
    let slots: Vec<Slot> = std::iter::from_fn(|| space.alloc()).collect();
    assert_eq!((slots.len(), space.used()), (3, 3));
    assert!(matches!(space.try_alloc(), Err(SwapError::Full { slots: 3 })));
    space.free(slots[1]).unwrap();
    assert_eq!(space.alloc(), Some(slots[1]));
    assert_eq!(space.alloc(), None);
}

#[test]
fn no_swap_is_full_from_the_start() {
    let space = space(0);
    assert_eq!((space.alloc(), space.slots(), space.used()), (None, 0, 0));
    assert_eq!(space.alloc_run(5), None);
}

#[test]
fn freeing_twice_is_an_error() {
    let space = space(4);
    let slot = space.alloc().unwrap();
    space.free(slot).unwrap();
    for free in [slot, Slot::new(3).unwrap(), Slot::new(4).unwrap()] {
        assert!(matches!(space.free(free), Err(SwapError::NotInUse { slot }) if slot == free));
    }
    assert_eq!(space.used(), 0);
}

#[test]
fn a_free_slot_is_neither_read_nor_written() {
    let space = space(4);
    let slot = space.alloc().unwrap();
    space.write_page(slot, 1, &page(1)).unwrap();
    space.free(slot).unwrap();
    assert!(matches!(read(&space, slot, 1), Err(SwapError::NotInUse { .. })));
    assert!(matches!(space.write_page(slot, 1, &page(1)), Err(SwapError::NotInUse { .. })));
    let again = space.alloc().unwrap();
    assert_eq!(again, slot);
    let stale = read(&space, again, 1).unwrap_err();
    assert!(matches!(stale, SwapError::Checksum { expected: None, .. }), "{stale}");
}

#[test]
fn another_page_does_not_find_the_content() {
    let space = space(4);
    let slot = space.alloc().unwrap();
    space.write_page(slot, 7, &page(1)).unwrap();
    match read(&space, slot, 8).unwrap_err() {
        SwapError::Checksum { slot: found_slot, owner_tag: 8, expected: Some(expected), found } => {
            assert_eq!(found_slot, slot);
            assert_ne!(expected, found);
        }
        other => panic!("{other}"),
    }
    assert_eq!(read(&space, slot, 7).unwrap(), page(1));
}

/// Writes go to the next slot, as on a disk that mixes up addresses.
struct Misdirecting(FileSwap);

impl SwapBackend for Misdirecting {
    fn read(&self, slot: Slot, page: &mut [u8; PAGE_SIZE]) -> io::Result<()> {
        self.0.read(slot, page)
    }
    fn write(&self, first: Slot, pages: &[u8]) -> io::Result<()> {
        self.0.write(Slot::new(first.as_u32() + 1).unwrap(), pages)
    }
    fn slots(&self) -> u32 {
        self.0.slots() - 1
    }
}

#[test]
fn a_misdirected_write_is_found_at_both_places() {
    let space = SwapSpace::new(Box::new(Misdirecting(file(4))), &Lab::default());
    let (first, second) = (space.alloc().unwrap(), space.alloc().unwrap());
    // The same bytes and owner for both: only the slot number tells them apart.
    space.write_page(second, 1, &page(2)).unwrap();
    space.write_page(first, 1, &page(1)).unwrap();
    assert!(matches!(read(&space, first, 1), Err(SwapError::Checksum { .. })));
    assert!(matches!(read(&space, second, 1), Err(SwapError::Checksum { .. })));
    assert_ne!(checksum::of(first, 1, &page(1)), checksum::of(second, 1, &page(1)));
}

#[test]
fn each_changed_byte_and_bit_is_found() {
    let slot = Slot::new(5).unwrap();
    let good = page(3);
    let sum = checksum::of(slot, 1, &good);
    for place in (0..PAGE_SIZE).step_by(61).chain([PAGE_SIZE - 1]) {
        for bit in 0..8 {
            let mut bad = good;
            bad[place] ^= 1 << bit;
            assert_ne!(checksum::of(slot, 1, &bad), sum, "bit {bit} of byte {place}");
        }
    }
}

#[test]
fn deliberate_corruption_is_found_where_it_was_done_and_nowhere_else() {
    let every = NonZeroU64::new(5).unwrap();
    let space = SwapSpace::new(Box::new(CorruptingBackend::new(file(64), every)), &Lab::default());
    let slots: Vec<Slot> = (0..64).map(|_| space.alloc().unwrap()).collect();
    for (tag, &slot) in (1u64..).zip(&slots) {
        space.write_page(slot, tag, &page(tag)).unwrap();
    }
    for (tag, &slot) in (1u64..).zip(&slots) {
        match read(&space, slot, tag) {
            Ok(content) => assert!(tag % 5 != 0 && content == page(tag), "page {tag}"),
            Err(SwapError::Checksum { .. }) => assert_eq!(tag % 5, 0, "page {tag}"),
            Err(other) => panic!("{other}"),
        }
    }
}

#[test]
fn the_sabotaged_swap_corrupts() {
    let config = SwapConfig { path: None, dir: None, bytes: 1 << 20 };
    for corrupt in [false, true] {
        let lab = Lab::new(corrupt.then_some(SWAP_CORRUPT), &InjectionPlan::default());
        let space = SwapSpace::open(&config, &lab).unwrap();
        let bad = (0..64)
            .filter(|&tag| {
                let slot = space.alloc().unwrap();
                space.write_page(slot, tag, &page(tag)).unwrap();
                read(&space, slot, tag).is_err()
            })
            .count();
        assert_eq!(bad, if corrupt { 4 } else { 0 });
    }
}

#[test]
fn a_failed_write_keeps_its_errno_and_leaves_nothing_readable() {
    for (errno, no_space) in [(libc::EIO, false), (libc::ENOSPC, true), (libc::EDQUOT, true)] {
        let space =
            SwapSpace::new(Box::new(FailingBackend::new(file(4), 1, errno)), &Lab::default());
        let slot = space.alloc().unwrap();
        space.write_page(slot, 1, &page(1)).unwrap();
        match space.write_page(slot, 1, &page(2)).unwrap_err() {
            SwapError::NoSpace { slot: at, source } => {
                assert!(no_space);
                assert_eq!((at, source.raw_os_error()), (slot, Some(errno)));
            }
            SwapError::Io { op: SwapOp::Write, slot: at, source } => {
                assert!(!no_space);
                assert_eq!((at, source.raw_os_error()), (slot, Some(errno)));
            }
            other => panic!("{other}"),
        }
        match read(&space, slot, 1).unwrap_err() {
            SwapError::Io { op: SwapOp::Read, source, .. } => {
                assert_eq!(source.raw_os_error(), Some(errno));
            }
            other => panic!("{other}"),
        }
        assert_eq!((space.used(), space.stats().pages_written), (1, 1));
        space.free(slot).unwrap();
    }
}

/// Fails the second write half-way, and works again afterwards.
struct TearsOnce(FileSwap, AtomicU32);

impl SwapBackend for TearsOnce {
    fn read(&self, slot: Slot, page: &mut [u8; PAGE_SIZE]) -> io::Result<()> {
        self.0.read(slot, page)
    }
    fn write(&self, first: Slot, pages: &[u8]) -> io::Result<()> {
        if self.1.fetch_add(1, Ordering::Relaxed) != 1 {
            return self.0.write(first, pages);
        }
        let mut torn = [0; PAGE_SIZE];
        self.0.read(first, &mut torn)?;
        torn[..PAGE_SIZE / 2].copy_from_slice(&pages[..PAGE_SIZE / 2]);
        self.0.write(first, &torn)?;
        Err(io::Error::from_raw_os_error(libc::EIO))
    }
    fn slots(&self) -> u32 {
        self.0.slots()
    }
}

#[test]
fn a_torn_page_is_never_content() {
    let space = SwapSpace::new(Box::new(TearsOnce(file(4), AtomicU32::new(0))), &Lab::default());
    let slot = space.alloc().unwrap();
    space.write_page(slot, 1, &page(1)).unwrap();
    assert!(space.write_page(slot, 1, &page(2)).is_err());
    assert!(matches!(read(&space, slot, 1), Err(SwapError::Checksum { expected: None, .. })));
    space.write_page(slot, 1, &page(3)).unwrap();
    assert_eq!(read(&space, slot, 1).unwrap(), page(3));
}

#[test]
fn runs_are_consecutive_and_end_at_the_next_used_slot() {
    let space = space(10);
    let all = space.alloc_run(100).unwrap();
    assert_eq!((all.first().as_u32(), all.len()), (0, 10));
    for number in [2, 3, 4, 7, 9] {
        space.free(Slot::new(number).unwrap()).unwrap();
    }
    let run = |max| space.alloc_run(max).map(|run| (run.first().as_u32(), run.len()));
    assert_eq!(run(0), None);
    assert_eq!(run(2), Some((2, 2)));
    assert_eq!(run(2), Some((4, 1)));
    assert_eq!(run(8), Some((7, 1)));
    assert_eq!(run(8), Some((9, 1)));
    assert_eq!(run(8), None);
}

#[test]
fn a_run_is_written_at_once_and_read_page_by_page() {
    let space = space(8);
    let run = space.alloc_run(3).unwrap();
    let pages = [page(1), page(2), page(3)].concat();
    space.write_run(run, &[11, 12, 13], &pages).unwrap();
    for (slot, (tag, seed)) in run.slots().zip([(11, 1), (12, 2), (13, 3)]) {
        assert_eq!(read(&space, slot, tag).unwrap(), page(seed));
    }
    assert_eq!(space.stats().pages_written, 3);
    for (tags, bytes) in [(&[1, 2][..], &pages[..]), (&[1, 2, 3], &pages[..PAGE_SIZE])] {
        assert!(matches!(space.write_run(run, tags, bytes), Err(SwapError::WrongLength { .. })));
    }
    space.free(run.slots().nth(1).unwrap()).unwrap();
    assert!(matches!(
        space.write_run(run, &[11, 12, 13], &pages),
        Err(SwapError::NotInUse { slot }) if slot.as_u32() == 1
    ));
    assert_eq!(read(&space, run.first(), 11).unwrap(), page(1), "refused before it was touched");
}

/// Threads with fewer slots than they would like: nobody gets another's slot or content.
#[test]
fn threads_do_not_disturb_each_other() {
    const SLOTS: u64 = 24;
    let space = Arc::new(space(SLOTS));
    let threads: Vec<_> = (0..4u64)
        .map(|thread| {
            let space = Arc::clone(&space);
            thread::spawn(move || {
                let mut mine: Vec<(Slot, u64)> = Vec::new();
                for round in 0..600 {
                    let tag = thread << 32 | round;
                    if let Some(slot) = space.alloc() {
                        space.write_page(slot, tag, &page(tag)).unwrap();
                        mine.push((slot, tag));
                    }
                    if mine.len() > 8 || round % 3 == 0 {
                        let at = usize::try_from(round).unwrap() * 7 % mine.len().max(1);
                        if at < mine.len() {
                            let (slot, tag) = mine.swap_remove(at);
                            assert_eq!(read(&space, slot, tag).unwrap(), page(tag));
                            space.free(slot).unwrap();
                        }
                    }
                }
                for (slot, tag) in mine {
                    assert_eq!(read(&space, slot, tag).unwrap(), page(tag));
                    space.free(slot).unwrap();
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
    let stats = space.stats();
    assert_eq!(stats.used, 0);
    assert_eq!(stats.pages_read, stats.pages_written);
    assert!(stats.pages_written > 600);
}

/// Tables for the largest swap must not take memory before it is used.
#[test]
fn an_unused_terabyte_costs_next_to_nothing() {
    struct Huge;
    impl SwapBackend for Huge {
        fn read(&self, _: Slot, page: &mut [u8; PAGE_SIZE]) -> io::Result<()> {
            page.fill(0);
            Ok(())
        }
        fn write(&self, _: Slot, _: &[u8]) -> io::Result<()> {
            Ok(())
        }
        fn slots(&self) -> u32 {
            u32::MAX
        }
    }
    let resident_pages = || -> u64 {
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        statm.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    // The memory of this process is what all tests beside this one have, too.
    const ALONE: &str = "GNOMON_TEST_ALONE";
    if std::env::var_os(ALONE).is_none() {
        let mut alone = std::process::Command::new(std::env::current_exe().unwrap());
        let this = "swap::tests::an_unused_terabyte_costs_next_to_nothing";
        let alone = alone.args(["--exact", this]).env(ALONE, "").output().unwrap();
        let said = String::from_utf8_lossy(&alone.stdout);
        assert!(alone.status.success() && said.contains("1 passed"), "{said}");
        return;
    }
    let before = resident_pages();
    let space = SwapSpace::new(Box::new(Huge), &Lab::default());
    assert_eq!(space.slots(), Slot::MAX_SLOTS);
    for tag in 0..1000 {
        let slot = space.alloc().unwrap();
        space.write_page(slot, tag, &[0; PAGE_SIZE]).unwrap();
        space.read_page(slot, tag, &mut [1; PAGE_SIZE]).unwrap();
    }
    let grown = resident_pages().saturating_sub(before) * PAGE_SIZE_U64;
    // Eager tables would be 16 GiB of sums and 256 MiB of bits.
    assert!(grown < 96 << 20, "{grown} bytes");
}

#[test]
fn a_swap_file_that_another_program_cut_short_is_told() {
    let config = SwapConfig { path: None, dir: None, bytes: 16 * PAGE_SIZE_U64 };
    // The file has no name: another program gets at it by /proc.
    let mut elsewhere = None;
    let swap = FileSwap::open(&config).unwrap().through(|file| {
        elsewhere = Some(file.try_clone().unwrap());
        file
    });
    let space = SwapSpace::new(Box::new(swap), &Lab::default());
    let slot = space.alloc().unwrap();
    space.write_page(slot, 1, &[7; PAGE_SIZE]).unwrap();
    elsewhere.unwrap().set_len(100).unwrap();
    let error = space.read_page(slot, 1, &mut [0; PAGE_SIZE]).unwrap_err();
    assert!(matches!(error, SwapError::CutShort { slot: at } if at == slot), "{error}");
    let said = error.to_string();
    assert!(said.contains("cut the swap file short") && said.contains("start again"), "{said}");
}

#[test]
fn errors_are_sentences() {
    let slot = Slot::new(3).unwrap();
    let full_disk =
        SwapError::from_io(SwapOp::Write, slot, io::Error::from_raw_os_error(libc::ENOSPC));
    assert!(full_disk.to_string().starts_with("cannot write swap slot 3: the file system of the"));
    let checksum =
        SwapError::Checksum { slot, owner_tag: 0x10, expected: None, found: 0xabcd }.to_string();
    assert!(
        checksum.starts_with(
            "swap slot 3 does not hold what page 0x10 wrote there: checksum 0x000000000000abcd, \
             expected none: nothing was written; "
        ),
        "{checksum}"
    );
}

/// Each says what was wrong, with the kernel's own word, and then what to do.
#[test]
fn errors_say_what_to_do() {
    let source = || io::Error::from_raw_os_error(libc::EIO);
    let (path, dir) = ("/s".into(), "/d".into());
    let slot = Slot::new(3).unwrap();
    for (error, remedy) in [
        (SwapOpenError::Create { path, source: source() }.into(), "name a place"),
        (SwapOpenError::CreateTemporary { dir, source: source() }.into(), "name a directory"),
        (SwapOpenError::Resize { bytes: 1, source: source() }.into(), "choose less swap"),
        (SwapError::from_io(SwapOp::Read, slot, source()), "put swap elsewhere"),
    ] {
        let error: SwapError = error;
        let said = error.to_string();
        let (wrong, to_do) = said.split_once("; ").expect("two halves");
        assert!(wrong.ends_with("Input/output error (os error 5)"), "{said}");
        assert!(to_do.contains(remedy), "{said}");
    }
}

#[test]
fn a_renamed_page_answers_to_its_new_name_only() {
    let space = space(4);
    let slot = space.alloc().unwrap();
    space.write_page(slot, 7, &page(1)).unwrap();
    space.rename(slot, 7, 8).unwrap();
    assert_eq!(read(&space, slot, 8).unwrap(), page(1));
    assert!(space.matches(slot, 8, &page(1)) && !space.matches(slot, 8, &page(2)));
    assert!(matches!(read(&space, slot, 7), Err(SwapError::Checksum { .. })));
    // By somebody who does not know whose it is: nobody's from then on.
    space.rename(slot, 9, 10).unwrap();
    for tag in [7, 8, 9, 10] {
        assert!(matches!(read(&space, slot, tag), Err(SwapError::Checksum { .. })), "tag {tag}");
    }
    space.free(slot).unwrap();
    assert!(matches!(space.rename(slot, 7, 8), Err(SwapError::NotInUse { .. })));
}
