//! Files that the command line names for a guest: its kernel, compressed or not, and others.
//!
//! Guarantee: what is read is bounded, also if it unpacks to more than it seems or grows meanwhile, and
//! nothing waits for the other end of a pipe.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use super::config::{UsageError, refuse};
use super::values::size;
use crate::compressed::{Compression, UnpackError};
use crate::vmm::boot::MAX_IMAGE_BYTES;
use crate::vmm::linux::KernelKind;

/// What to do about a file that is too large for whatever could be changed.
pub(crate) const NAME_A_SMALLER_ONE: &str = "name a smaller one";

/// Reads a kernel image and unpacks it if it is compressed. What it is else is not checked here, but for
/// what could have been meant as one.
pub(crate) fn read_kernel(path: &Path) -> Result<Vec<u8>, UsageError> {
    let file = read_file("--kernel", path, MAX_IMAGE_BYTES, |_| NAME_A_SMALLER_ONE)?;
    let by = Compression::of(&file);
    let kernel = match by {
        Some(by) => unpack(by, &file, path)?,
        None => file,
    };
    if kernel.is_empty() {
        let what = if by.is_some() { "holds nothing, once it is unpacked" } else { "is empty" };
        refuse!("--kernel {} {what}: copy it again, or name another", path.display());
    }
    if kernel.starts_with(b"MZ") && !KernelKind::of(&kernel).is_linux() {
        let shown = path.display();
        refuse!(
            "--kernel {shown} is an EFI program and no bzImage: of a unified kernel image, take the kernel out with `objcopy -O binary -j .linux {shown} vmlinuz`"
        );
    }
    Ok(kernel)
}

/// What is in a kernel image that is compressed by `by`.
fn unpack(by: Compression, file: &[u8], path: &Path) -> Result<Vec<u8>, UsageError> {
    let (shown, name, command) = (path.display(), by.name(), by.command());
    let by_hand = |why: &str| {
        UsageError(format!(
            "--kernel {shown} {why}: unpack it yourself (`{command} {shown}`) and name what comes out"
        ))
    };
    let Some(unpacked) = by.unpack(file, MAX_IMAGE_BYTES) else {
        return Err(by_hand(&format!("is compressed by {name}, which is not unpacked here")));
    };
    match unpacked {
        Ok(kernel) if Compression::of(&kernel).is_some() => {
            Err(by_hand(&format!("is compressed more than once, the last time by {name}")))
        }
        Ok(kernel) => Ok(kernel),
        Err(UnpackError::TooLarge { max }) => Err(UsageError(format!(
            "--kernel {shown} is compressed by {name} and holds more than the {} that a kernel may have: {NAME_A_SMALLER_ONE}",
            size(max)
        ))),
        Err(error) => Err(UsageError(format!(
            "--kernel {shown} is compressed by {name}, and {error}: copy it again"
        ))),
    }
}

/// Reads the file that an option names, of at most `max` bytes. What to do about one that has so
/// many bytes says `advice`.
pub(crate) fn read_file(
    option: &str,
    path: &Path,
    max: u64,
    advice: impl Fn(u64) -> &'static str,
) -> Result<Vec<u8>, UsageError> {
    let shown = path.display();
    let unreadable = |error: std::io::Error| {
        let advice = match error.kind() {
            std::io::ErrorKind::NotFound => "check the path",
            std::io::ErrorKind::PermissionDenied => "give this user the right to read it",
            _ => "name another file",
        };
        UsageError(format!("{option} {shown} cannot be read: {error}; {advice}"))
    };
    // Looked at before it is opened: opening a FIFO would wait.
    let metadata = fs::metadata(path).map_err(unreadable)?;
    if !metadata.is_file() {
        refuse!("{option} {shown} is not a file: name another one");
    }
    let too_big = |bytes: u64| {
        UsageError(format!(
            "{option} {shown} has {bytes} bytes, more than the {} that it may have: {}",
            size(max),
            advice(bytes)
        ))
    };
    if metadata.len() > max {
        return Err(too_big(metadata.len()));
    }
    let mut contents = Vec::new();
    let file = File::open(path).map_err(unreadable)?;
    // The file may grow while it is read.
    file.take(max.saturating_add(1)).read_to_end(&mut contents).map_err(unreadable)?;
    if contents.len() as u64 > max {
        return Err(too_big(contents.len() as u64));
    }
    Ok(contents)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compressed::tests::{gzip, zstd};

    fn read(contents: &[u8]) -> Result<Vec<u8>, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), contents).unwrap();
        read_kernel(file.path())
            .map_err(|error| error.to_string().replace(file.path().to_str().unwrap(), "KERNEL"))
    }

    #[test]
    fn kernels_are_unpacked() {
        let kernel = b"\x7fELF and so on".repeat(1000);
        assert_eq!(read(&kernel).unwrap(), kernel);
        assert_eq!(read(&gzip(&kernel)).unwrap(), kernel);
        assert_eq!(read(&zstd(&kernel)).unwrap(), kernel);
    }

    #[test]
    fn what_is_not_unpacked_is_named_with_what_to_do() {
        let xz = read(b"\xfd7zXZ\0and so on").unwrap_err();
        assert_eq!(
            xz,
            "--kernel KERNEL is compressed by xz, which is not unpacked here: unpack it yourself (`unxz -k KERNEL`) and name what comes out"
        );
        let twice = read(&gzip(&zstd(b"x"))).unwrap_err();
        assert!(twice.contains("more than once, the last time by gzip"), "{twice}");
        let cut = gzip(&[7; 5000]);
        let cut = read(&cut[..cut.len() - 9]).unwrap_err();
        assert!(cut.contains("by gzip, and it is truncated"), "{cut}");
        assert!(cut.ends_with(": copy it again"), "{cut}");
        let efi = read(b"MZ\0\0 and no header of Linux").unwrap_err();
        assert!(efi.contains("is an EFI program") && efi.contains("objcopy"), "{efi}");
    }

    #[test]
    fn what_holds_nothing_is_told() {
        assert!(read(b"").unwrap_err().starts_with("--kernel KERNEL is empty: copy it again"));
        for packed in [gzip(b""), zstd(b""), b"\x50\x2a\x4d\x18\x01\0\0\0x".to_vec()] {
            let said = read(&packed).unwrap_err();
            assert!(said.contains("holds nothing, once it is unpacked: copy"), "{said}");
        }
    }

    #[test]
    fn a_kernel_that_unpacks_to_more_than_a_kernel_is_refused() {
        let half = gzip(&vec![0; 1 + usize::try_from(MAX_IMAGE_BYTES / 2).unwrap()]);
        let bomb = read(&half.repeat(2)).unwrap_err();
        assert!(bomb.contains("holds more than the 256M that a kernel may have"), "{bomb}");
    }
}
