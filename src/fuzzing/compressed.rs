//! Any files as compressed kernels: with any contents, nearly right ones, and right ones that were
//! damaged.
//!
//! Checked, besides that nothing panics: no more comes out than was allowed, and what comes out does not
//! depend on how much more would have been; what was packed comes back whole, also in several pieces;
//! of a file that was cut, or of which a byte was changed, nothing comes out but what was packed.

use std::io::Write;

use flate2::write::GzEncoder;
use ruzstd::encoding::{CompressionLevel, compress_to_vec};

use super::{Bytes, number, one_of};
use crate::compressed::{Compression, UnpackError};
use crate::vmm::linux::KernelKind;

pub(super) fn run(data: &[u8]) {
    let mut bytes = Bytes::new(data);
    let max = one_of(&mut bytes, &[1 << 20, 1 << 16, 4096, 100, 1, 0]);
    match number::<u8>(&mut bytes) % 4 {
        0 => check_any(bytes.take_rest(), max),
        1 => {
            let start = one_of(
                &mut bytes,
                &[&[0x1f, 0x8b, 8, 0][..], &[0x28, 0xb5, 0x2f, 0xfd], &[0x50, 0x2a, 0x4d, 0x18]],
            );
            check_any(&[start, bytes.take_rest()].concat(), max);
        }
        _ => check_packed(&mut bytes, max),
    }
}

/// A file of which nothing is known.
fn check_any(file: &[u8], max: u64) {
    let Some(by) = Compression::of(file) else { return };
    assert!(!by.name().is_empty() && !by.command().is_empty());
    let Some(unpacked) = by.unpack(file, max) else {
        assert!(!matches!(by, Compression::Gzip | Compression::Zstd), "{by:?}");
        return;
    };
    match unpacked {
        Ok(contents) => check_bound(by, file, &contents, max),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// As much as there is may be allowed, and one byte less may not.
fn check_bound(by: Compression, file: &[u8], contents: &[u8], max: u64) {
    let bytes = contents.len() as u64;
    assert!(bytes <= max, "{bytes} bytes, of {max}");
    let again = by.unpack(file, bytes).expect("it was unpacked");
    assert_eq!(again.as_deref().ok(), Some(contents), "with as much as it is");
    if let Some(less) = bytes.checked_sub(1) {
        let refused = by.unpack(file, less).expect("it was unpacked");
        assert!(
            matches!(refused, Err(UnpackError::TooLarge { max }) if max == less),
            "{refused:?}"
        );
    }
    // What comes out is looked at as a kernel.
    let _ = KernelKind::of(contents);
}

/// A file whose contents are known, whole or damaged.
fn check_packed(bytes: &mut Bytes<'_>, max: u64) {
    let by = one_of(bytes, &[Compression::Gzip, Compression::Zstd]);
    let damage: u8 = number(bytes);
    let (at, value): (u16, u8) = (number(bytes), number(bytes));
    let pieces = usize::from(number::<u8>(bytes) % 3) + 1;
    let times = usize::from(number::<u8>(bytes)) + 1;
    let piece = bytes.bytes(bytes.len()).unwrap_or_default().repeat(times);
    let packed = pack(by, &piece).repeat(pieces);
    let contents = piece.repeat(pieces);
    let at = usize::from(at) % packed.len();
    let file = match damage % 4 {
        0 | 1 => packed,
        2 => packed[..at].to_vec(),
        _ => {
            let mut changed = packed;
            changed[at] = value;
            changed
        }
    };
    let is_whole = file == pack(by, &piece).repeat(pieces);
    match by.unpack(&file, max).expect("both are unpacked") {
        Ok(unpacked) => {
            // A piece that was cut off as a whole is not missed.
            let is_some_pieces = damage % 4 == 2 && contents.starts_with(&unpacked);
            assert!(unpacked == contents || is_some_pieces, "something else came out");
            check_bound(by, &file, &unpacked, max);
        }
        Err(error) => {
            let is_large = matches!(error, UnpackError::TooLarge { .. });
            assert!(!is_whole || is_large && contents.len() as u64 > max, "{error}");
        }
    }
}

fn pack(by: Compression, contents: &[u8]) -> Vec<u8> {
    if by == Compression::Zstd {
        return compress_to_vec(contents, CompressionLevel::Fastest);
    }
    let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(contents).expect("memory takes it");
    encoder.finish().expect("memory takes it")
}
