//! Discards that are noted instead of made, for tests of what is above them: a call of the kernel
//! costs microseconds, and the page fault after it more, where a step of such a test takes less.
//!
//! What a [`Recording`] hands out stands for the kernel's word that these addresses are no longer
//! mapped. Everything down to the system call is done as ever, the checks included; content is not
//! touched by a discard and stays where it is.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::Range;

use nix::errno::Errno;

thread_local! {
    /// `None` unless this thread records.
    static NOTES: RefCell<Option<Notes>> = const { RefCell::new(None) };
}

#[derive(Debug, Default)]
struct Notes {
    /// Addresses discarded since they were taken.
    discarded: Vec<Range<usize>>,
    /// What the next discards come to instead.
    refused: Option<Errno>,
}

/// As long as it lives, discards of this thread are noted and not made.
#[derive(Debug)]
pub struct Recording {
    /// Of this thread alone.
    _thread: PhantomData<*const ()>,
}

impl Recording {
    /// # Panics
    /// If this thread records already.
    pub fn start() -> Self {
        let before = NOTES.with(|cell| cell.borrow_mut().replace(Notes::default()));
        assert!(before.is_none(), "one recording at a time");
        Self { _thread: PhantomData }
    }

    /// The addresses discarded since the last call.
    pub fn take(&self) -> Vec<Range<usize>> {
        Self::notes(|notes| std::mem::take(&mut notes.discarded)).unwrap_or_default()
    }

    /// From now on discards fail with this errno, as the kernel's may, and are not noted; with `None`
    /// they succeed again.
    pub fn refuse(&self, errno: Option<Errno>) {
        Self::notes(|notes| notes.refused = errno);
    }

    fn notes<T>(change: impl FnOnce(&mut Notes) -> T) -> Option<T> {
        NOTES.with(|cell| cell.borrow_mut().as_mut().map(change))
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        NOTES.with(|cell| cell.borrow_mut().take());
    }
}

/// What a discard comes to that is noted or refused; `None` if this thread does not record, so that
/// it is to be made.
pub(super) fn note(start: usize, len: usize) -> Option<Result<(), Errno>> {
    Recording::notes(|notes| {
        if let Some(errno) = notes.refused {
            return Err(errno);
        }
        notes.discarded.push(start..start + len);
        Ok(())
    })
}
