//! Where in a page that the oracle (`guest/src/oracle.rs`) writes what is, for those who read pages without
//! the ledger.
//!
//! | word | content |
//! |---|---|
//! | 0 | page number (guest frame number) in bits 39..0, magic number of the seed above |
//! | 1 | version: 1 for the first write, as in the ledger |
//! | 2 | checksum: wrapping sum of words 3 to 511, plus the seed's magic number |
//! | 3..511 | body: first pseudo-random words, then one word repeated (see `entropy_percent`) |
//! | 511 | a number that the page's owner chose, such as the next page of a chase |

/// Words in a page.
pub const WORDS: usize = 512;
/// First word of the body.
pub const BODY: usize = 3;
/// The word that holds the number that the page's owner chose.
pub const LINK: usize = WORDS - 1;
/// Bits of the page's number in word 0; the magic number of the seed is above.
pub const NUMBER_BITS: u32 = 40;
