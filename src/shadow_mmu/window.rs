//! How many SPTEs to install around a fault: as many as get used.
//!
//! Guarantee: between [`Window::LEAST`] and a whole leaf table. It doubles as long as at least half of what
//! was installed around the last fault in the table has been used since, and halves when less than a quarter
//! was: pages that lie beside each other and are not used together cost no more than they must.

use std::ops::Range;

use crate::shadow_mmu::tables::ENTRIES;

/// How many entries of a leaf table, that of the fault among them: a power of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Window(usize);

impl Window {
    /// Of a table of which nothing is known, when nothing is known of others.
    pub(super) const START: Self = Self(16);
    /// Fewer would not show that neighbours are used again.
    pub(super) const LEAST: usize = 4;

    /// The aligned group of entries around one.
    pub(super) fn around(self, index: usize) -> Range<usize> {
        let first = index - index % self.0;
        first..first + self.0
    }

    /// The next window, if `used` of the SPTEs that stand since the last fault were used.
    pub(super) fn judged(self, standing: usize, used: usize) -> Self {
        match standing {
            0 => self,
            _ if 2 * used >= standing => Self((2 * self.0).min(ENTRIES)),
            _ if 4 * used < standing => Self((self.0 / 2).max(Self::LEAST)),
            _ => self,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_is_the_aligned_group_around_an_entry() {
        assert_eq!(Window::START.around(0), 0..16);
        assert_eq!(Window::START.around(31), 16..32);
        assert_eq!(Window(ENTRIES).around(300), 0..ENTRIES);
    }

    #[test]
    fn it_grows_to_a_table_while_neighbours_are_used_and_shrinks_while_they_are_not() {
        let mut window = Window::START;
        let mut seen = Vec::new();
        for _ in 0..6 {
            window = window.judged(14, 7);
            seen.push(window.0);
        }
        assert_eq!(seen, [32, 64, 128, 256, 512, 512]);
        for _ in 0..9 {
            window = window.judged(100, 24);
        }
        assert_eq!(window.0, Window::LEAST);
        assert_eq!(window.judged(4, 1), window, "a quarter is neither");
        assert_eq!(window.judged(0, 0), window, "the host took them all: nothing is to be learnt");
    }
}
