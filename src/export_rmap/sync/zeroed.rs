//! Tables of atomics that take memory only where they have been used: a guest may have more pages than
//! this machine has memory for descriptors of.
//!
//! Guarantee: every element begins as zeros, and none of them has been written. From the allocator such
//! memory comes from the kernel as it is wanted, so that a table costs neither time nor memory in
//! proportion to its length.

/// What may begin as zeros.
#[cfg(not(any(loom, shuttle)))]
pub use zerocopy::FromZeros as Zeroed;

/// The model checkers' atomics have to be made one by one.
#[cfg(any(loom, shuttle))]
pub use std::default::Default as Zeroed;

/// A table of so many elements.
#[must_use]
#[cfg(not(any(loom, shuttle)))]
pub fn zeroed<T: Zeroed>(count: usize) -> Box<[T]> {
    use std::alloc::{Layout, handle_alloc_error};

    // As any other allocation that fails, in `Box::new` and elsewhere.
    <[T]>::new_box_zeroed_with_elems(count).unwrap_or_else(|_| {
        handle_alloc_error(Layout::array::<T>(count).unwrap_or(Layout::new::<T>()))
    })
}

/// A table of so many elements.
#[must_use]
#[cfg(any(loom, shuttle))]
pub fn zeroed<T: Zeroed>(count: usize) -> Box<[T]> {
    (0..count).map(|_| T::default()).collect()
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use std::sync::atomic::{AtomicU8, Ordering};

    use super::*;
    use crate::addr::PAGE_SIZE;
    use gnomon_sys::pagemap;

    #[test]
    fn a_table_takes_memory_only_where_it_was_used() {
        const BYTES: usize = 64 << 20;
        let table: Box<[AtomicU8]> = zeroed(BYTES);
        let used = [5 * PAGE_SIZE, BYTES / 2];
        used.iter().for_each(|&at| table[at].store(1, Ordering::Relaxed));
        let file = pagemap::file().unwrap();
        let is_present = |at: &usize| {
            let address = table.as_ptr().wrapping_add(*at).addr();
            pagemap::entry_at(&file, address).unwrap().is_present()
        };
        assert!(used.iter().all(is_present));
        // Two huge pages at most, where the kernel gives those.
        let present = (0..BYTES).step_by(PAGE_SIZE).filter(is_present).count();
        assert!(present <= 4 << 20 >> 12, "{present}");
        assert!(
            (0..BYTES)
                .step_by(97 * PAGE_SIZE + 1)
                .all(|at| { used.contains(&at) || table[at].load(Ordering::Relaxed) == 0 })
        );
    }
}
