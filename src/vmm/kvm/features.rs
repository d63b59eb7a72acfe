//! What the virtual processor offers that not every processor has.
//!
//! Guarantee: plain data, from which CPUID, the emulation and the real registers are all made: what
//! one of them lets a guest turn on, the others have.

/// What the virtual processor offers, taken from the supported CPUID leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// Width of a physical address in bits.
    pub phys_bits: u32,
    /// EFER.NXE exists.
    pub nx: bool,
    /// CR4.FSGSBASE exists.
    pub fsgsbase: bool,
    /// CR4.OSXSAVE exists.
    pub xsave: bool,
    /// XCR0 has AVX state.
    pub avx: bool,
}

impl Features {
    /// XCR0, where there is XSAVE: x87 and SSE, and AVX where there is.
    #[must_use]
    pub fn xcr0(&self) -> u64 {
        if self.avx { 0b111 } else { 0b011 }
    }
}
