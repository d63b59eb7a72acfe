//! What the guest is told of its writes is true, whatever the disk does.

use std::sync::Arc;

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};

use super::blk::{CONFIG_WCE, FLUSH, pattern, request};
use super::disk::{Op, TestDisk};
use super::rig::{BOTH, BUFFERS, Driver, VERSION_1, host};
use crate::virtio::Block;

const DATA: u64 = BUFFERS + 0x2000;
const SECTORS: usize = 64;
const OK: (u32, u32) = (VIRTIO_BLK_S_OK, 1);
const FAILED: (u32, u32) = (VIRTIO_BLK_S_IOERR, 1);

fn disk() -> TestDisk {
    TestDisk::new(vec![0; SECTORS * 512])
}

fn driver(disk: &TestDisk, features: u64) -> Driver {
    driver_of(disk.block(), features)
}

fn driver_of(block: Arc<Block>, features: u64) -> Driver {
    Driver::ready(block, &host(BOTH[0], None).1, VERSION_1 | features, 16)
}

fn troubles(block: &Block) -> Vec<String> {
    block.troubles().iter().map(ToString::to_string).collect()
}

fn write(driver: &Driver, sector: u64, seed: u64) -> (u32, u32) {
    driver.write(DATA, &pattern(seed, 1024));
    request(driver, VIRTIO_BLK_T_OUT, sector, &[(DATA, 1024, false)])
}

fn is_durable(disk: &TestDisk, sector: usize, seed: u64) -> bool {
    disk.set(|state| state.durable[sector * 512..][..1024] == pattern(seed, 1024))
}

#[test]
fn a_flush_is_acknowledged_after_all_writes_before_it_are_durable() {
    let disk = disk();
    let driver = driver(&disk, FLUSH);
    assert_eq!(write(&driver, 0, 1), OK);
    assert_eq!(write(&driver, 8, 2), OK);
    assert!(!is_durable(&disk, 0, 1), "a write-back cache: the double shows that it can tell");
    assert_eq!(request(&driver, VIRTIO_BLK_T_FLUSH, 0, &[]), OK);
    assert!(is_durable(&disk, 0, 1) && is_durable(&disk, 8, 2));
    assert_eq!(disk.set(|state| state.log.clone()), [Op::Write, Op::Sync]);
}

/// A driver that cannot flush, or has asked for it, gets no acknowledgement before that.
#[test]
fn without_a_write_back_cache_an_acknowledged_write_is_durable() {
    let disk = disk();
    let plain = driver(&disk, 0);
    assert_eq!(write(&plain, 0, 1), OK);
    assert!(is_durable(&disk, 0, 1));
    assert_eq!(plain.config::<1>(32), [0]);
    drop(plain);

    let driver = driver(&disk, FLUSH | CONFIG_WCE);
    assert_eq!(driver.config::<1>(32), [1]);
    assert_eq!(write(&driver, 8, 2), OK);
    assert!(!is_durable(&disk, 8, 2));
    driver.transport.write(0x120, &[0]);
    assert_eq!(driver.config::<1>(32), [0]);
    assert_eq!(write(&driver, 16, 3), OK);
    assert!(is_durable(&disk, 8, 2) && is_durable(&disk, 16, 3));
    driver.transport.write(0x120, &[1]);
    assert_eq!(write(&driver, 24, 4), OK);
    assert!(!is_durable(&disk, 24, 4));

    // Without the means to flush it begins without a cache.
    driver.begin(VERSION_1 | CONFIG_WCE, 16);
    assert_eq!(write(&driver, 32, 5), OK);
    assert!(is_durable(&disk, 32, 5));
}

/// The host may have dropped what it could not write: a later success would say nothing about that.
#[test]
fn after_a_flush_that_failed_none_succeeds() {
    let disk = disk();
    let block = disk.block();
    let driver = driver_of(block.clone(), FLUSH);
    assert_eq!(write(&driver, 0, 1), OK);
    assert!(troubles(&block).is_empty());
    disk.set(|state| state.fail = Some((Op::Sync, libc::EIO)));
    assert_eq!(request(&driver, VIRTIO_BLK_T_FLUSH, 0, &[]), FAILED);
    disk.set(|state| state.fail = None);
    assert_eq!(request(&driver, VIRTIO_BLK_T_FLUSH, 0, &[]), FAILED);
    driver.begin(VERSION_1, 16);
    assert_eq!(write(&driver, 0, 1), FAILED, "it would have to be durable");
    let read = request(&driver, VIRTIO_BLK_T_IN, 0, &[(DATA, 512, true)]);
    assert_eq!(read, (VIRTIO_BLK_S_OK, 513), "reading goes on");
    let told = troubles(&block);
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].starts_with("3 flushes failed (Input/output error"), "{told:?}");
}

#[test]
fn errors_of_the_disk_are_errors_of_the_request_alone() {
    let disk = disk();
    let block = disk.block();
    let driver = driver_of(block.clone(), FLUSH);
    for errno in [libc::EIO, libc::ENOSPC, libc::EROFS] {
        disk.set(|state| state.fail = Some((Op::Write, errno)));
        assert_eq!(write(&driver, 0, 1), FAILED);
        disk.set(|state| state.fail = Some((Op::Read, errno)));
        let read = request(&driver, VIRTIO_BLK_T_IN, 0, &[(DATA, 512, true)]);
        assert_eq!(read, (VIRTIO_BLK_S_IOERR, 0));
        disk.set(|state| state.fail = None);
        assert_eq!(write(&driver, 0, 1), OK);
    }
    let told = troubles(&block);
    assert_eq!(told.len(), 6, "{told:?}");
    assert!(told[2].contains("1 write failed (No space left on device"), "{told:?}");
    assert!(told[2].contains("the file system that the image is on is full"), "{told:?}");
}

#[test]
fn what_the_driver_does_wrong_is_no_trouble_of_the_disk() {
    let disk = disk();
    let block = disk.block();
    let driver = driver_of(block.clone(), FLUSH);
    assert_eq!(write(&driver, SECTORS as u64, 1), FAILED);
    assert!(troubles(&block).is_empty());
}

#[test]
fn short_and_interrupted_transfers_are_taken_up_again() {
    let disk = disk();
    let driver = driver(&disk, FLUSH);
    disk.set(|state| state.short = Some(100));
    assert_eq!(write(&driver, 4, 7), OK);
    assert!(disk.set(|state| state.content[4 * 512..][..1024] == pattern(7, 1024)));
    driver.write(DATA, &[0; 1024]);
    let read = request(&driver, VIRTIO_BLK_T_IN, 4, &[(DATA, 1024, true)]);
    assert_eq!(read, (VIRTIO_BLK_S_OK, 1025));
    assert_eq!(driver.read(DATA, 1024), pattern(7, 1024));
}

/// Somebody has cut the image off, against its lock.
#[test]
fn an_image_that_has_become_shorter_is_an_error() {
    let disk = disk();
    let block = disk.block();
    let driver = driver_of(block.clone(), FLUSH);
    disk.set(|state| state.content.truncate(1000));
    for _ in 0..10 {
        let read = request(&driver, VIRTIO_BLK_T_IN, 1, &[(DATA, 512, true)]);
        assert_eq!(read, (VIRTIO_BLK_S_IOERR, 0));
    }
    let told = troubles(&block);
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].starts_with("10 reads failed: the image is shorter than it was"), "{told:?}");
}
