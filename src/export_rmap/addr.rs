//! Address newtypes: a guest address is never mistaken for a host frame, nor a frame for a swap slot.

use std::fmt;

/// Bytes in a page, and in a frame.
pub const PAGE_SIZE: usize = 4096;
/// [`PAGE_SIZE`] for arithmetic on addresses.
pub const PAGE_SIZE_U64: u64 = 4096;
/// log2 of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(u64);

        impl $name {
            /// Wraps a raw value.
            #[must_use]
            pub const fn new(raw: u64) -> Self {
                Self(raw)
            }

            /// The raw value.
            #[must_use]
            pub const fn as_u64(self) -> u64 {
                self.0
            }

            /// `self + offset`, or `None` past the end of the 64-bit space.
            #[must_use]
            pub const fn checked_add(self, offset: u64) -> Option<Self> {
                match self.0.checked_add(offset) {
                    Some(sum) => Some(Self(sum)),
                    None => None,
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }
    };
}

macro_rules! byte_address {
    ($name:ident) => {
        impl $name {
            /// Offset in bytes inside its page.
            #[must_use]
            pub const fn page_offset(self) -> usize {
                // Masked to 12 bits: fits every usize.
                #[allow(clippy::cast_possible_truncation)]
                let offset = (self.0 & (PAGE_SIZE_U64 - 1)) as usize;
                offset
            }

            /// The address of its page's first byte.
            #[must_use]
            pub const fn page_base(self) -> Self {
                Self(self.0 & !(PAGE_SIZE_U64 - 1))
            }
        }
    };
}

address! {
    /// Guest virtual address.
    Gva
}
address! {
    /// Guest physical address.
    Gpa
}
address! {
    /// Guest frame number: guest physical address / 4096.
    Gfn
}

byte_address!(Gva);
byte_address!(Gpa);

impl Gpa {
    /// The guest frame that holds this address.
    #[must_use]
    pub const fn gfn(self) -> Gfn {
        Gfn(self.0 >> PAGE_SHIFT)
    }
}

impl Gfn {
    /// The frame's first byte.
    #[must_use]
    pub const fn base(self) -> Gpa {
        Gpa(self.0 << PAGE_SHIFT)
    }
}

/// Number of a host page frame in the frame table.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pfn(u32);

impl Pfn {
    /// Wraps a raw frame number.
    #[must_use]
    pub const fn new(raw: u32) -> Self {
        Self(raw)
    }

    /// The raw frame number.
    #[must_use]
    pub const fn as_u32(self) -> u32 {
        self.0
    }

    /// The frame number as an index.
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }

    /// Byte offset of the frame in the frames' memfd and in each view of it.
    #[must_use]
    pub const fn byte_offset(self) -> u64 {
        (self.0 as u64) << PAGE_SHIFT
    }
}

impl fmt::Display for Pfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Debug for Pfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pfn({:#x})", self.0)
    }
}

/// Number of a page-sized place in swap, below [`SwapSlot::MAX_SLOTS`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SwapSlot(u32);

impl SwapSlot {
    /// Most slots that swap can have: 2^31 - 1, just under 8 TiB.
    pub const MAX_SLOTS: u32 = i32::MAX.cast_unsigned();

    /// A slot from its number; `None` from [`Self::MAX_SLOTS`] on.
    #[must_use]
    pub const fn new(raw: u32) -> Option<Self> {
        if raw < Self::MAX_SLOTS { Some(Self(raw)) } else { None }
    }

    /// The slot `distance` after slot number `first`. The caller knows that both are in range;
    /// beyond it, the number is one that no swap has.
    #[must_use]
    pub fn at(first: u32, distance: usize) -> Self {
        let distance = u32::try_from(distance).unwrap_or(u32::MAX);
        Self(first.saturating_add(distance).min(Self::MAX_SLOTS))
    }

    /// The number.
    #[must_use]
    pub const fn as_u32(self) -> u32 {
        self.0
    }

    /// The number as an index.
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }

    /// Byte offset of the slot in a swap file.
    #[must_use]
    pub const fn byte_offset(self) -> u64 {
        self.0 as u64 * PAGE_SIZE_U64
    }
}

impl fmt::Display for SwapSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl fmt::Debug for SwapSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SwapSlot({})", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_splits_into_page_and_offset() {
        let gpa = Gpa::new(0x12_3456);
        assert_eq!(gpa.gfn(), Gfn::new(0x123));
        assert_eq!(gpa.page_offset(), 0x456);
        assert_eq!(gpa.gfn().base(), gpa.page_base());
        assert_eq!(Gva::new(u64::MAX).checked_add(1), None);
        assert_eq!(Pfn::new(u32::MAX).byte_offset(), 0x0fff_ffff_f000);
    }
}
