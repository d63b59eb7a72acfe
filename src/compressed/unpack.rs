//! Unpacking.

use std::error::Error;
use std::io::{self, Read};

use flate2::bufread::GzDecoder;
use ruzstd::decoding::StreamingDecoder;

use super::{Compression, GZIP_MAGIC, ZSTD_MAGIC, after_skipped};

/// Why a file could not be unpacked. In our words: a library's are about what it was doing.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
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
    /// What is in `file`, of at most `max` bytes; `None` if files of this kind are not unpacked here.
    #[must_use]
    pub fn unpack(self, file: &[u8], max: u64) -> Option<Result<Vec<u8>, UnpackError>> {
        match self {
            Self::Gzip => Some(unpack_gzip(file, max)),
            Self::Zstd => Some(unpack_zstd(file, max)),
            _ => None,
        }
    }
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
pub(super) const MAX_ZSTD_WINDOW_BYTES: u64 = 128 << 20;

/// What a frame of zstd makes its reader remember, in bytes, by its header (RFC 8878, 3.1.1.1); `None`
/// for what is no such frame, or is cut off.
pub(super) fn zstd_window_bytes(frame: &[u8]) -> Option<u64> {
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
