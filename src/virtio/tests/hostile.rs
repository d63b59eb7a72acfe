//! Drivers that break the rules.

use proptest::prelude::*;
use virtio_bindings::bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_T_IN};
use virtio_bindings::bindings::virtio_mmio as regs;

use super::blk::{FLUSH, header, request};
use super::disk::TestDisk;
use super::rig::{BOTH, BUFFERS, Driver, EVENT_IDX, VERSION_1, host, until};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const SIZE: u16 = 8;
const STATUS: u64 = BUFFERS + 0x100;
const DATA: u64 = BUFFERS + 0x1000;

fn driver() -> Driver {
    let (_mm, object) = host(BOTH[0], None);
    Driver::ready(TestDisk::new(vec![0; 64 * 512]).block(), &object, VERSION_1 | FLUSH, SIZE)
}

/// Broken beyond an error status, with a sentence; and a reset mends it.
fn breaks(driver: &Driver, sentence: &str) {
    driver.kick(0);
    until("a device that needs a reset", || driver.needs_reset());
    let why = driver.transport.failure().unwrap();
    assert!(why.contains(sentence), "{why}");
    assert_eq!(driver.get(regs::VIRTIO_MMIO_INTERRUPT_STATUS) & 2, 2, "the driver is told");
    driver.begin(VERSION_1 | FLUSH, SIZE);
    assert_eq!(request(driver, 4, 0, &[]), (0, 1));
}

/// Has what was offered served, with an error as its status.
fn fails(driver: &Driver) {
    driver.write(STATUS, &[0xff]);
    driver.kick(0);
    driver.take(0);
    assert_eq!(u32::from(driver.read(STATUS, 1)[0]), VIRTIO_BLK_S_IOERR);
    driver.begin(VERSION_1 | FLUSH, SIZE);
    assert_eq!(request(driver, 4, 0, &[]), (0, 1));
}

#[test]
fn more_buffers_than_the_ring_has_entries_need_a_reset() {
    let driver = driver();
    driver.claim(0, SIZE + 1);
    breaks(&driver, "queue 0 cannot be served any more");
    driver.claim(0, u16::MAX);
    breaks(&driver, "queue 0 cannot be served any more");
}

#[test]
fn a_head_that_is_no_descriptor_needs_a_reset() {
    let driver = driver();
    driver.offer(0, SIZE);
    breaks(&driver, "no room for its status");
    driver.offer(0, u16::MAX);
    breaks(&driver, "no room for its status");
}

#[test]
fn a_request_without_room_for_a_status_needs_a_reset() {
    let driver = driver();
    driver.add(0, &[(BUFFERS, 16, false)]);
    breaks(&driver, "no room for its status");
    driver.add(0, &[(BUFFERS, 16, false), (STATUS, 0, true)]);
    breaks(&driver, "no room for its status");
    let outside = driver.object.bytes();
    driver.add(0, &[(BUFFERS, 16, false), (outside, 1, true)]);
    breaks(&driver, "the status of a disk request cannot be written");
}

#[test]
fn chains_without_end_have_an_error_status() {
    let driver = driver();
    // Round and round.
    header(&driver, BUFFERS, VIRTIO_BLK_T_IN, 0);
    driver.describe(0, 0, (BUFFERS, 16, NEXT, 1));
    driver.describe(0, 1, (STATUS, 1, NEXT | WRITE, 1));
    driver.offer(0, 0);
    fails(&driver);
    // To a descriptor that there is not.
    driver.describe(0, 0, (BUFFERS, 16, NEXT, 1));
    driver.describe(0, 1, (STATUS, 1, NEXT | WRITE, SIZE));
    driver.offer(0, 0);
    fails(&driver);
    // To read after it has written.
    driver.describe(0, 0, (BUFFERS, 16, NEXT, 1));
    driver.describe(0, 1, (DATA, 512, NEXT | WRITE, 2));
    driver.describe(0, 2, (DATA, 512, NEXT, 3));
    driver.describe(0, 3, (STATUS, 1, WRITE, 0));
    driver.offer(0, 0);
    fails(&driver);
}

/// An indirect table is taken, but not longer than the queue, nor another in it.
#[test]
fn indirect_tables_are_bounded() {
    let driver = driver();
    let table = DATA;
    let entry = |index: u64, gpa: u64, len: u32, flags: u16, next: u16| {
        let mut bytes = gpa.to_le_bytes().to_vec();
        bytes.extend_from_slice(&len.to_le_bytes());
        bytes.extend_from_slice(&flags.to_le_bytes());
        bytes.extend_from_slice(&next.to_le_bytes());
        driver.write(table + 16 * index, &bytes);
    };
    header(&driver, BUFFERS, 4, 0);
    entry(0, BUFFERS, 16, NEXT, 1);
    entry(1, STATUS, 1, WRITE, 0);
    driver.write(STATUS, &[0xff]);
    driver.describe(0, 0, (table, 32, INDIRECT, 0));
    driver.offer(0, 0);
    driver.kick(0);
    assert_eq!(driver.take(0), (0, 1));
    assert_eq!(driver.read(STATUS, 1), [0]);

    for index in 1..1000 {
        entry(index, STATUS, 1, NEXT | WRITE, u16::try_from(index + 1).unwrap());
    }
    driver.describe(0, 0, (table, 16 * 1000, INDIRECT, 0));
    driver.offer(0, 0);
    fails(&driver);
    entry(0, table, 32, INDIRECT, 0);
    for len in [32, 16, 0, 7, u32::MAX - 15] {
        driver.describe(0, 0, (table, len, INDIRECT, 0));
        driver.offer(0, 0);
        breaks(&driver, "no room for its status");
    }
}

#[test]
fn buffers_that_are_no_memory_have_an_error_status() {
    let driver = driver();
    let end = driver.object.bytes();
    for (gpa, len) in [(end, 512), (end - 511, 512), (u64::MAX, 512), (u64::MAX - 511, 512)] {
        for is_written in [true, false] {
            let kind = u32::from(!is_written);
            let found = request(&driver, kind, 0, &[(gpa, len, is_written)]);
            assert_eq!(found.0, VIRTIO_BLK_S_IOERR, "{gpa:#x}");
        }
        driver.add(0, &[(gpa.saturating_add(504), 16, false), (STATUS, 1, true)]);
        fails(&driver);
    }
}

/// A descriptor with any fields, mostly nearly right ones.
fn any_descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let gpa = prop_oneof![
        4 => Just(BUFFERS),
        4 => (0..32u64).prop_map(|page| DATA + page * 512),
        1 => super::rig::RINGS..super::rig::RINGS + 0x3000,
        1 => any::<u64>(),
    ];
    let len = prop_oneof![4 => Just(16), 4 => Just(1), 4 => Just(512), 1 => 0..100_000u32, 1 => any::<u32>()];
    let flags = prop_oneof![8 => 0..4u16, 1 => any::<u16>()];
    let next = prop_oneof![8 => 0..SIZE, 1 => any::<u16>()];
    (gpa, len, flags, next)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever is in the rings, the device ends with it, and serves the next driver.
    #[test]
    fn any_rings_are_survived(
        descriptors in prop::collection::vec(any_descriptor(), usize::from(SIZE)),
        heads in prop::collection::vec(0..SIZE + 1, 0..24),
        kind in prop_oneof![0..14u32, any::<u32>()],
        sector in prop_oneof![0..70u64, any::<u64>()],
        event_idx in any::<bool>(),
        claim in prop::option::of(any::<u16>()),
    ) {
        let (mm, object) = host(BOTH[0], None);
        let disk = TestDisk::new(vec![7; 64 * 512]);
        let features = VERSION_1 | FLUSH | if event_idx { EVENT_IDX } else { 0 };
        let driver = Driver::ready(disk.block(), &object, features, SIZE);
        header(&driver, BUFFERS, kind, sector);
        for (index, &fields) in (0..).zip(&descriptors) {
            driver.describe(0, index, fields);
        }
        for &head in &heads {
            driver.offer(0, head);
            driver.kick(0);
        }
        if let Some(index) = claim {
            driver.claim(0, index);
            driver.kick(0);
        }
        driver.begin(VERSION_1 | FLUSH, SIZE);
        prop_assert_eq!(request(&driver, 4, 0, &[]), (0, 1));
        prop_assert_eq!(driver.transport.check_reverse_map(), Vec::<String>::new());
        prop_assert_eq!(mm.violations().1, 0);
    }
}
