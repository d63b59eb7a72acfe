//! The DMA device, as a vCPU drives it: a descriptor and some memory of its own.

use core::hint::spin_loop;
use core::sync::atomic::Ordering;

use crate::memory::{FreeRam, PAGE_BYTES};
use crate::x86;
use gnomon_abi::{self as abi, DmaDescriptor};

/// Pages of a vCPU's buffer.
pub const BUFFER_PAGES: u64 = 4;

/// What the device is to do.
#[derive(Clone, Copy)]
pub struct Command {
    /// One of the `DMA_` commands.
    pub command: u32,
    /// Physical addresses.
    pub source: u64,
    pub destination: u64,
    pub bytes: u64,
    pub pattern: u64,
}

/// What the device said.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Answer {
    /// `DMA_DONE` or `DMA_ERROR`.
    pub status: u32,
    pub result: u64,
}

/// One vCPU's descriptor and buffer, at their physical addresses.
pub struct DmaUnit {
    descriptor: u64,
    buffer: u64,
}

impl DmaUnit {
    /// The units of all vCPUs.
    pub fn place_all(ram: &mut FreeRam, vcpus: u32) -> &'static [DmaUnit] {
        ram.place_each(vcpus as usize, |ram, _, _| DmaUnit {
            descriptor: ram.take_pages(1),
            buffer: ram.take_pages(BUFFER_PAGES),
        })
    }

    /// Address of the buffer: [`BUFFER_PAGES`] pages that only this vCPU and the device use.
    pub fn buffer(&self) -> u64 {
        self.buffer
    }

    /// Address of the descriptor.
    pub fn descriptor(&self) -> u64 {
        self.descriptor
    }

    /// Hands a command over. The one before it must have been answered.
    pub fn start(&self, command: &Command) {
        let descriptor = self.descriptor as *mut DmaDescriptor;
        // SAFETY: the page is this unit's, mapped for good, and the device is done with it.
        unsafe {
            (&raw mut (*descriptor).command).write_volatile(command.command);
            (&raw mut (*descriptor).source).write_volatile(command.source);
            (&raw mut (*descriptor).destination).write_volatile(command.destination);
            (&raw mut (*descriptor).bytes).write_volatile(command.bytes);
            (&raw mut (*descriptor).pattern).write_volatile(command.pattern);
            (*descriptor).result.store(u64::MAX, Ordering::Relaxed);
            (*descriptor).status.store(abi::DMA_PENDING, Ordering::Release);
        }
        x86::ring_dma((self.descriptor / abi::DMA_ALIGN) as u32);
    }

    /// The answer, if there is one.
    pub fn poll(&self) -> Option<Answer> {
        // SAFETY: the page is this unit's, mapped for good; what the device writes are atomics, and
        // nobody writes the rest while this reference lives.
        let descriptor = unsafe { &*(self.descriptor as *const DmaDescriptor) };
        // Acquire: what the device wrote before the status is seen after it.
        let status = descriptor.status.load(Ordering::Acquire);
        (status != abi::DMA_PENDING)
            .then(|| Answer { status, result: descriptor.result.load(Ordering::Relaxed) })
    }

    /// Waits for the answer.
    pub fn wait(&self) -> Answer {
        loop {
            if let Some(answer) = self.poll() {
                return answer;
            }
            spin_loop();
        }
    }

    /// Hands a command over and waits for the answer.
    pub fn run(&self, command: &Command) -> Answer {
        self.start(command);
        self.wait()
    }
}

/// The checksum of `count` 64-bit words, as the device has it.
///
/// # Safety
/// They can be read, are aligned, and nothing writes them meanwhile.
pub unsafe fn checksum(words: *const u64, count: usize) -> u64 {
    // SAFETY: the caller vouches for the words.
    (0..count).fold(0, |sum, word| abi::dma_checksum(sum, unsafe { words.add(word).read() }))
}

// The whole of a buffer is one command's at most.
const _: () = assert!(BUFFER_PAGES * PAGE_BYTES <= abi::DMA_MAX_BYTES);
