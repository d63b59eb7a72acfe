//! What the window's page tables may hold, one byte a page.
//!
//! Guarantee: the kernel's page tables allow no more than this says: a page that is mapped there is
//! [`MAPPED`](State::MAPPED) here (but for read-only mappings of pages in their frames, see the
//! [layer](crate::direct_mmu)), and one that can be written there is [`WRITABLE`](State::WRITABLE)
//! or [`PROTECT_DUE`](State::PROTECT_DUE) here. They may hold less: ageing zaps and forgets nothing.
//!
//! A byte changes under the MMU lock; `PROTECT_DUE` is cleared under the page lock alone.

use std::sync::atomic::{AtomicU8, Ordering};

use bitflags::bitflags;

use crate::sync::zeroed;

bitflags! {
    /// The state of one page.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) struct State: u8 {
        /// The page may be mapped: it has an entry in the reverse map.
        const MAPPED = 1 << 0;
        /// The page may be written, and counts as written.
        const WRITABLE = 1 << 1;
        /// The page was mapped since it was last asked whether it was used.
        const ACCESSED = 1 << 2;
        /// The right to write was taken back here and handed over as dirty state, but not yet in the
        /// kernel's page tables.
        const PROTECT_DUE = 1 << 3;
    }
}

/// The states of all pages, at first none; memory is taken for those that are used alone.
#[derive(Debug)]
pub(super) struct Table(Box<[AtomicU8]>);

impl Table {
    pub(super) fn new(pages: usize) -> Self {
        Self(zeroed(pages))
    }

    pub(super) fn pages(&self) -> u64 {
        self.0.len() as u64
    }

    fn byte(&self, page: u64) -> Option<&AtomicU8> {
        self.0.get(usize::try_from(page).ok()?)
    }

    pub(super) fn get(&self, page: u64) -> State {
        let raw = self.byte(page).map_or(0, |byte| byte.load(Ordering::Acquire));
        State::from_bits_truncate(raw)
    }

    pub(super) fn set(&self, page: u64, state: State) {
        if let Some(byte) = self.byte(page) {
            byte.fetch_or(state.bits(), Ordering::AcqRel);
        }
    }

    /// Clears bits; returns the state before.
    pub(super) fn clear(&self, page: u64, state: State) -> State {
        let raw = self.byte(page).map_or(0, |byte| byte.fetch_and(!state.bits(), Ordering::AcqRel));
        State::from_bits_truncate(raw)
    }
}
