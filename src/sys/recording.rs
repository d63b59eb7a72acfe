//! Discards that are noted instead of made, for tests of what is above them: a call of the kernel
//! costs microseconds, and the page fault after it more, where a step of such a test takes less.
//!
//! What a [`Recording`] hands out stands for the kernel's word that these addresses are no longer
//! mapped. Everything down to the system call is done as ever, the checks included; content is not
//! touched by a discard and stays where it is.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::Range;

thread_local! {
    /// Addresses discarded by this thread since they were taken; `None` unless it records.
    static DISCARDED: RefCell<Option<Vec<Range<usize>>>> = const { RefCell::new(None) };
}

/// As long as it lives, discards of this thread are noted and not made.
#[derive(Debug)]
pub(crate) struct Recording {
    /// Of this thread alone.
    _thread: PhantomData<*const ()>,
}

impl Recording {
    /// # Panics
    /// If this thread records already.
    pub(crate) fn start() -> Self {
        let before = DISCARDED.with(|cell| cell.borrow_mut().replace(Vec::new()));
        assert!(before.is_none(), "one recording at a time");
        Self { _thread: PhantomData }
    }

    /// The addresses discarded since the last call.
    pub(crate) fn take(&self) -> Vec<Range<usize>> {
        DISCARDED.with(|cell| cell.borrow_mut().as_mut().map(std::mem::take).unwrap_or_default())
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        DISCARDED.with(|cell| cell.borrow_mut().take());
    }
}

/// Notes a discard; `false` if this thread does not record, so that it is to be made.
pub(super) fn note(start: usize, len: usize) -> bool {
    DISCARDED.with(|cell| {
        let mut cell = cell.borrow_mut();
        cell.as_mut().map(|discarded| discarded.push(start..start + len)).is_some()
    })
}
