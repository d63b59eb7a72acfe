//! Compressed files: what they are compressed by, and the ones that can be unpacked.
//!
//! Guarantee: unpacking takes memory and time in proportion to the file and to the bound that it is
//! given, whatever the file claims, and its result was checked against the file's own checksum.

use std::error::Error;
use std::io::{self, Read};

use flate2::bufread::GzDecoder;
use ruzstd::decoding::StreamingDecoder;

/// What a file is compressed by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compression {
    Gzip,
    Zstd,
    Xz,
    Lzma,
    Bzip2,
    Lz4,
    Lzop,
    Zip,
    SevenZip,
}

const GZIP_MAGIC: &[u8] = &[0x1f, 0x8b, 8];
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
const LZ4_MAGIC: &[u8] = &[0x04, 0x22, 0x4d, 0x18];

/// Bytes at the start of files that are compressed.
const MAGICS: [(Compression, &[u8]); 8] = [
    (Compression::Gzip, GZIP_MAGIC),
    (Compression::Zstd, &ZSTD_MAGIC),
    (Compression::Xz, b"\xfd7zXZ\0"),
    (Compression::Lz4, LZ4_MAGIC),
    // The format that kernels are packed with.
    (Compression::Lz4, &[0x02, 0x21, 0x4c, 0x18]),
    (Compression::Lzop, b"\x89LZO\0\r\n\x1a\n"),
    (Compression::Zip, b"PK\x03\x04"),
    (Compression::SevenZip, b"7z\xbc\xaf\x27\x1c"),
];

/// Why a file could not be unpacked. In our words: a library's are about what it was doing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UnpackError {
    /// There is more in it than was allowed.
    #[error("it holds more than {max} bytes")]
    TooLarge {
        /// The bound.
        max: u64,
    },
    /// It ends too early.
    #[error("it is truncated (it ends in the middle of what was packed)")]
    Truncated,
    /// It contradicts itself.
    #[error("it is damaged (its bytes contradict each other)")]
    Damaged,
    /// It is whole, and its checksum is not that of what came out.
    #[error("it is damaged (its checksum is wrong)")]
    Checksum,
    /// A frame that would make its reader hold too much memory.
    #[error(
        "it is damaged, or was made for other readers (a frame wants {bytes} bytes remembered)"
    )]
    Window {
        /// How much.
        bytes: u64,
    },
    /// Something stands behind it that is none of it.
    #[error("it is damaged (something else follows what was packed)")]
    Followed,
}

impl UnpackError {
    /// For what a library says: all that is asked of it is whether there was too little.
    fn of(error: &(dyn Error + 'static)) -> Self {
        let mut cause = Some(error);
        while let Some(error) = cause {
            if let Some(io) = error.downcast_ref::<io::Error>() {
                if io.kind() == io::ErrorKind::UnexpectedEof {
                    return Self::Truncated;
                }
                // One that was made of another error has that one's causes, not itself.
                cause = io.get_ref().map(|inner| inner as _);
            } else {
                cause = error.source();
            }
        }
        Self::Damaged
    }
}

impl Compression {
    /// What the file that begins with `start` is compressed by, if it is.
    pub(crate) fn of(start: &[u8]) -> Option<Self> {
        // Frames that are to be skipped are zstd's and lz4's alike: what follows them tells.
        match after_skipped(start) {
            Some(rest) if rest.len() == start.len() => {}
            Some(rest) if rest.starts_with(LZ4_MAGIC) => return Some(Self::Lz4),
            Some(_) | None => return Some(Self::Zstd),
        }
        if let Some(&(compression, _)) = MAGICS.iter().find(|(_, magic)| start.starts_with(magic)) {
            return Some(compression);
        }
        // The level stands between the two; what follows is the number pi.
        if start.starts_with(b"BZh") && start.get(4..10) == Some(b"1AY&SY") {
            return Some(Self::Bzip2);
        }
        is_lzma(start).then_some(Self::Lzma)
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
            Self::Xz => "xz",
            Self::Lzma => "lzma",
            Self::Bzip2 => "bzip2",
            Self::Lz4 => "lz4",
            Self::Lzop => "lzop",
            Self::Zip => "zip",
            Self::SevenZip => "7z",
        }
    }

    /// A command that unpacks it; the name of the file follows.
    pub(crate) fn command(self) -> &'static str {
        match self {
            Self::Gzip => "gunzip -k",
            Self::Zstd => "unzstd",
            Self::Xz => "unxz -k",
            Self::Lzma => "unlzma -k",
            Self::Bzip2 => "bunzip2 -k",
            Self::Lz4 => "unlz4",
            Self::Lzop => "lzop -d",
            Self::Zip => "unzip",
            Self::SevenZip => "7z x",
        }
    }

    /// What is in `file`, of at most `max` bytes; `None` if files of this kind are not unpacked here.
    pub(crate) fn unpack(self, file: &[u8], max: u64) -> Option<Result<Vec<u8>, UnpackError>> {
        match self {
            Self::Gzip => Some(unpack_gzip(file, max)),
            Self::Zstd => Some(unpack_zstd(file, max)),
            _ => None,
        }
    }
}

/// Files of `lzma` have no magic: properties as every tool writes them, then the sizes of the dictionary
/// and of the contents, which has to be unknown or one that can be.
fn is_lzma(start: &[u8]) -> bool {
    let Some(&[0x5d, a, b, c, d, ref contents @ ..]) = start.first_chunk::<13>() else {
        return false;
    };
    let dictionary_bytes = u32::from_le_bytes([a, b, c, d]);
    let contents = contents.iter().rev().fold(0, |all: u64, &byte| all << 8 | u64::from(byte));
    dictionary_bytes.is_power_of_two()
        && dictionary_bytes >= 1 << 12
        && (contents == u64::MAX || contents < 1 << 40)
}

/// Appends all that `reader` has to `contents`, of which there may be `max` bytes.
fn read_bounded(
    reader: impl Read,
    mut contents: Vec<u8>,
    max: u64,
) -> Result<Vec<u8>, UnpackError> {
    let left = max.saturating_sub(contents.len() as u64);
    let read = reader.take(left.saturating_add(1)).read_to_end(&mut contents);
    read.map_err(|error| UnpackError::of(&error))?;
    if contents.len() as u64 > max {
        return Err(UnpackError::TooLarge { max });
    }
    Ok(contents)
}

/// Most that a frame of zstd may make its reader remember, in bytes: what `zstd` itself takes without
/// being told otherwise (`ZSTD_WINDOWLOG_LIMIT_DEFAULT`). The decoder holds as much before it gives a
/// byte away, so the bound on the contents alone would be none on memory.
const MAX_ZSTD_WINDOW_BYTES: u64 = 128 << 20;

/// What a frame of zstd makes its reader remember, in bytes, by its header (RFC 8878, 3.1.1.1); `None`
/// for what is no such frame, or is cut off.
fn zstd_window_bytes(frame: &[u8]) -> Option<u64> {
    let (&descriptor, rest) = frame.strip_prefix(&ZSTD_MAGIC)?.split_first()?;
    if descriptor & 0x20 == 0 {
        let window = *rest.first()?;
        let base = 1_u64 << (10 + (window >> 3));
        return Some(base + base / 8 * u64::from(window & 7));
    }
    // A single segment: all of the contents, whose size follows the number of the dictionary.
    let dictionary_bytes = [0, 1, 2, 4][usize::from(descriptor & 3)];
    let size_bytes = [1, 2, 4, 8][usize::from(descriptor >> 6)];
    let size = rest.get(dictionary_bytes..dictionary_bytes + size_bytes)?;
    let value = size.iter().rev().fold(0, |all: u64, &byte| all << 8 | u64::from(byte));
    Some(if size_bytes == 2 { value + 256 } else { value })
}

/// All members of a file, one after the other, and the zeros behind them that tapes and block devices
/// fill up with, which gzip(1) takes, too.
fn unpack_gzip(file: &[u8], max: u64) -> Result<Vec<u8>, UnpackError> {
    let mut rest = file;
    let mut contents = Vec::new();
    while !rest.starts_with(&[0]) && !rest.is_empty() {
        if !rest.starts_with(&GZIP_MAGIC[..GZIP_MAGIC.len().min(rest.len())]) {
            return Err(UnpackError::Followed);
        }
        contents = read_bounded(GzDecoder::new(&mut rest), contents, max)?;
    }
    match rest.iter().all(|&byte| byte == 0) {
        true => Ok(contents),
        false => Err(UnpackError::Followed),
    }
}

/// What follows the frames that are to be skipped (RFC 8878, 3.1.2); `None` if the file ends in the
/// middle of one.
fn after_skipped(file: &[u8]) -> Option<&[u8]> {
    let mut rest = file;
    while let [0x50..=0x5f, 0x2a, 0x4d, 0x18, after @ ..] = rest {
        let (length, after) = after.split_first_chunk()?;
        rest = after.get(usize::try_from(u32::from_le_bytes(*length)).ok()?..)?;
    }
    Some(rest)
}

/// All frames of a file, one after the other, without those that are to be skipped.
fn unpack_zstd(file: &[u8], max: u64) -> Result<Vec<u8>, UnpackError> {
    let mut rest = file;
    let mut contents = Vec::new();
    loop {
        rest = after_skipped(rest).ok_or(UnpackError::Truncated)?;
        if rest.is_empty() {
            return Ok(contents);
        }
        if !rest.starts_with(&ZSTD_MAGIC[..ZSTD_MAGIC.len().min(rest.len())]) {
            return Err(UnpackError::Followed);
        }
        if let Some(bytes) = zstd_window_bytes(rest)
            && bytes > MAX_ZSTD_WINDOW_BYTES.max(max)
        {
            return Err(UnpackError::Window { bytes });
        }
        let mut decoder =
            StreamingDecoder::new(&mut rest).map_err(|error| UnpackError::of(&error))?;
        contents = read_bounded(&mut decoder, contents, max)?;
        let decoder = &decoder.decoder;
        let said = decoder.get_checksum_from_data();
        if said.is_some() && said != decoder.get_calculated_checksum() {
            return Err(UnpackError::Checksum);
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::Write;

    use flate2::write::GzEncoder;
    use proptest::prelude::*;
    use ruzstd::encoding::{CompressionLevel, compress_to_vec};

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
}
