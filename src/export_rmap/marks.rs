//! Words that hardware marks: an entry of a page table, in which a processor sets accessed and dirty bits at
//! any time, as long as it may use the entry.
//!
//! Guarantee: each change is one atomic step, which returns what was there. So a mark that hardware sets is
//! in what was returned, or it is set in what stands there from then on; it is never lost between a look
//! and a change.

/// A word of 64 bits that several threads, and hardware, change. Acquire and release in each step: what was
/// done by way of the entry before is seen by who changes it, and who finds it changed sees why.
pub trait Word {
    /// Exchanges the word.
    fn swap(&self, new: u64) -> u64;
    /// Keeps those bits of the word that are in `mask`.
    fn fetch_and(&self, mask: u64) -> u64;
    /// Adds bits to the word.
    fn fetch_or(&self, bits: u64) -> u64;
}

macro_rules! word {
    ($atomic:ty) => {
        impl Word for $atomic {
            fn swap(&self, new: u64) -> u64 {
                self.swap(new, crate::sync::Ordering::AcqRel)
            }

            fn fetch_and(&self, mask: u64) -> u64 {
                self.fetch_and(mask, crate::sync::Ordering::AcqRel)
            }

            fn fetch_or(&self, bits: u64) -> u64 {
                self.fetch_or(bits, crate::sync::Ordering::AcqRel)
            }
        }
    };
}

// Page tables are memory, which a model checker has no atomics for: its own are beside std's.
word!(std::sync::atomic::AtomicU64);
#[cfg(any(loom, shuttle))]
word!(crate::sync::AtomicU64);

/// Takes the mapping away; what it was, with all marks that were set while it stood.
pub fn take(word: &impl Word) -> u64 {
    word.swap(0)
}

/// Takes rights away, and with them the marks that say that they were used: a write is in what is returned,
/// or it needs the right again. What the mapping was.
pub fn restrict(word: &impl Word, lost: u64) -> u64 {
    word.fetch_and(!lost)
}

/// Clears a mark alone; whether it was set.
pub fn age(word: &impl Word, mark: u64) -> bool {
    word.fetch_and(!mark) & mark != 0
}

/// Adds rights and marks; what the mapping was.
pub fn grant(word: &impl Word, rights: u64) -> u64 {
    word.fetch_or(rights)
}
