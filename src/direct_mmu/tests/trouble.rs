//! What cannot be resolved is told, and nobody waits for ever.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use vm_memory::{Bytes, VolatileMemory};

use super::rig::{FRAMES, Page, Rig, eventually, memory, page};
use crate::addr::{PAGE_SIZE, SwapSlot};
use crate::direct_mmu::DirectConfig;
use crate::host_mm::HostMmConfig;
use crate::host_mm::swap::SwapBackend;

/// A disk whose reads or writes fail.
struct BadSwap {
    reads: bool,
    broken: Arc<AtomicBool>,
}

impl SwapBackend for BadSwap {
    fn read(&self, _slot: SwapSlot, _page: &mut Page) -> io::Result<()> {
        if self.reads && self.broken.load(Ordering::SeqCst) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        Ok(())
    }

    fn write(&self, _first: SwapSlot, _pages: &[u8]) -> io::Result<()> {
        if !self.reads && self.broken.load(Ordering::SeqCst) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        Ok(())
    }

    fn slots(&self) -> u32 {
        100_000
    }
}

#[test]
#[cfg_attr(
    not(kernel_faults),
    ignore = "no userfaultfd for kernel-mode faults here: see `gnomon doctor`"
)]
fn a_panic_of_a_thread_is_told() {
    let rig = Rig::new(memory(FRAMES), DirectConfig::default());
    *crate::sync::lock(&rig.mmu.mmu.overtaking) = Some(Box::new(|| panic!("on purpose")));
    let region = rig.window().region().clone();
    let toucher = thread::spawn(move || {
        let _ = region.as_volatile_slice().read_obj::<u8>(PAGE_SIZE);
    });
    eventually(|| rig.mmu.failure().is_some());
    let failure = rig.mmu.failure().unwrap();
    assert!(failure.contains("panicked") && failure.contains("reads page faults"), "{failure}");
    // Neither the toucher nor a remover waits for ever.
    let _ = rig.mmu.remove(crate::addr::Gfn::new(2), 1);
    drop(rig);
    toucher.join().unwrap();
}

/// Somebody who touches a page that cannot be had waits, the owner is told, and the end lets the
/// waiter go.
fn touch_is_told(rig: Rig, number: u64, sentence: &str) {
    let region = rig.window().region().clone();
    let (done, is_done) = mpsc::channel();
    let toucher = thread::spawn(move || {
        let at = usize::try_from(number).unwrap() * PAGE_SIZE;
        let _ = region.as_volatile_slice().read_obj::<u8>(at);
        done.send(()).unwrap();
    });
    eventually(|| rig.mmu.failure().is_some());
    let failure = rig.mmu.failure().unwrap();
    assert!(failure.contains(sentence), "{failure}");
    assert!(is_done.try_recv().is_err(), "there is nothing that it could have been given");
    drop(rig);
    is_done.recv_timeout(Duration::from_secs(30)).expect("the end lets it go");
    toucher.join().unwrap();
}

#[test]
#[cfg_attr(
    not(kernel_faults),
    ignore = "no userfaultfd for kernel-mode faults here: see `gnomon doctor`"
)]
fn a_page_that_swap_has_lost_is_told() {
    let broken = Arc::new(AtomicBool::new(true));
    let swap = BadSwap { reads: true, broken };
    let config = HostMmConfig { check_evictions: false, ..memory(FRAMES) };
    let rig = Rig::with_backend(config, Box::new(swap));
    rig.write(3, &page(3));
    rig.evict(3);
    touch_is_told(rig, 3, "guest frame 0x3 cannot be brought in: ");
}

#[test]
#[cfg_attr(
    not(kernel_faults),
    ignore = "no userfaultfd for kernel-mode faults here: see `gnomon doctor`"
)]
fn a_fault_without_a_frame_is_told() {
    let broken = Arc::new(AtomicBool::new(false));
    let swap = BadSwap { reads: false, broken: broken.clone() };
    let config = HostMmConfig { check_evictions: false, ..memory(2 * FRAMES) };
    let rig = Rig::with_backend(config, Box::new(swap));
    (0..FRAMES).for_each(|number| rig.write(number, &page(number + 1)));
    broken.store(true, Ordering::SeqCst);
    touch_is_told(rig, FRAMES, "cannot be brought in: ");
}

/// A write that fails leaves the page where it is, readable and not writable until it is asked for.
#[test]
#[cfg_attr(
    not(kernel_faults),
    ignore = "no userfaultfd for kernel-mode faults here: see `gnomon doctor`"
)]
fn a_page_that_cannot_be_written_out_stays() {
    let broken = Arc::new(AtomicBool::new(true));
    let swap = BadSwap { reads: false, broken: broken.clone() };
    let config = HostMmConfig { check_evictions: false, ..memory(FRAMES) };
    let rig = Rig::with_backend(config, Box::new(swap));
    rig.write(3, &page(3));
    rig.settle_ahead();
    assert!(rig.mm.evict_frames(&[super::rig::pfn(3)]).is_err());
    assert!(rig.is_resident(3));
    let faults = rig.mmu.stats().faults;
    assert!(rig.read(3) == page(3));
    assert_eq!(rig.mmu.stats().faults, faults, "it is mapped still");
    rig.assert_sound();
    rig.write(3, &page(4));
    assert!(rig.read(3) == page(4));
    assert_eq!(rig.mmu.stats().upgrades, 1);
    rig.assert_sound();
}

/// The end of the layer does not wait for a removal that nobody reads any more, and lets it go.
#[test]
#[cfg_attr(
    not(kernel_faults),
    ignore = "no userfaultfd for kernel-mode faults here: see `gnomon doctor`"
)]
fn the_end_lets_everybody_go() {
    for _ in 0..20 {
        let rig = Rig::new(memory(FRAMES), DirectConfig::default());
        (0..32).for_each(|number| rig.write(number, &page(number + 1)));
        let region = rig.window().region().clone();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let remover = thread::spawn(move || {
            while !stopped.load(Ordering::SeqCst) {
                crate::sys::memory::remove(&region, 8 * PAGE_SIZE, 8 * PAGE_SIZE).unwrap();
                // Else hardly a change of the page tables would come in between.
                thread::sleep(Duration::from_micros(200));
            }
        });
        eventually(|| rig.mmu.stats().removed > 0);
        let mm = rig.mm.clone();
        drop(rig);
        stop.store(true, Ordering::SeqCst);
        remover.join().unwrap();
        assert_eq!(mm.stats().frames_in_use, 0);
        assert_eq!(mm.violations().1, 0);
    }
}
