//! What a reader without the ledger can tell of a page of the test guest.

use core::fmt;

use crate::page_format::{BODY, NUMBER_BITS, WORDS};

/// A page as words.
pub type Words = [u64; WORDS];

/// What a page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Page {
    /// All zero: never written, or given back.
    Zero,
    /// As one write left it.
    Whole,
    /// With the right number, but not as any write left it: copied in the middle of one. The writer
    /// waits for the copy to be given up, so that must be asked for soon.
    Torn,
}

/// A page that cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrong {
    /// The number is another page's.
    Number {
        /// The number.
        found: u64,
    },
    /// The magic number is not that of the other pages.
    Magic {
        /// In the other pages.
        expected: u64,
        /// In this one.
        found: u64,
    },
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number { found } => write!(f, "carries the number of page {found:#x}"),
            Self::Magic { expected, found } => {
                write!(f, "carries the magic number {found:#x}, others of this guest {expected:#x}")
            }
        }
    }
}

impl core::error::Error for Wrong {}

/// Checks the pages of one guest: all of them carry the magic number of its seed, which the first one
/// tells.
#[derive(Clone, Copy, Debug, Default)]
pub struct Verifier {
    magic: Option<u64>,
}

impl Verifier {
    /// Checks the content of a page that the guest's oracle watches, by its guest frame number.
    ///
    /// # Errors
    /// [`Wrong`].
    pub fn check(&mut self, gfn: u64, words: &Words) -> Result<Page, Wrong> {
        let number = words[0] & ((1 << NUMBER_BITS) - 1);
        let magic = words[0] - number;
        if words[0] == 0 {
            // Before its first write is through, a page has no number yet.
            let is_zero = words.iter().all(|&word| word == 0);
            return Ok(if is_zero { Page::Zero } else { Page::Torn });
        }
        if number != gfn {
            return Err(Wrong::Number { found: number });
        }
        let expected = *self.magic.get_or_insert(magic);
        if magic != expected {
            return Err(Wrong::Magic { expected, found: magic });
        }
        let sum = words[BODY..].iter().fold(magic, |sum, &word| sum.wrapping_add(word));
        let is_whole = words[1] != 0 && words[2] == sum;
        Ok(if is_whole { Page::Whole } else { Page::Torn })
    }
}
