//! The oracle: what a page must hold, given its number and how often it was written.
//!
//! A page that holds anything else than its last completed write is found out, whatever it holds:
//! verification compares all 512 words with the expected ones. The number, version and checksum in
//! the page only serve to say *what* went wrong (another page's content, an older content of this
//! page, a damaged content), and let a reader without the ledger check a page.
//!
//! [`page_format`](gnomon_abi::page_format) says where in the page what is.
//!
//! A page that was never written is all zeros and has version 0.

use crate::rng::mix;
use gnomon_abi::Violation;
use gnomon_abi::page_format::NUMBER_BITS;
pub use gnomon_abi::page_format::{BODY, LINK, WORDS};

const STEP: u64 = 0xd134_2543_de82_ef95;

/// What the content of a page depends on, besides its version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageId {
    /// Guest frame number.
    pub gfn: u64,
    /// Content of word [`LINK`], fixed for the whole run.
    pub link: u64,
}

/// How a page differs from what it should hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// What that says about the cause.
    pub kind: Violation,
    /// Index of a wrong word.
    pub word: usize,
    /// What that word should be.
    pub expected: u64,
    /// What it is.
    pub found: u64,
}

/// The page content of one run, as a function of page and version.
#[derive(Clone, Debug)]
pub struct Oracle {
    magic: u64,
    key: u64,
    /// End of the pseudo-random words.
    random_end: usize,
}

impl Oracle {
    /// The oracle for a seed. `entropy_percent` of each body is pseudo-random and does not
    /// compress, the rest does.
    pub fn new(seed: u64, entropy_percent: u8) -> Oracle {
        let share = usize::from(entropy_percent.min(100));
        Oracle {
            magic: (mix(seed) | 1 << NUMBER_BITS) >> NUMBER_BITS << NUMBER_BITS,
            key: mix(seed ^ 0x0bac_1e00),
            random_end: BODY + (LINK - BODY) * share / 100,
        }
    }

    fn page_key(&self, gfn: u64, version: u32) -> u64 {
        mix(self.key ^ gfn ^ mix(u64::from(version)))
    }

    /// A pseudo-random word of the body; cheap and free of dependencies between words, so that
    /// the compiler can vectorise the loops below.
    #[inline]
    fn random_word(page_key: u64, word: usize) -> u64 {
        let x = page_key.wrapping_add((word as u64).wrapping_mul(STEP));
        x ^ (x >> 29)
    }

    fn header(&self, gfn: u64, version: u32) -> [u64; 2] {
        [self.magic | gfn, u64::from(version)]
    }

    /// Fills a page with the content of `version`, which is not 0.
    ///
    /// # Safety
    /// `page` points to 4096 writable bytes, aligned to 8, that nothing else accesses.
    #[inline(never)]
    pub unsafe fn write(&self, page: *mut u64, id: PageId, version: u32) {
        let key = self.page_key(id.gfn, version);
        let [number, version] = self.header(id.gfn, version);
        let mut sum = id.link;
        // SAFETY: all indexes are below WORDS; the caller vouches for the page.
        unsafe {
            page.write(number);
            page.add(1).write(version);
            for word in BODY..self.random_end {
                let value = Oracle::random_word(key, word);
                page.add(word).write(value);
                sum = sum.wrapping_add(value);
            }
            for word in self.random_end..LINK {
                page.add(word).write(key);
                sum = sum.wrapping_add(key);
            }
            page.add(LINK).write(id.link);
            page.add(2).write(sum.wrapping_add(self.magic));
        }
    }

    /// Checks that a page holds the content of `version`; 0 stands for never written.
    ///
    /// # Errors
    /// The first difference that explains the most: number, version, then body and checksum.
    ///
    /// # Safety
    /// `page` points to 4096 readable bytes, aligned to 8, that nothing else writes.
    #[inline(never)]
    pub unsafe fn verify(
        &self,
        page: *const u64,
        id: PageId,
        version: u32,
    ) -> Result<(), Mismatch> {
        let mut difference = 0;
        // SAFETY: all indexes are below WORDS; the caller vouches for the page.
        unsafe {
            if version == 0 {
                for word in 0..WORDS {
                    difference |= page.add(word).read();
                }
            } else {
                let key = self.page_key(id.gfn, version);
                let [number, version] = self.header(id.gfn, version);
                let mut sum = page.add(LINK).read();
                difference |= page.read() ^ number;
                difference |= page.add(1).read() ^ version;
                difference |= sum ^ id.link;
                for word in BODY..self.random_end {
                    let value = page.add(word).read();
                    difference |= value ^ Oracle::random_word(key, word);
                    sum = sum.wrapping_add(value);
                }
                for word in self.random_end..LINK {
                    let value = page.add(word).read();
                    difference |= value ^ key;
                    sum = sum.wrapping_add(value);
                }
                difference |= page.add(2).read() ^ sum.wrapping_add(self.magic);
            }
        }
        if difference == 0 {
            return Ok(());
        }
        // SAFETY: as for this function.
        Err(unsafe { self.diagnose(page, id, version) })
    }

    /// Expected content of one word; the checksum is not a matter of one word.
    fn expected(&self, id: PageId, version: u32, word: usize) -> u64 {
        if version == 0 {
            return 0;
        }
        let key = self.page_key(id.gfn, version);
        match word {
            0 | 1 => self.header(id.gfn, version)[word],
            LINK => id.link,
            _ if word < self.random_end => Oracle::random_word(key, word),
            _ => key,
        }
    }

    /// Finds out what is wrong with a page of which something is.
    ///
    /// # Safety
    /// As for [`Oracle::verify`].
    #[cold]
    unsafe fn diagnose(&self, page: *const u64, id: PageId, version: u32) -> Mismatch {
        // SAFETY: callers pass indexes below WORDS; the caller vouches for the page. Volatile, so
        // that what is reported is what was compared.
        let read = |word: usize| unsafe { page.add(word).read_volatile() };
        let mut sum = self.magic;
        let mut wrong = None;
        for word in (0..2).chain(BODY..WORDS) {
            let mismatch = Mismatch {
                kind: match word {
                    _ if version == 0 => Violation::Word,
                    0 => Violation::Number,
                    1 => Violation::Version,
                    _ => Violation::Word,
                },
                word,
                expected: self.expected(id, version, word),
                found: read(word),
            };
            if mismatch.found != mismatch.expected && wrong.is_none() {
                wrong = Some(mismatch);
            }
            if word >= BODY {
                sum = sum.wrapping_add(mismatch.found);
            }
        }
        let checksum = if version == 0 { 0 } else { sum };
        match wrong {
            Some(mut mismatch) => {
                let damaged = version != 0 && read(2) != sum;
                if mismatch.kind == Violation::Word && damaged {
                    mismatch.kind = Violation::Checksum;
                }
                mismatch
            }
            None => Mismatch {
                kind: if version == 0 { Violation::Word } else { Violation::Checksum },
                word: 2,
                expected: checksum,
                found: read(2),
            },
        }
    }
}
