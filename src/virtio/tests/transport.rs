//! Registers: in order, out of order, and at any width.

use std::sync::Arc;

use proptest::prelude::*;
use virtio_bindings::bindings::virtio_mmio as regs;

use super::blk::FLUSH;
use super::rig::{
    ACKNOWLEDGE, BOTH, BUFFERS, DRIVER, DRIVER_OK, Driver, EVENT_IDX, FEATURES_OK, NEEDS_RESET,
    RINGS, VERSION_1, host, until,
};
use crate::virtio::{Block, Contents, DiskMode, REGISTER_BYTES};

fn disk() -> (tempfile::NamedTempFile, Arc<Block>) {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let block = Block::open(file.path(), DiskMode::ReadWrite, Contents::Checked, "serial").unwrap();
    (file, Arc::new(block))
}

fn driver() -> Driver {
    let (_mm, object) = host(BOTH[0], None);
    Driver::new(disk().1, &object)
}

#[test]
fn the_registers_say_what_device_it_is() {
    let driver = driver();
    assert_eq!(driver.get(regs::VIRTIO_MMIO_MAGIC_VALUE), 0x7472_6976);
    assert_eq!(driver.get(regs::VIRTIO_MMIO_VERSION), 2);
    assert_eq!(driver.get(regs::VIRTIO_MMIO_DEVICE_ID), 2);
    assert_eq!(driver.get(regs::VIRTIO_MMIO_SHM_LEN_LOW), u32::MAX);
    assert_eq!((driver.queue_max(0), driver.queue_max(1)), (256, 0));
    assert_eq!(driver.offered() & (VERSION_1 | EVENT_IDX), VERSION_1 | EVENT_IDX);
}

#[test]
fn features_are_refused_without_version_1_or_if_they_were_not_offered() {
    let driver = driver();
    let begun = ACKNOWLEDGE | DRIVER;
    for (features, is_taken) in [
        (FLUSH, false),
        (0, false),
        (VERSION_1 | 1 << 63, false),
        (VERSION_1 | 1 << 3, false),
        (VERSION_1, true),
        (VERSION_1 | FLUSH | EVENT_IDX, true),
    ] {
        driver.set(regs::VIRTIO_MMIO_STATUS, 0);
        driver.set(regs::VIRTIO_MMIO_STATUS, begun);
        driver.accept(features);
        driver.set(regs::VIRTIO_MMIO_STATUS, begun | FEATURES_OK);
        let expected = if is_taken { begun | FEATURES_OK } else { begun };
        assert_eq!(driver.get(regs::VIRTIO_MMIO_STATUS), expected, "{features:#x}");
        // Nor can it be driven without.
        driver.set(regs::VIRTIO_MMIO_STATUS, expected | DRIVER_OK);
        let expected = if is_taken { expected | DRIVER_OK } else { expected };
        assert_eq!(driver.get(regs::VIRTIO_MMIO_STATUS), expected);
    }
}

#[test]
fn steps_out_of_order_are_ignored() {
    let driver = driver();
    let status = |value| {
        driver.set(regs::VIRTIO_MMIO_STATUS, value);
        driver.get(regs::VIRTIO_MMIO_STATUS)
    };
    assert_eq!(status(DRIVER_OK), 0);
    assert_eq!(status(FEATURES_OK), 0);
    driver.accept(VERSION_1);
    assert_eq!(status(ACKNOWLEDGE | DRIVER), 3);
    assert_eq!(status(ACKNOWLEDGE | DRIVER | FEATURES_OK), 3, "accepted before it was a driver");
    assert_eq!(status(ACKNOWLEDGE), 3, "no bit is cleared");
    driver.set(regs::VIRTIO_MMIO_QUEUE_READY, 1);
    assert_eq!(driver.get(regs::VIRTIO_MMIO_QUEUE_READY), 0, "before the features");
    driver.accept(VERSION_1);
    assert_eq!(status(ACKNOWLEDGE | DRIVER | FEATURES_OK), 11);
    driver.accept(0);
    assert_eq!(status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK), 15, "settled");
    driver.kick(0);
    driver.set(regs::VIRTIO_MMIO_QUEUE_NOTIFY, u32::MAX);
    assert_eq!(status(0), 0);
}

#[test]
fn a_queue_that_cannot_be_is_told_and_a_reset_mends_it() {
    let driver = driver();
    let sound = (8, RINGS, RINGS + 0x1000, RINGS + 0x2000);
    let end = driver.object.bytes();
    for (size, descriptors, available, used) in [
        (0, sound.1, sound.2, sound.3),
        (7, sound.1, sound.2, sound.3),
        (512, sound.1, sound.2, sound.3),
        (0x1_0008, sound.1, sound.2, sound.3),
        (sound.0, sound.1 + 8, sound.2, sound.3),
        (sound.0, sound.1, sound.2 + 1, sound.3),
        (sound.0, sound.1, sound.2, sound.3 + 2),
        (sound.0, end - 64, sound.2, sound.3),
        (sound.0, sound.1, end - 2, sound.3),
        (sound.0, sound.1, sound.2, end),
        (sound.0, sound.1, sound.2, u64::MAX - 3),
        (sound.0, sound.1, 0, sound.3),
    ] {
        driver.set(regs::VIRTIO_MMIO_STATUS, 0);
        driver.set(regs::VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER);
        driver.accept(VERSION_1);
        driver.set(regs::VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        driver.set(regs::VIRTIO_MMIO_QUEUE_SEL, 0);
        driver.set(regs::VIRTIO_MMIO_QUEUE_NUM, size);
        for (register, address) in [
            (regs::VIRTIO_MMIO_QUEUE_DESC_LOW, descriptors),
            (regs::VIRTIO_MMIO_QUEUE_AVAIL_LOW, available),
            (regs::VIRTIO_MMIO_QUEUE_USED_LOW, used),
        ] {
            driver.set(register, u32::try_from(address & 0xffff_ffff).unwrap());
            driver.set(register + 4, u32::try_from(address >> 32).unwrap());
        }
        driver.set(regs::VIRTIO_MMIO_QUEUE_READY, 1);
        assert_eq!(driver.get(regs::VIRTIO_MMIO_QUEUE_READY), 0);
        assert!(driver.needs_reset());
        let why = driver.transport.failure().unwrap();
        assert!(why.starts_with("queue 0 cannot be used: "), "{why}");
        driver.set(regs::VIRTIO_MMIO_STATUS, 15);
        assert_ne!(driver.get(regs::VIRTIO_MMIO_STATUS) & NEEDS_RESET, 0);
    }
    driver.begin(VERSION_1, 8);
    super::blk::request(&driver, 4, 0, &[]);
}

#[test]
fn interrupts_are_acknowledged_and_told_once_for_many_with_event_idx() {
    for features in [VERSION_1 | FLUSH, VERSION_1 | FLUSH | EVENT_IDX] {
        let driver = driver();
        driver.begin(features, 16);
        super::blk::request(&driver, 4, 0, &[]);
        until("the interrupt", || driver.line.edges() == 1);
        assert_eq!(driver.get(regs::VIRTIO_MMIO_INTERRUPT_STATUS), 1);
        driver.set(regs::VIRTIO_MMIO_INTERRUPT_ACK, 1);
        assert_eq!(driver.get(regs::VIRTIO_MMIO_INTERRUPT_STATUS), 0);
        // With an event index that stands, the driver has not asked for another.
        super::blk::request(&driver, 4, 0, &[]);
        super::blk::request(&driver, 4, 0, &[]);
        let expected = if features & EVENT_IDX == 0 { 3 } else { 1 };
        until("the interrupts", || driver.line.edges() >= expected);
        driver.set(regs::VIRTIO_MMIO_STATUS, 0);
        assert_eq!(driver.line.edges(), expected);
        assert_eq!(driver.get(regs::VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    }
}

#[test]
fn a_change_of_the_configuration_is_told_to_a_driver() {
    let driver = driver();
    driver.transport.config_changed();
    assert_eq!((driver.line.edges(), driver.get(regs::VIRTIO_MMIO_CONFIG_GENERATION)), (0, 1));
    driver.begin(VERSION_1, 16);
    driver.transport.config_changed();
    assert_eq!((driver.line.edges(), driver.get(regs::VIRTIO_MMIO_CONFIG_GENERATION)), (1, 2));
    assert_eq!(driver.get(regs::VIRTIO_MMIO_INTERRUPT_STATUS), 2);
}

#[test]
fn a_queue_that_was_taken_back_is_not_used() {
    let driver = driver();
    driver.begin(VERSION_1, 16);
    super::blk::request(&driver, 4, 0, &[]);
    driver.set(regs::VIRTIO_MMIO_QUEUE_SEL, 0);
    driver.set(regs::VIRTIO_MMIO_QUEUE_READY, 0);
    assert_eq!(driver.get(regs::VIRTIO_MMIO_QUEUE_READY), 0);
    let header = super::blk::header(&driver, BUFFERS, 4, 0);
    driver.add(0, &[header, (BUFFERS + 64, 1, true)]);
    driver.kick(0);
    // The thread has looked once it has served another device's... there is none: it is asked twice.
    driver.kick(0);
    driver.begin(VERSION_1, 16);
    super::blk::request(&driver, 4, 0, &[]);
    assert!(driver.poll(0).is_none(), "what was added before is gone with the reset");
}

proptest! {
    /// No width, offset or value is too much.
    #[test]
    fn any_access_is_answered(
        accesses in prop::collection::vec(
            (any::<bool>(), prop_oneof![0..REGISTER_BYTES + 8, any::<u64>()], 0..9usize, any::<u64>()),
            0..200,
        ),
    ) {
        let driver = driver();
        for (is_write, offset, len, value) in accesses {
            let mut data = value.to_le_bytes();
            if is_write {
                driver.transport.write(offset, &data[..len]);
            } else {
                driver.transport.read(offset, &mut data[..len]);
            }
        }
        driver.begin(VERSION_1, 16);
        super::blk::request(&driver, 4, 0, &[]);
    }
}
