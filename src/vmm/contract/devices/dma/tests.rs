//! The device: its queue, its thread, its end.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::addr::Gfn;

use super::*;

/// Memory without a guest.
pub(in crate::vmm::contract::devices) struct FakeRam {
    bytes: Mutex<Vec<u8>>,
    /// From now on the host fails.
    pub(in crate::vmm::contract::devices) fails: AtomicBool,
}

impl FakeRam {
    pub(in crate::vmm::contract::devices) fn new(len: usize) -> Self {
        Self { bytes: Mutex::new(vec![0; len]), fails: AtomicBool::new(false) }
    }

    /// The memory, to look at and to change.
    pub(super) fn content(&self) -> MutexGuard<'_, Vec<u8>> {
        lock(&self.bytes)
    }

    fn access(&self, gpa: Gpa, len: usize, touch: impl FnOnce(&mut [u8])) -> Result<(), MmError> {
        if self.fails.load(Ordering::Relaxed) {
            return Err(MmError::OutOfFrames { gfn: Gfn::new(0), why: "it fails".into() });
        }
        let start = usize::try_from(gpa.as_u64()).unwrap();
        // Outside is a bug of the device's: a panic here fails the test.
        touch(&mut lock(&self.bytes)[start..start + len]);
        Ok(())
    }
}

impl DmaMemory for FakeRam {
    fn bytes(&self) -> u64 {
        lock(&self.bytes).len() as u64
    }

    fn read(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), MmError> {
        self.access(gpa, buf.len(), |bytes| buf.copy_from_slice(bytes))
    }

    fn write(&self, gpa: Gpa, buf: &[u8]) -> Result<(), MmError> {
        self.access(gpa, buf.len(), |bytes| bytes.copy_from_slice(buf))
    }

    fn store(&self, gpa: Gpa, word: u32) -> Result<(), MmError> {
        assert_eq!(gpa.as_u64() % 4, 0);
        self.write(gpa, &word.to_le_bytes())
    }
}

fn device(len: usize) -> (Arc<FakeRam>, DmaDevice) {
    let ram = Arc::new(FakeRam::new(len));
    (ram.clone(), DmaDevice::new(ram))
}

/// Serves on a thread of its own while `meanwhile` runs, then stops.
fn serving(device: &DmaDevice, meanwhile: impl FnOnce()) -> Result<(), MmError> {
    device.starting();
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let served = device.serve();
            device.over();
            served
        });
        meanwhile();
        device.stop();
        assert!(device.wait_until_over(&mut None));
        thread.join().unwrap()
    })
}

fn drain(device: &DmaDevice) {
    while device.unfinished() > 0 {
        std::thread::yield_now();
    }
}

#[test]
fn descriptors_are_served_in_order() {
    // A chain of fills, each over the one before it.
    let (ram, device) = device(64 * 128);
    for number in 0..16u8 {
        let at = usize::from(number) * 128;
        let mut content = ram.content();
        content[at] = 2;
        content[at + 16..at + 24].copy_from_slice(&4096u64.to_le_bytes());
        content[at + 24] = 8;
        content[at + 32..at + 40].fill(number + 1);
    }
    for number in 0..16 {
        device.ring(number);
    }
    serving(&device, || drain(&device)).unwrap();
    assert_eq!(ram.content()[4096..4104], [16; 8]);
    assert!((0..16).all(|number| ram.content()[number * 128 + 4] == 1), "all are done");
    let stats = device.stats();
    assert_eq!((stats.operations, stats.bytes, stats.refused), (16, 128, 0));
}

#[test]
fn a_doorbell_waits_for_room_and_goes_on_at_the_end() {
    let (_ram, device) = device(4096);
    let fill = |device: &DmaDevice| (0..abi::DMA_QUEUE).for_each(|_| device.ring(0));
    let has_waited = |device: &DmaDevice| {
        while device.stats().full_queue_waits == 0 {
            std::thread::yield_now();
        }
    };
    fill(&device);
    std::thread::scope(|scope| {
        let ringer = scope.spawn(|| device.ring(1));
        has_waited(&device);
        assert_eq!(device.unfinished() as usize, abi::DMA_QUEUE);
        assert!(!ringer.is_finished());
        serving(&device, || {
            ringer.join().unwrap();
            drain(&device);
        })
        .unwrap();
    });
    assert_eq!(device.stats().refused, abi::DMA_QUEUE as u64 + 1);

    let (_ram, device) = self::device(4096);
    fill(&device);
    std::thread::scope(|scope| {
        scope.spawn(|| device.ring(1));
        has_waited(&device);
        device.stop();
    });
    assert_eq!(device.unfinished() as usize, abi::DMA_QUEUE, "it was not taken");
    device.ring(1);
    assert_eq!(device.unfinished() as usize, abi::DMA_QUEUE, "nor is any after the end");
}

#[test]
fn a_host_that_fails_ends_the_service() {
    let (ram, device) = device(4096);
    ram.fails.store(true, Ordering::Relaxed);
    device.ring(0);
    let failed = device.serve().unwrap_err();
    assert!(matches!(failed, MmError::OutOfFrames { .. }), "{failed}");
}

#[test]
fn nobody_waits_for_a_thread_that_never_was() {
    let (_ram, device) = device(4096);
    assert!(device.wait_until_over(&mut None));
    device.starting();
    assert!(!device.wait_until_over(&mut Some(Patience::new(Duration::ZERO))));
    device.over();
    assert!(device.wait_until_over(&mut None));
}

#[test]
fn whoever_wants_it_idle_waits_while_it_works_but_not_for_ever() {
    let wait = |device: &DmaDevice, limit| device.wait_until_idle(&mut BriefWait::of(limit));
    let (ram, device) = device(4096);
    assert!(matches!(wait(&device, Duration::ZERO), Err(VmError::NotRunning)));
    device.ring(0);
    // Its thread waits for memory, as for a page that a peer holds.
    let held = ram.content();
    serving(&device, || {
        let too_long = wait(&device, Duration::from_millis(1));
        assert!(matches!(too_long, Err(VmError::NotInTime)));
        {
            let _stop = crate::sys::signal::pretended::Stop::after(3);
            let interrupted = wait(&device, Duration::from_secs(3600));
            assert!(matches!(interrupted, Err(VmError::NotInTime)));
        }
        assert_eq!(device.unfinished(), 1);
        drop(held);
        wait(&device, Duration::from_secs(3600)).unwrap();
        assert_eq!(device.unfinished(), 0);
    })
    .unwrap();
    assert!(matches!(wait(&device, Duration::ZERO), Err(VmError::NotRunning)));
}

#[test]
fn only_descriptors_in_ram_are_taken() {
    let (_ram, device) = device(4096);
    for number in [32, 33, u32::MAX] {
        device.ring(number);
    }
    device.ring(31);
    assert_eq!((device.unfinished(), device.stats().ignored_doorbells), (1, 3));
}
