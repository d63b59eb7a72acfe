//! Pseudo-random numbers: the same seed gives the same run.

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// A bijection on `u64` in which every bit of the input moves about half of the output's bits
/// (SplitMix64's finaliser).
#[inline]
pub fn mix(value: u64) -> u64 {
    let x = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A SplitMix64 generator.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// A generator of its own for each `stream` under one seed.
    pub fn new(seed: u64, stream: u64) -> Rng {
        Rng(mix(seed ^ mix(stream.wrapping_add(GOLDEN))))
    }

    /// As [`new`](Self::new), of its own for each `generation` of a VM, too; the first, 0, has that
    /// of `new`.
    pub fn of_generation(seed: u64, stream: u64, generation: u64) -> Rng {
        Rng::new(seed ^ mix(generation), stream)
    }

    /// The next 64 bits.
    #[inline]
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(GOLDEN);
        mix(self.0)
    }

    /// A number below `bound`, or 0 if `bound` is 0. The bias is below `bound / 2^64`.
    #[inline]
    pub fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next_u64()) * u128::from(bound)) >> 64) as u64
    }

    /// True in `percent` of 100 calls.
    #[inline]
    pub fn percent(&mut self, percent: u8) -> bool {
        self.below(100) < u64::from(percent)
    }
}
