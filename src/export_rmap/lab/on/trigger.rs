//! When an injected fault strikes: by the number of the call, or by chance.

use std::fmt;
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicU64, Ordering};

use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Which calls are struck; they are numbered from 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum When {
    /// This one.
    Once(NonZeroU64),
    /// The first of these, and every so-manieth after it.
    Every {
        /// Number of the first.
        first: NonZeroU64,
        /// From one to the next.
        step: NonZeroU64,
    },
    /// Each with this probability, from above 0 to [`When::MAX_CHANCE`].
    Chance(f64),
}

impl When {
    /// Every call.
    pub const ALWAYS: Self = Self::Every { first: NonZeroU64::MIN, step: NonZeroU64::MIN };

    /// Highest probability: what is repeated until it works must work at some time.
    pub const MAX_CHANCE: f64 = 0.9;

    /// Whether call number `call` is struck, given the seed of the item's choices.
    fn includes(self, call: u64, seed: u64) -> bool {
        match self {
            Self::Once(number) => call == number.get(),
            Self::Every { first, step } => {
                call.checked_sub(first.get()).is_some_and(|after| after.is_multiple_of(step.get()))
            }
            // 53 bits are what an f64 holds.
            Self::Chance(chance) => {
                let draw = xxh3_64_with_seed(&call.to_le_bytes(), seed) >> 11;
                (draw as f64) < chance * (1u64 << 53) as f64
            }
        }
    }
}

/// As it is written behind the `@` of an item.
impl fmt::Display for When {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Once(number) => write!(f, "{number}"),
            Self::Every { first, step: NonZeroU64::MIN } => write!(f, "{first}+"),
            Self::Every { first, step } => write!(f, "{first}/{step}"),
            Self::Chance(chance) => write!(f, "{chance}"),
        }
    }
}

/// Counts calls and says which are struck.
#[derive(Debug)]
pub(super) struct Trigger {
    when: When,
    seed: u64,
    calls: AtomicU64,
    struck: AtomicU64,
}

impl Trigger {
    /// `item` tells the choices of items with the same seed apart.
    pub(super) fn new(when: When, seed: u64, item: u64) -> Self {
        let seed = xxh3_64_with_seed(&item.to_le_bytes(), seed);
        Self { when, seed, calls: AtomicU64::new(0), struck: AtomicU64::new(0) }
    }

    /// Counts a call; whether it is struck.
    pub(super) fn strikes(&self) -> bool {
        // Relaxed: each call needs a number of its own and orders nothing.
        let call = self.calls.fetch_add(1, Ordering::Relaxed) + 1;
        let struck = self.when.includes(call, self.seed);
        if struck {
            self.struck.fetch_add(1, Ordering::Relaxed);
        }
        struck
    }

    pub(super) fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    pub(super) fn struck(&self) -> u64 {
        self.struck.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(number: u64) -> NonZeroU64 {
        NonZeroU64::new(number).unwrap()
    }

    fn struck(when: When, seed: u64, calls: u64) -> Vec<u64> {
        let trigger = Trigger::new(when, seed, 0);
        let struck: Vec<u64> = (1..=calls).filter(|_| trigger.strikes()).collect();
        assert_eq!((trigger.calls(), trigger.struck()), (calls, struck.len() as u64));
        struck
    }

    #[test]
    fn calls_are_struck_by_number() {
        assert_eq!(struck(When::Once(number(3)), 0, 10), [3]);
        assert_eq!(struck(When::Every { first: number(8), step: number(1) }, 0, 10), [8, 9, 10]);
        assert_eq!(struck(When::Every { first: number(2), step: number(4) }, 0, 12), [2, 6, 10]);
        assert_eq!(struck(When::ALWAYS, 0, 2), [1, 2]);
        assert!(struck(When::Once(number(11)), 0, 10).is_empty());
    }

    #[test]
    fn chance_is_as_often_as_it_says_and_follows_the_seed() {
        for chance in [0.001, 0.01, 0.5, 0.9] {
            let hits = struck(When::Chance(chance), 7, 100_000).len() as f64;
            let expected = chance * 100_000.0;
            let deviation = (expected * (1.0 - chance)).sqrt();
            assert!((hits - expected).abs() < 5.0 * deviation, "{hits} at {chance}");
        }
        let of = |seed| struck(When::Chance(0.1), seed, 500);
        assert_eq!(of(1), of(1));
        assert_ne!(of(1), of(2));
        let other_item = Trigger::new(When::Chance(0.1), 1, 1);
        let other: Vec<u64> = (1..=500).filter(|_| other_item.strikes()).collect();
        assert_ne!(of(1), other, "items with one seed are struck independently");
    }

    #[test]
    fn it_is_written_as_on_the_command_line() {
        let written = [
            When::Once(number(5)),
            When::Every { first: number(5), step: number(1) },
            When::Every { first: number(5), step: number(3) },
            When::Chance(0.01),
        ]
        .map(|when| when.to_string());
        assert_eq!(written, ["5", "5+", "5/3", "0.01"]);
    }
}
