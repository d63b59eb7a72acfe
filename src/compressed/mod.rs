//! Compressed files: what they are compressed by, and, with the feature `unpack`, what is in some of them.
//!
//! Guarantee: unpacking takes memory and time in proportion to the file and to the bound that it is
//! given, whatever the file claims, and its result was checked against the file's own checksum.

#[cfg(any(test, feature = "unpack"))]
mod unpack;

#[cfg(any(test, feature = "unpack"))]
pub use unpack::UnpackError;

/// What a file is compressed by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// By gzip.
    Gzip,
    /// By zstd.
    Zstd,
    /// By xz.
    Xz,
    /// By lzma, without a container.
    Lzma,
    /// By bzip2.
    Bzip2,
    /// By lz4.
    Lz4,
    /// By lzop.
    Lzop,
    /// An archive of zip.
    Zip,
    /// An archive of 7-Zip.
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

impl Compression {
    /// What the file that begins with `start` is compressed by, if it is.
    #[must_use]
    pub fn of(start: &[u8]) -> Option<Self> {
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

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
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
    #[must_use]
    pub fn command(self) -> &'static str {
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

#[cfg(test)]
pub(crate) mod tests;
