//! Files that are whole, cut, damaged, or made to be too much.

use std::io::Write;

use flate2::write::GzEncoder;
use proptest::prelude::*;
use ruzstd::encoding::{CompressionLevel, compress_to_vec};

use super::unpack::{MAX_ZSTD_WINDOW_BYTES, zstd_window_bytes};
use super::*;

const MAX: u64 = 1 << 20;

pub(crate) fn gzip(contents: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(contents).unwrap();
    encoder.finish().unwrap()
}

pub(crate) fn zstd(contents: &[u8]) -> Vec<u8> {
    compress_to_vec(contents, CompressionLevel::Fastest)
}

fn both(contents: &[u8]) -> [(Compression, Vec<u8>); 2] {
    [(Compression::Gzip, gzip(contents)), (Compression::Zstd, zstd(contents))]
}

fn pattern(words: u32) -> Vec<u8> {
    (0..words).flat_map(|n| (n / 7).wrapping_mul(n).to_le_bytes()[..2].to_vec()).collect()
}

#[test]
fn what_was_packed_comes_back_in_one_piece_or_several() {
    let contents = pattern(300_000);
    for (kind, packed) in both(&contents) {
        assert_eq!(Compression::of(&packed), Some(kind));
        assert_eq!(kind.unpack(&packed, MAX).unwrap().unwrap(), contents, "{kind:?}");
        assert_eq!(kind.unpack(&packed, 600_000).unwrap().unwrap().len(), 600_000);
        let twice = [&packed[..], &packed[..]].concat();
        let whole = kind.unpack(&twice, 2 * MAX).unwrap().unwrap();
        assert_eq!(whole, [&contents[..], &contents[..]].concat(), "{kind:?}");
    }
}

/// A frame of zstd's to be skipped, 5 bytes long.
const SKIPPED: &[u8] = &[0x5a, 0x2a, 0x4d, 0x18, 5, 0, 0, 0, 1, 2, 3, 4, 5];

#[test]
fn frames_to_be_skipped_may_stand_anywhere() {
    let (a, b) = (&zstd(b"ab")[..], &zstd(b"c")[..]);
    for file in [[SKIPPED, SKIPPED, a, b], [a, SKIPPED, b, SKIPPED], [SKIPPED, a, SKIPPED, b]] {
        let file = file.concat();
        assert_eq!(Compression::of(&file), Some(Compression::Zstd), "{file:x?}");
        assert_eq!(Compression::Zstd.unpack(&file, MAX).unwrap().unwrap(), b"abc");
    }
    let nothing = Compression::Zstd.unpack(SKIPPED, MAX).unwrap();
    assert_eq!(nothing.unwrap(), b"", "and nothing else");
    for cut in [5, 8, SKIPPED.len() - 1] {
        let cut = &SKIPPED[..cut];
        assert_eq!(Compression::of(cut), Some(Compression::Zstd));
        let error = Compression::Zstd.unpack(cut, MAX).unwrap().unwrap_err();
        assert!(matches!(error, UnpackError::Truncated), "{error}");
    }
    let lz4 = [SKIPPED, LZ4_MAGIC].concat();
    assert_eq!(Compression::of(&lz4), Some(Compression::Lz4));
}

#[test]
fn zeros_may_follow_what_gzip_packed_and_nothing_else() {
    let packed = [gzip(b"ab"), gzip(b"c")].concat();
    let unpack =
        |behind: &[u8]| Compression::Gzip.unpack(&[&packed[..], behind].concat(), MAX).unwrap();
    for zeros in [0, 1, 2, 511, 100_000] {
        assert_eq!(unpack(&vec![0; zeros]).unwrap(), b"abc", "{zeros} zeros");
    }
    for behind in [&b"\0\0x"[..], b"x", b"\x1fx", &[&[0], &gzip(b"d")[..]].concat()] {
        let error = unpack(behind).unwrap_err();
        assert!(matches!(error, UnpackError::Followed), "{behind:x?}: {error}");
    }
    let error = unpack(&gzip(b"d")[..12]).unwrap_err();
    assert!(matches!(error, UnpackError::Truncated), "{error}");
}

#[test]
fn a_file_that_holds_too_much_is_unpacked_no_further_than_the_bound() {
    let bomb = vec![0; 64 << 20];
    for (kind, packed) in both(&bomb) {
        assert!(packed.len() < 1 << 20, "{kind:?}: {}", packed.len());
        let error = kind.unpack(&packed, MAX).unwrap().unwrap_err();
        assert!(matches!(error, UnpackError::TooLarge { max: MAX }), "{error}");
        let twice = [&packed[..], &packed[..]].concat();
        assert!(kind.unpack(&twice, 64 << 20).unwrap().is_err(), "the bound is for all of it");
    }
}

/// Some bytes of it make a decoder hold gigabytes, of which it gives none away before the end.
#[test]
fn a_frame_that_wants_too_much_remembered_is_refused_before_it_is_decoded() {
    let block = [2, 0, 0x10, 0];
    let frame = |header: &[u8]| [&ZSTD_MAGIC[..], header, &block.repeat(6_000)[..]].concat();
    // Windows of 3.75 TiB and of 128 MiB and an eighth; single segments of 2^40 and 2^27 + 1 bytes.
    for header in [
        &[0x00, 0xff][..],
        &[0x00, 17 << 3 | 1],
        &[0xe0, 0, 0, 0, 0, 0, 1, 0, 0],
        &[0xa3, 0, 0, 0, 0, 1, 0, 0, 8],
    ] {
        let error = Compression::Zstd.unpack(&frame(header), MAX).unwrap().unwrap_err();
        assert!(error.to_string().contains("remembered"), "{header:x?}: {error}");
    }
    assert_eq!(zstd_window_bytes(&frame(&[0x00, 17 << 3])), Some(MAX_ZSTD_WINDOW_BYTES));
    assert_eq!(zstd_window_bytes(&frame(&[0x60, 1, 1])), Some(0x101 + 256));
    assert_eq!(zstd_window_bytes(&zstd(b"abc")[..4]), None);
}

#[test]
fn damage_and_truncation_are_noticed_and_told_apart() {
    let contents = pattern(300_000);
    for (kind, packed) in both(&contents) {
        let refused = |packed: &[u8]| kind.unpack(packed, MAX).unwrap().unwrap_err();
        // Of the shortest no more than the magic is there.
        let magic = if kind == Compression::Zstd { ZSTD_MAGIC.len() } else { GZIP_MAGIC.len() };
        for cut in (magic..40).chain([packed.len() / 2, packed.len() - 5, packed.len() - 1]) {
            let error = refused(&packed[..cut]);
            assert!(matches!(error, UnpackError::Truncated), "{kind:?} at {cut}: {error}");
        }
        let mut changed = packed.clone();
        // In gzip's checksum, and in the contents.
        for at in [packed.len() - 5, packed.len() / 3] {
            changed[at] ^= 0xff;
            let said = refused(&changed).to_string();
            assert!(said.starts_with("it is damaged (its "), "{kind:?} at {at}: {said}");
        }
        let error = refused(&[&packed[..], b"what follows"].concat());
        assert!(matches!(error, UnpackError::Followed), "{kind:?}: {error}");
    }
}

#[test]
fn formats_are_known_by_their_start_and_code_is_none_of_them() {
    let of = |start: &[u8]| Compression::of(start).map(Compression::name);
    assert_eq!(of(b"\xfd7zXZ\0 "), Some("xz"));
    assert_eq!(of(b"BZh91AY&SY"), Some("bzip2"));
    assert_eq!(of(&[0x02, 0x21, 0x4c, 0x18]), Some("lz4"));
    assert_eq!(of(b"]\0\0\x80\0\xff\xff\xff\xff\xff\xff\xff\xff\0"), Some("lzma"));
    assert_eq!(of(b"]\0\0\x80\x01\xff\xff\xff\xff\xff\xff\xff\xff\0"), None);
    assert_eq!(of(b"]\0\0"), None);
    assert_eq!(of(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0"), None);
    assert_eq!(of(b"MZ\xea\x07\0\xc0\x07\x8c\xc8\x8e\xd8\x8e\xc0\x8e\xd0\x31"), None);
    assert_eq!(of(b""), None);
    assert!(Compression::Xz.unpack(b"\xfd7zXZ\0", MAX).is_none());
}

proptest! {
    #[test]
    fn mangled_files_are_refused_or_unpacked_but_never_panic(
        flips in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        which in 0..2usize,
    ) {
        let (kind, mut packed) = both(&pattern(5_000))[which].clone();
        for (at, value) in flips {
            let at = at.index(packed.len());
            packed[at] = value;
        }
        if let Ok(unpacked) = kind.unpack(&packed, MAX).unwrap() {
            prop_assert!(unpacked.len() as u64 <= MAX);
        }
    }
}
