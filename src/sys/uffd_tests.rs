//! These run where the process may handle kernel-mode faults, and are ignored elsewhere.

use std::thread;

use vm_memory::{Bytes, FileOffset, VolatileMemory};

use super::*;
use crate::memory::{create_memfd, punch_hole};

const PAGES: usize = 8;

/// A region of holes with a tripwire.
fn armed() -> (Arc<MmapRegion>, Arc<Tripwire>) {
    let bytes = PAGES * PAGE_SIZE;
    let file = create_memfd("gnomon-test", bytes as u64).unwrap();
    let region = Arc::new(MmapRegion::from_file(FileOffset::new(file, 0), bytes).unwrap());
    let wire = Tripwire::arm(Arc::clone(&region)).unwrap_or_else(|error| panic!("{error}"));
    (region, Arc::new(wire))
}

#[test]
fn the_kernel_offers_what_the_tripwire_needs() {
    let features = uffd_features().unwrap();
    assert!(features.contains(Features::MISSING_SHMEM | Features::THREAD_ID), "{features:?}");
}

#[test]
#[cfg_attr(
    not(kernel_faults),
    ignore = "no userfaultfd for kernel-mode faults here: see `gnomon doctor`"
)]
fn a_touch_waits_and_is_reported_until_it_is_released() {
    let (region, wire) = armed();
    let toucher = thread::spawn({
        let region = Arc::clone(&region);
        move || {
            // SAFETY: gettid has no arguments and cannot fail.
            let thread = unsafe { libc::gettid() };
            let slice = region.as_volatile_slice();
            let read: u8 = slice.read_obj(3 * PAGE_SIZE + 5).unwrap();
            slice.write_obj(9u8, 6 * PAGE_SIZE).unwrap();
            (thread, read, slice.read_obj::<u8>(6 * PAGE_SIZE + 1).unwrap())
        }
    });
    let first = wire.next().unwrap().unwrap();
    assert_eq!((first.offset, first.write), (3 * PAGE_SIZE, false));
    assert!(!toucher.is_finished());
    wire.release_copy(first.offset, &[0x5a; PAGE_SIZE]).unwrap();
    let second = wire.next().unwrap().unwrap();
    assert_eq!((second.offset, second.write), (6 * PAGE_SIZE, true));
    wire.release_zero(second.offset).unwrap();
    let (thread, read, beside) = toucher.join().unwrap();
    assert_eq!((first.thread, second.thread), (thread, thread));
    assert_eq!((read, beside), (0x5a, 0));
    assert_eq!(region.as_volatile_slice().read_obj::<u8>(6 * PAGE_SIZE).unwrap(), 9);
}

/// What KVM does on behalf of a vCPU: the touch comes from kernel mode (here: `write` from a hole
/// into a pipe).
#[test]
#[cfg_attr(
    not(kernel_faults),
    ignore = "no userfaultfd for kernel-mode faults here: see `gnomon doctor`"
)]
fn a_kernel_mode_touch_is_reported() {
    let (region, wire) = armed();
    let toucher = thread::spawn({
        let region = Arc::clone(&region);
        move || {
            use std::os::fd::AsRawFd;
            let (mut reader, writer) = std::io::pipe().unwrap();
            let page = region.as_ptr().wrapping_add(2 * PAGE_SIZE);
            // SAFETY: the page lies inside the region, which the Arc keeps mapped; the kernel reads
            // 4 bytes.
            let written = unsafe { libc::write(writer.as_raw_fd(), page.cast(), 4) };
            assert_eq!(written, 4);
            let mut bytes = [0; 4];
            io::Read::read_exact(&mut reader, &mut bytes).unwrap();
            bytes
        }
    });
    let fault = wire.next().unwrap().unwrap();
    assert_eq!((fault.offset, fault.write), (2 * PAGE_SIZE, false));
    wire.release_copy(fault.offset, &[7; PAGE_SIZE]).unwrap();
    assert_eq!(toucher.join().unwrap(), [7; 4]);
}

#[test]
#[cfg_attr(
    not(kernel_faults),
    ignore = "no userfaultfd for kernel-mode faults here: see `gnomon doctor`"
)]
fn an_interrupt_ends_one_wait_and_loses_no_fault() {
    let (region, wire) = armed();
    wire.interrupt().unwrap();
    wire.interrupt().unwrap();
    assert_eq!(wire.next().unwrap(), None, "two interrupts before a wait are one");
    let waiter = thread::spawn({
        let wire = Arc::clone(&wire);
        move || wire.next().unwrap()
    });
    wire.interrupt().unwrap();
    assert_eq!(waiter.join().unwrap(), None);

    let toucher = thread::spawn({
        let region = Arc::clone(&region);
        move || region.as_volatile_slice().read_obj::<u8>(0).unwrap()
    });
    assert_eq!(wire.next().unwrap().unwrap().offset, 0);
    wire.release_zero(0).unwrap();
    assert_eq!(toucher.join().unwrap(), 0);
}

#[test]
#[cfg_attr(
    not(kernel_faults),
    ignore = "no userfaultfd for kernel-mode faults here: see `gnomon doctor`"
)]
fn releasing_a_page_that_is_there_keeps_its_content() {
    let (region, wire) = armed();
    wire.release_copy(0, &[1; PAGE_SIZE]).unwrap();
    wire.release_copy(0, &[2; PAGE_SIZE]).unwrap();
    wire.release_zero(0).unwrap();
    assert_eq!(region.as_volatile_slice().read_obj::<u8>(0).unwrap(), 1);
}

#[test]
#[cfg_attr(
    not(kernel_faults),
    ignore = "no userfaultfd for kernel-mode faults here: see `gnomon doctor`"
)]
fn a_punched_page_is_a_hole_again() {
    let (region, wire) = armed();
    wire.release_copy(PAGE_SIZE, &[1; PAGE_SIZE]).unwrap();
    punch_hole(region.file_offset().unwrap().file(), PAGE_SIZE as u64, PAGE_SIZE as u64).unwrap();
    let toucher = thread::spawn({
        let region = Arc::clone(&region);
        move || region.as_volatile_slice().read_obj::<u8>(PAGE_SIZE).unwrap()
    });
    assert_eq!(wire.next().unwrap().unwrap().offset, PAGE_SIZE);
    wire.release_zero(PAGE_SIZE).unwrap();
    assert_eq!(toucher.join().unwrap(), 0);
}

#[test]
#[cfg_attr(
    not(kernel_faults),
    ignore = "no userfaultfd for kernel-mode faults here: see `gnomon doctor`"
)]
fn bad_offsets_are_refused() {
    let (_region, wire) = armed();
    for offset in [1, PAGES * PAGE_SIZE, usize::MAX] {
        let refused =
            |result| matches!(result, Err(UffdError::Release { errno: Errno::EINVAL, .. }));
        assert!(refused(wire.release_zero(offset)), "{offset:#x}");
        assert!(refused(wire.release_copy(offset, &[0; PAGE_SIZE])), "{offset:#x}");
    }
}

#[test]
#[cfg_attr(
    not(kernel_faults),
    ignore = "no userfaultfd for kernel-mode faults here: see `gnomon doctor`"
)]
fn dropping_it_lets_the_waiters_go() {
    let (region, wire) = armed();
    let toucher = thread::spawn({
        let region = Arc::clone(&region);
        move || region.as_volatile_slice().read_obj::<u8>(0).unwrap()
    });
    assert_eq!(wire.next().unwrap().unwrap().offset, 0);
    drop(wire);
    assert_eq!(toucher.join().unwrap(), 0);
}
