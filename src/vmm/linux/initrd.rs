//! The initial RAM disk: whether it is whole, as far as one can see, and where it goes.
//!
//! An archive that is not compressed is walked to its end, so that one that was cut off is noticed
//! here and not by a guest that panics. What a compressed one holds, only the guest knows.
//! Source: Linux `Documentation/driver-api/early-userspace/buffer-format.rst`.

use crate::addr::PAGE_SIZE_U64;

use super::LinuxError;

/// Bytes of a header of the format "newc", all of it hexadecimal digits after the magic.
const HEADER_BYTES: usize = 110;
const MAGICS: [&[u8]; 2] = [b"070701", b"070702"];
const TRAILER: &[u8] = b"TRAILER!!!";
/// Most bytes of an entry's name, its NUL included (Linux's `PATH_MAX`).
const MAX_NAME_BYTES: usize = 4096;

/// Checks that `bytes` can be an initial RAM disk.
pub(super) fn check(bytes: &[u8]) -> Result<(), LinuxError> {
    if bytes.is_empty() {
        return Err(LinuxError::InitrdEmpty);
    }
    let truncated = |what: String| LinuxError::InitrdTruncated { bytes: bytes.len() as u64, what };
    let mut rest = bytes;
    let mut is_open = false;
    loop {
        // Between archives the kernel skips zeros; inside one, too.
        let zeros = rest.iter().take_while(|&&byte| byte == 0).count();
        rest = &rest[zeros..];
        if rest.is_empty() {
            return if is_open {
                Err(truncated("before its last entry".to_owned()))
            } else {
                Ok(())
            };
        }
        let may_be_header = MAGICS
            .iter()
            .any(|magic| rest.starts_with(magic) || (is_open && magic.starts_with(rest)));
        if !may_be_header {
            // Another format from here on: compressed, for the most part.
            return Ok(());
        }
        let Some(entry) = Entry::read(rest) else {
            return Err(truncated("in a header of its archive".to_owned()));
        };
        let Some(after) = entry.end().and_then(|end| rest.get(end..)) else {
            // The padding of the last entry may be missing.
            let end = entry.unpadded_end();
            if entry.is_trailer() && end.is_some_and(|end| end <= rest.len()) {
                return Ok(());
            }
            return Err(truncated(format!("in the middle of \"{}\"", entry.shown())));
        };
        is_open = !entry.is_trailer();
        rest = after;
    }
}

/// One entry of an archive.
struct Entry<'a> {
    name: &'a [u8],
    name_bytes: usize,
    file_bytes: usize,
}

impl<'a> Entry<'a> {
    fn read(bytes: &'a [u8]) -> Option<Self> {
        let header = bytes.get(..HEADER_BYTES)?;
        let field = |index: usize| {
            let digits = header.get(6 + index * 8..14 + index * 8)?;
            usize::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
        };
        let (file_bytes, name_bytes) = (field(6)?, field(11)?);
        if name_bytes > MAX_NAME_BYTES {
            return None;
        }
        let name = bytes.get(HEADER_BYTES..HEADER_BYTES + name_bytes)?;
        let name = name.strip_suffix(&[0]).unwrap_or(name);
        Some(Self { name, name_bytes, file_bytes })
    }

    fn unpadded_end(&self) -> Option<usize> {
        let contents = (HEADER_BYTES + self.name_bytes).next_multiple_of(4);
        contents.checked_add(self.file_bytes)
    }

    fn end(&self) -> Option<usize> {
        self.unpadded_end()?.checked_next_multiple_of(4)
    }

    fn is_trailer(&self) -> bool {
        self.name == TRAILER
    }

    fn shown(&self) -> String {
        String::from_utf8_lossy(self.name).escape_debug().to_string()
    }
}

/// The highest place below `end` for `bytes`, in whole pages and above `floor`.
pub(super) fn place(bytes: u64, floor: u64, end: u64) -> Result<u64, LinuxError> {
    let too_large = LinuxError::InitrdTooLarge { bytes, room: end.saturating_sub(floor) };
    match end.checked_sub(bytes) {
        Some(start) if start / PAGE_SIZE_U64 * PAGE_SIZE_U64 >= floor => {
            Ok(start / PAGE_SIZE_U64 * PAGE_SIZE_U64)
        }
        _ => Err(too_large),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// One entry as `cpio -H newc` writes it.
    pub(in crate::vmm::linux) fn entry(name: &str, contents: &[u8]) -> Vec<u8> {
        let mut bytes = b"070701".to_vec();
        let fields = [1, 0o100_644, 0, 0, 1, 0, contents.len(), 0, 0, 0, 0, name.len() + 1, 0];
        for field in fields {
            bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        bytes.extend_from_slice(name.as_bytes());
        bytes.push(0);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes.extend_from_slice(contents);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn archive() -> Vec<u8> {
        [entry("init", b"#!/bin/sh\n"), entry("bin/busybox", &[7; 5000]), entry("TRAILER!!!", b"")]
            .concat()
    }

    #[test]
    fn whole_archives_pass_and_so_does_what_is_compressed() {
        check(&archive()).unwrap();
        check(&[archive(), vec![0; 512], archive()].concat()).unwrap();
        check(&[archive(), b"\x1f\x8b compressed".to_vec()].concat()).unwrap();
        check(b"\x28\xb5\x2f\xfd anything").unwrap();
    }

    #[test]
    fn an_archive_that_is_cut_off_anywhere_is_noticed() {
        let whole = archive();
        let two = [archive(), archive()].concat();
        for end in 1..whole.len() - 3 {
            // Cut inside the first magic it is not known to be an archive.
            let result = check(&whole[..end]);
            assert_eq!(result.is_err(), end >= 6, "cut at {end}");
        }
        let error = check(&whole[..300]).unwrap_err().to_string();
        assert!(error.contains("300 bytes and ends in the middle of \"bin/busybox\""), "{error}");
        assert!(check(&two[..two.len() - 200]).is_err());
        assert!(matches!(check(b""), Err(LinuxError::InitrdEmpty)));
    }

    #[test]
    fn it_goes_as_high_as_it_can_and_never_below_its_floor() {
        assert_eq!(place(1, 0x10_0000, 0x20_0000).unwrap(), 0x1f_f000);
        assert_eq!(place(0x10_0000, 0x10_0000, 0x20_0000).unwrap(), 0x10_0000);
        let error = place(0x10_0001, 0x10_0000, 0x20_0000).unwrap_err().to_string();
        assert!(error.contains("has 1048577 bytes, and 1048576 are free"), "{error}");
        assert!(place(u64::MAX, 0, 4096).is_err());
        assert!(place(1, 4096, 0).is_err());
    }

    proptest! {
        #[test]
        fn nothing_panics_whatever_the_file_holds(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..400),
            flips in proptest::collection::vec((0..5200usize, any::<u8>()), 0..4),
        ) {
            let _ = check(&bytes);
            let mut mangled = archive();
            for (at, value) in flips {
                let at = at % mangled.len();
                mangled[at] = value;
            }
            let _ = check(&mangled);
            bytes.splice(0..0, *b"070701");
            let _ = check(&bytes);
        }
    }
}
