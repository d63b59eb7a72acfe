//! Numbers that come and go.

use std::collections::VecDeque;

/// Gives out the numbers from 0 up to an end. One that was given back rests as long as there are
/// fresh ones, and then as long as others have rested longer: what still names the old bearer by it
/// (a late fault's frame, a page misread from swap) is more likely to be told from the new one.
#[derive(Debug)]
pub struct Numbers {
    fresh: u16,
    end: u16,
    used: VecDeque<u16>,
}

impl Numbers {
    /// All numbers below `end`.
    pub const fn below(end: u16) -> Self {
        Self { fresh: 0, end, used: VecDeque::new() }
    }

    /// One that nobody has.
    pub fn take(&mut self) -> Option<u16> {
        if self.fresh == self.end {
            return self.used.pop_front();
        }
        self.fresh += 1;
        Some(self.fresh - 1)
    }

    /// Takes one back, which its bearer uses no more.
    pub fn give_back(&mut self, number: u16) {
        self.used.push_back(number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fresh_numbers_come_first_then_the_one_that_rested_longest() {
        let mut numbers = Numbers::below(3);
        assert_eq!([numbers.take(), numbers.take()], [Some(0), Some(1)]);
        numbers.give_back(1);
        numbers.give_back(0);
        assert_eq!(numbers.take(), Some(2));
        assert_eq!([numbers.take(), numbers.take()], [Some(1), Some(0)]);
        assert_eq!(numbers.take(), None);
    }
}
