//! What the fuzz targets share: the way into Gnomon, and an allocator that refuses what no input
//! may cause.

use std::alloc::{GlobalAlloc, Layout, System};

/// Most bytes of one allocation. An input has a few KiB, so nothing that grows with it comes near;
/// libFuzzer's own limit is for the sum.
const MAX_ALLOCATION_BYTES: usize = 32 << 20;

struct Bounded;

#[global_allocator]
static ALLOCATOR: Bounded = Bounded;

fn check(bytes: usize) {
    assert!(bytes <= MAX_ALLOCATION_BYTES, "an allocation of {bytes} bytes");
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

/// Runs one input of the target with this name.
pub fn run(target: &str, data: &[u8]) {
    gnomon::fuzzing::run(target, data);
}
