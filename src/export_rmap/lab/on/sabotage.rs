//! One rule that is broken, and for which pages.

use std::sync::atomic::{AtomicU64, Ordering};

use super::{OfPage, Rule};
use crate::addr::Gfn;

/// The rule, and the guest frames to whose pages that applies.
#[derive(Debug)]
pub(super) struct Sabotage {
    rule: Option<Rule>,
    first: AtomicU64,
    end: AtomicU64,
}

impl Sabotage {
    pub(super) fn new(rule: Option<Rule>) -> Self {
        Self { rule, first: AtomicU64::new(0), end: AtomicU64::new(u64::MAX) }
    }

    pub(super) fn is(&self, rule: Rule) -> bool {
        self.rule == Some(rule)
    }

    pub(super) fn limit(&self, first: Gfn, count: u64) {
        // Emptied first: a reader in between finds no page rather than a wrong one.
        self.end.store(0, Ordering::Relaxed);
        self.first.store(first.as_u64(), Ordering::Release);
        self.end.store(first.as_u64().saturating_add(count), Ordering::Release);
    }

    pub(super) fn includes(&self, gfn: Gfn) -> bool {
        gfn.as_u64() < self.end.load(Ordering::Acquire)
            && gfn.as_u64() >= self.first.load(Ordering::Acquire)
    }

    /// A page that several have is watched by no oracle: it is included if every page is.
    pub(super) fn includes_page(&self, page: OfPage) -> bool {
        match page.0 {
            Some(gfn) => self.includes(gfn),
            None => self.end.load(Ordering::Acquire) == u64::MAX,
        }
    }
}
