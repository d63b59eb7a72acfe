//! The test guest's pure parts, tested on the host: they are the measure by which the hypervisor
//! is judged, so each must be shown to fail where it should.

// The pages under test are handed over as raw pointers, as in the guest.
#![allow(unsafe_code)]

use gnomon_abi::Violation;
use gnomon_guest::oracle::{BODY, LINK, Mismatch, Oracle, PageId, WORDS};
use gnomon_guest::{permute, rng};

const ID: PageId = PageId { gfn: 0x1234, link: 77 };

fn written(oracle: &Oracle, id: PageId, version: u32) -> [u64; WORDS] {
    let mut page = [0xaaaa_aaaa_aaaa_aaaa; WORDS];
    // SAFETY: the array is a page's worth of words, ours alone.
    unsafe { oracle.write(page.as_mut_ptr(), id, version) };
    page
}

fn verify(oracle: &Oracle, page: &[u64; WORDS], id: PageId, version: u32) -> Result<(), Mismatch> {
    // SAFETY: as in `written`.
    unsafe { oracle.verify(page.as_ptr(), id, version) }
}

#[test]
fn a_written_page_verifies_and_never_written_is_zero() {
    for entropy in [0, 1, 50, 99, 100] {
        let oracle = Oracle::new(7, entropy);
        for version in [1, 2, 1000, u32::MAX] {
            let page = written(&oracle, ID, version);
            assert_eq!(verify(&oracle, &page, ID, version), Ok(()));
            assert_eq!(page[LINK], ID.link);
        }
        assert_eq!(verify(&oracle, &[0; WORDS], ID, 0), Ok(()));
    }
}

#[test]
fn every_single_wrong_bit_is_found_at_its_word() {
    for entropy in [0, 50, 100] {
        let oracle = Oracle::new(7, entropy);
        let good = written(&oracle, ID, 3);
        for word in 0..WORDS {
            let bit = 1 << (word % 64);
            let mut page = good;
            page[word] ^= bit;
            let kind = match word {
                0 => Violation::Number,
                1 => Violation::Version,
                _ => Violation::Checksum,
            };
            let expected = Mismatch { kind, word, expected: good[word], found: good[word] ^ bit };
            assert_eq!(verify(&oracle, &page, ID, 3), Err(expected));
        }
        for word in 0..WORDS {
            let mut page = [0; WORDS];
            page[word] = 1;
            let expected = Mismatch { kind: Violation::Word, word, expected: 0, found: 1 };
            assert_eq!(verify(&oracle, &page, ID, 0), Err(expected));
        }
    }
}

#[test]
fn other_contents_are_told_apart() {
    let oracle = Oracle::new(7, 50);
    let kind =
        |page: &[u64; WORDS], version| verify(&oracle, page, ID, version).map_err(|m| m.kind);

    let other = written(&oracle, PageId { gfn: 0x1235, link: 77 }, 3);
    assert_eq!(kind(&other, 3), Err(Violation::Number));
    let old = written(&oracle, ID, 2);
    assert_eq!(kind(&old, 3), Err(Violation::Version));
    assert_eq!(kind(&[0; WORDS], 3), Err(Violation::Number));
    assert_eq!(kind(&old, 0), Err(Violation::Word));
    let other_seed = written(&Oracle::new(8, 50), ID, 3);
    assert_eq!(kind(&other_seed, 3), Err(Violation::Number));
}

#[test]
fn damage_that_keeps_the_checksum_is_found() {
    let oracle = Oracle::new(7, 50);
    let mut page = written(&oracle, ID, 3);
    page.swap(BODY, BODY + 1);
    let mismatch = verify(&oracle, &page, ID, 3).expect_err("two words are swapped");
    assert_eq!((mismatch.kind, mismatch.word), (Violation::Word, BODY));

    let mut page = written(&oracle, ID, 3);
    page[LINK] += 1;
    page[2] += 1;
    let mismatch = verify(&oracle, &page, ID, 3).expect_err("the link is another");
    assert_eq!((mismatch.kind, mismatch.word), (Violation::Word, LINK));
}

#[test]
fn half_a_page_of_another_version_is_found() {
    let oracle = Oracle::new(7, 50);
    let mut page = written(&oracle, ID, 3);
    let old = written(&oracle, ID, 2);
    page[WORDS / 2..].copy_from_slice(&old[WORDS / 2..]);
    let mismatch = verify(&oracle, &page, ID, 3).expect_err("half of the page is old");
    assert_eq!((mismatch.kind, mismatch.word), (Violation::Checksum, WORDS / 2));
}

#[test]
fn entropy_is_the_share_of_words_that_differ() {
    let distinct = |entropy| {
        let mut page = written(&Oracle::new(7, entropy), ID, 3).to_vec();
        page.sort_unstable();
        page.dedup();
        page.len()
    };
    let frame = BODY + 1; // number, version, checksum, link
    assert_eq!(distinct(0), frame + 1);
    assert_eq!(distinct(100), WORDS);
    assert_eq!(distinct(50), frame + (LINK - BODY) / 2 + 1);
}

#[test]
fn a_cycle_visits_everything_before_it_returns() {
    for len in (1..70).chain([127, 128, 129, 1000, 4097]) {
        for seed in 0..4 {
            let cycle = permute::Cycle::new(len, seed);
            let mut seen = vec![false; usize::try_from(len).expect("small")];
            let mut at = 0;
            for _ in 0..len {
                at = cycle.next(at);
                let visited = &mut seen[usize::try_from(at).expect("below len")];
                assert!(!*visited, "{at} of {len} came twice, seed {seed}");
                *visited = true;
            }
            assert_eq!(at, 0);
        }
    }
}

#[test]
fn a_scramble_is_a_bijection_and_moves_neighbours_apart() {
    for len in (1..70).chain([127, 128, 129, 1000, 4097]) {
        for seed in 0..4 {
            let scramble = permute::Scramble::new(len, seed);
            let mut images: Vec<u64> = (0..len).map(|x| scramble.apply(x)).collect();
            let neighbours = images.windows(2).filter(|w| w[0].abs_diff(w[1]) == 1).count();
            assert!(len < 1000 || neighbours < 20, "{neighbours} of {len} stay side by side");
            images.sort_unstable();
            assert!(images.into_iter().eq(0..len), "len {len} seed {seed}");
        }
    }
}

#[test]
fn zipf_gives_each_octave_its_share() {
    const DRAWS: u32 = 64_000;
    let mut rng = rng::Rng::new(5, 0);
    for len in [1, 2, 3, 255, 1000] {
        let mut by_octave = [0_u32; 64];
        for _ in 0..DRAWS {
            let rank = permute::zipf_rank(&mut rng, len);
            assert!(rank < len);
            by_octave[(rank + 1).ilog2() as usize] += 1;
        }
        let octaves = len.ilog2() + 1;
        let share = DRAWS / octaves;
        for count in &by_octave[..octaves as usize] {
            assert!(count.abs_diff(share) < share / 10 + 1, "{count} of {share}, len {len}");
        }
    }
}

#[test]
fn random_numbers_keep_their_bounds_and_streams() {
    let mut rng = rng::Rng::new(1, 2);
    let mut same = rng::Rng::new(1, 2);
    let mut other = rng::Rng::new(1, 3);
    let mut equal = 0;
    for bound in 1..2000 {
        assert!(rng.clone().below(bound) < bound);
        let value = rng.next_u64();
        assert_eq!(value, same.next_u64());
        equal += u32::from(value == other.next_u64());
    }
    assert_eq!(equal, 0);
    assert_eq!(rng.below(0), 0);
    assert!((0..1000).all(|_| !rng.percent(0)));
    assert!((0..1000).all(|_| rng.percent(100)));
}

mod command_line {
    use gnomon_guest::options::{Mode, Options, Workload};

    fn parse(line: &str) -> (Options, Vec<&str>) {
        let mut unknown = Vec::new();
        let options = Options::parse(line, |word| unknown.push(word));
        (options, unknown)
    }

    #[test]
    fn an_empty_line_gives_the_documented_defaults() {
        let (options, unknown) = parse("");
        assert!(unknown.is_empty());
        assert_eq!(options.mode, Mode::Boot);
        assert!(Workload::ALL.into_iter().all(|w| options.selects(w)));
        assert_eq!((options.seed, options.passes), (1, 0));
        assert_eq!((options.pages, options.hot), (None, None));
        assert_eq!((options.write_percent, options.entropy_percent), (50, 50));
        assert!(options.fill, "boot mode fills");
        assert!(!parse("mode=stress").0.fill, "stress mode does not");
    }

    #[test]
    fn every_word_is_understood() {
        let line = "fill=1 mode=stress workload=zipf,seq seed=0xff pages=4096 passes=3 write=0 hot=64 free=1 dma=7 entropy=100";
        let (options, unknown) = parse(line);
        assert!(unknown.is_empty(), "{unknown:?}");
        assert_eq!(options.mode, Mode::Stress);
        let selected: Vec<_> = Workload::ALL.into_iter().filter(|w| options.selects(*w)).collect();
        assert_eq!(selected, [Workload::Seq, Workload::Zipf]);
        assert_eq!((options.seed, options.pages, options.passes), (255, Some(4096), 3));
        assert_eq!(
            (options.write_percent, options.hot, options.entropy_percent),
            (0, Some(64), 100)
        );
        assert_eq!((options.free_percent, options.dma_percent), (1, 7));
        assert!(options.fill, "asked for, whatever the order");
    }

    #[test]
    fn what_is_not_understood_is_reported_and_changes_nothing() {
        let words = [
            "quiet",
            "mode=fast",
            "workload=seq,walk",
            "seed=x",
            "seed=-1",
            "pages=",
            "write=101",
            "entropy=300",
            "fill=2",
            "console=ttyS0",
            "=",
        ];
        let line = words.join("  ");
        let (options, unknown) = parse(&line);
        assert_eq!(unknown, words);
        assert_eq!(options, parse("").0);
    }
}

#[test]
fn each_generation_of_a_vm_makes_its_own_choices() {
    let choices = |mut rng: rng::Rng| [(); 64].map(|()| rng.below(1000));
    assert_eq!(choices(rng::Rng::of_generation(7, 1, 0)), choices(rng::Rng::new(7, 1)));
    let generations: Vec<_> =
        (0..20).map(|number| choices(rng::Rng::of_generation(7, 1, number))).collect();
    for (number, one) in generations.iter().enumerate() {
        assert!(!generations[..number].contains(one), "generation {number}");
    }
}
