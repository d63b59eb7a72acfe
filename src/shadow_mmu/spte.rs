//! The bits of page-table entries: Intel SDM vol. 3, 4.5; AMD APM vol. 2, 5.3.

use bitflags::bitflags;

bitflags! {
    /// Bits of an entry, the guest's or ours.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) struct Pte: u64 {
        const PRESENT = 1 << 0;
        const WRITABLE = 1 << 1;
        const USER = 1 << 2;
        const ACCESSED = 1 << 5;
        const DIRTY = 1 << 6;
        /// In a directory entry: maps a large page.
        const PAGE_SIZE = 1 << 7;
        /// Ours, in an SPTE (ignored by hardware): made from a guest page of 2 MiB.
        const FROM_2M = 1 << 9;
        /// Ours, in an SPTE: made from a guest page of 1 GiB.
        const FROM_1G = 1 << 10;
        const NO_EXECUTE = 1 << 63;
        /// All other bits, the address among them, are kept by every operation.
        const _ = !0;
    }
}

/// Bits 51..12: the address.
pub(super) const ADDRESS_MASK: u64 = 0x000f_ffff_ffff_f000;

impl Pte {
    /// An entry of our upper levels: rights are decided by the leaf alone. Accessed is preset, so
    /// that hardware has nothing to write.
    pub(super) const TABLE: Self =
        Self::PRESENT.union(Self::WRITABLE).union(Self::USER).union(Self::ACCESSED);

    pub(super) const fn of(raw: u64) -> Self {
        Self::from_bits_retain(raw)
    }

    pub(super) const fn address(self) -> u64 {
        self.bits() & ADDRESS_MASK
    }

    pub(super) const fn at(self, address: u64) -> Self {
        Self::of(self.bits() | (address & ADDRESS_MASK))
    }

    pub(super) const fn is_present(self) -> bool {
        self.contains(Self::PRESENT)
    }
}
