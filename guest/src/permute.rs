//! Orders of visit over `0 .. len`: a full cycle, a scrambling bijection, and Zipf ranks.
//!
//! Nothing here needs memory in proportion to `len`: both permutations are computed on the next
//! power of two, walking on until a value below `len` comes up. At most half of the values are
//! above, so that takes two steps on average.

use crate::rng::{Rng, mix};

fn mask_for(len: u64) -> u64 {
    len.next_power_of_two().wrapping_sub(1)
}

/// A permutation of `0 .. len` that is one single cycle: following it from any element visits
/// every other element before it returns.
///
/// On the power of two it is a linear congruential generator of full period (increment odd,
/// multiplier 1 modulo 4); leaving elements out of a cycle leaves a cycle.
#[derive(Clone, Debug)]
pub struct Cycle {
    len: u64,
    mask: u64,
    multiplier: u64,
    increment: u64,
}

impl Cycle {
    /// A cycle over `0 .. len`, another one for each seed; `len` is at least 1.
    pub fn new(len: u64, seed: u64) -> Cycle {
        Cycle {
            len: len.max(1),
            mask: mask_for(len.max(1)),
            multiplier: (mix(seed) & !3) | 5,
            increment: mix(seed ^ 0xc7c1_e000) | 1,
        }
    }

    /// The element after `element`.
    #[inline]
    pub fn next(&self, element: u64) -> u64 {
        let mut x = element;
        loop {
            x = x.wrapping_mul(self.multiplier).wrapping_add(self.increment) & self.mask;
            if x < self.len {
                return x;
            }
        }
    }
}

/// A permutation of `0 .. len` that sends neighbours far apart.
#[derive(Clone, Debug)]
pub struct Scramble {
    len: u64,
    mask: u64,
    shift: u32,
    odd: [u64; 2],
    offset: u64,
}

impl Scramble {
    /// A bijection on `0 .. len`, another one for each seed; `len` is at least 1.
    pub fn new(len: u64, seed: u64) -> Scramble {
        let mask = mask_for(len.max(1));
        Scramble {
            len: len.max(1),
            mask,
            shift: (mask.count_ones() / 2).max(1),
            odd: [mix(seed) | 1, mix(!seed) | 1],
            offset: mix(seed ^ 0x5c2a_3b1e),
        }
    }

    /// Where `element` goes.
    #[inline]
    pub fn apply(&self, element: u64) -> u64 {
        let mut x = element;
        loop {
            // Each step is invertible on the masked bits, so the whole is a bijection there.
            x = x.wrapping_mul(self.odd[0]).wrapping_add(self.offset) & self.mask;
            x ^= x >> self.shift;
            x = x.wrapping_mul(self.odd[1]) & self.mask;
            x ^= x >> self.shift;
            if x < self.len {
                return x;
            }
        }
    }
}

/// A rank in `0 .. len` drawn about as Zipf's law with exponent 1 has it: every octave of ranks
/// (1, 2-3, 4-7, …) is equally likely, and uniform inside. `len` is at least 1.
#[inline]
pub fn zipf_rank(rng: &mut Rng, len: u64) -> u64 {
    let octaves = u64::from(64 - len.leading_zeros());
    let first = 1_u64 << rng.below(octaves);
    let end = (first << 1).min(len.saturating_add(1));
    first + rng.below(end - first) - 1
}
