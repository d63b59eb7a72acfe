//! What the fuzz targets share: the way into Gnomon, and an allocator that refuses what no input
//! may cause.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Most bytes of one allocation. An input has a few KiB, so nothing that grows with it comes near;
/// libFuzzer's own limit is for the sum.
static MAX_ALLOCATION_BYTES: AtomicUsize = AtomicUsize::new(32 << 20);

struct Bounded;

#[global_allocator]
static ALLOCATOR: Bounded = Bounded;

fn check(bytes: usize) {
    // Relaxed: a number that stands before the first input.
    let most = MAX_ALLOCATION_BYTES.load(Ordering::Relaxed);
    assert!(bytes <= most, "an allocation of {bytes} bytes");
}

// SAFETY: every call is the system allocator's, with the caller's arguments, or panics; and a panic
// ends the process, as libFuzzer's hook aborts before anything unwinds.
unsafe impl GlobalAlloc for Bounded {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        check(layout.size());
        // SAFETY: as promised by the caller.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as promised by the caller.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        check(layout.size());
        // SAFETY: as promised by the caller.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        check(bytes);
        // SAFETY: as promised by the caller.
        unsafe { System.realloc(pointer, layout, bytes) }
    }
}

/// Allows a target more bytes in one allocation, where that is its promise.
pub fn allow_allocations(most_bytes: usize) {
    MAX_ALLOCATION_BYTES.store(most_bytes, Ordering::Relaxed);
}

/// Runs one input of the target with this name.
pub fn run(target: &str, data: &[u8]) {
    gnomon::fuzzing::run(target, data);
}
