//! What other processes can tell of the test guest's pages, without its ledger (`gnomon peer`).

// The page under test is handed over as a raw pointer, as in the guest.
#![allow(unsafe_code)]

use gnomon::abi::verify::{Page, Verifier, Wrong};
use gnomon_guest::oracle::{Oracle, PageId, WORDS};

const ID: PageId = PageId { gfn: 0x1234, link: 77 };

fn written(oracle: &Oracle, id: PageId, version: u32) -> [u64; WORDS] {
    let mut page = [0xaaaa_aaaa_aaaa_aaaa; WORDS];
    // SAFETY: the array is a page's worth of words, ours alone.
    unsafe { oracle.write(page.as_mut_ptr(), id, version) };
    page
}

#[test]
fn a_reader_without_the_ledger_knows_whole_pages_and_those_of_others() {
    let oracle = Oracle::new(7, 50);
    let mut verifier = Verifier::default();
    let here = ID.gfn;
    assert_eq!(verifier.check(here, &[0; WORDS]), Ok(Page::Zero));
    let page = written(&oracle, ID, 3);
    assert_eq!(verifier.check(here, &page), Ok(Page::Whole));
    for word in 1..WORDS {
        let mut torn = page;
        torn[word] ^= 1 << (word % 64);
        // The version is not in the checksum.
        let expected = if word == 1 { Page::Whole } else { Page::Torn };
        assert_eq!(verifier.check(here, &torn), Ok(expected), "word {word}");
    }
    let elsewhere = verifier.check(ID.gfn + 1, &page);
    assert_eq!(elsewhere, Err(Wrong::Number { found: ID.gfn }));
    let of_another_guest = written(&Oracle::new(8, 50), ID, 3);
    assert!(matches!(verifier.check(here, &of_another_guest), Err(Wrong::Magic { .. })));
}
