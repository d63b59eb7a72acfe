//! Guest RAM above the kernel image, handed out once and never taken back.

use core::slice;

/// Bytes of a page.
pub const PAGE_BYTES: u64 = 4096;

/// A bump allocator over RAM that is mapped at its physical address.
pub struct FreeRam {
    next: u64,
    end: u64,
}

impl FreeRam {
    /// Free RAM from `start` (rounded up to a page) to `end`.
    ///
    /// # Safety
    /// The range is RAM that is all zeros, mapped at its physical address now and in every address
    /// space to come, and used by nothing else.
    pub unsafe fn new(start: u64, end: u64) -> FreeRam {
        FreeRam { next: start.next_multiple_of(PAGE_BYTES), end: end / PAGE_BYTES * PAGE_BYTES }
    }

    /// Whole pages left.
    pub fn pages_left(&self) -> u64 {
        (self.end - self.next) / PAGE_BYTES
    }

    /// Zeroed, contiguous pages; their physical address. Panics if there are not as many, as the
    /// guest can do nothing without them.
    pub fn take_pages(&mut self, count: u64) -> u64 {
        assert!(
            count <= self.pages_left(),
            "out of memory: {count} pages wanted, {} left; give the VM more",
            self.pages_left()
        );
        let address = self.next;
        self.next += count * PAGE_BYTES;
        address
    }

    /// The last `count` pages, or as many as there are; their physical address.
    pub fn take_pages_from_end(&mut self, count: u64) -> u64 {
        self.end -= count.min(self.pages_left()) * PAGE_BYTES;
        self.end
    }

    /// A place of its own for a value that comes later, for good.
    pub fn reserve<T>(&mut self) -> Reserved<T> {
        const { assert!(align_of::<T>() as u64 <= PAGE_BYTES) };
        let pages = (size_of::<T>() as u64).div_ceil(PAGE_BYTES);
        Reserved(self.take_pages(pages) as *mut T)
    }

    /// A slice in a place of its own, for good. `value` makes each element, knowing its address,
    /// from its index and what else it takes from this RAM.
    pub fn place_each<T>(
        &mut self,
        count: usize,
        mut value: impl FnMut(&mut FreeRam, usize, *const T) -> T,
    ) -> &'static [T] {
        const { assert!(align_of::<T>() as u64 <= PAGE_BYTES) };
        let pages = (size_of::<T>() as u64 * count as u64).div_ceil(PAGE_BYTES);
        let first = self.take_pages(pages) as *mut T;
        // SAFETY: fresh pages, large enough and aligned, mapped for good by `new`'s contract; every
        // element is written before the slice is made.
        unsafe {
            for i in 0..count {
                let element = first.add(i);
                element.write(value(self, i, element));
            }
            slice::from_raw_parts(first, count)
        }
    }
}

/// Room for a value in fresh pages.
pub struct Reserved<T>(*mut T);

impl<T> Reserved<T> {
    /// Puts the value there.
    pub fn fill(self, value: T) -> &'static T {
        // SAFETY: `reserve` took pages for it, large enough, aligned, and used by nothing else.
        unsafe {
            self.0.write(value);
            &*self.0
        }
    }
}
