//! Why a disk image cannot be used.

use std::io;
use std::path::{Path, PathBuf};

use super::format::Format;

/// A disk image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// There is no such file.
    #[error(
        "there is no disk image {}: create one, for example with `truncate -s 1G {}`",
        path.display(), path.display()
    )]
    Missing {
        /// The image.
        path: PathBuf,
    },
    /// The host does not open it.
    #[error(
        "the disk image {} cannot be opened: {source}; let this user read and write it, or name another",
        path.display()
    )]
    Open {
        /// The image.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It can be read, but not be written.
    #[error(
        "the disk image {} cannot be written ({source}): add ,ro for a disk that is only read",
        path.display()
    )]
    NotWritable {
        /// The image.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A device that something on this host uses.
    #[error(
        "the device {} is in use on this host (mounted, swap, part of a volume, or another guest's): end that, or add ,ro for a disk that is only read",
        path.display()
    )]
    Claimed {
        /// The device.
        path: PathBuf,
    },
    /// A device without anything in it.
    #[error("the device {} has no size: is there a medium in it, or a file behind it?", path.display())]
    NoMedium {
        /// The device.
        path: PathBuf,
    },
    /// An image of another format than raw.
    #[error(
        "the disk image {} is {} image, and only raw ones are taken: {}, or add ,raw to give the guest its bytes as they are",
        path.display(), with_article(format.name()), format.remedy(path)
    )]
    Format {
        /// The image.
        path: PathBuf,
        /// Its format.
        format: Format,
    },
    /// A directory, a character device, a pipe.
    #[error(
        "{} is no disk image: it is not a regular file, nor a block device; name one that is",
        path.display()
    )]
    NotAFile {
        /// The image.
        path: PathBuf,
    },
    /// A disk without a sector.
    #[error("the disk image {} is empty: make it larger, for example with `truncate -s 1G {}`",
        path.display(), path.display())]
    Empty {
        /// The image.
        path: PathBuf,
    },
    /// Not whole sectors.
    #[error(
        "the disk image {} has {bytes} bytes, which is no multiple of 512: is it a raw image? if so, `truncate -s %512 {}` fills up the last sector",
        path.display(), path.display()
    )]
    OddSize {
        /// The image.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// Somebody has it locked: another process, or another disk.
    #[error(
        "the disk image {} is in use already: end the other user, or use the image read-only in both",
        path.display()
    )]
    Locked {
        /// The image.
        path: PathBuf,
    },
    /// The host does not lock it.
    #[error(
        "the disk image {} cannot be locked: {source}; put it on a file system that has locks",
        path.display()
    )]
    Lock {
        /// The image.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

impl DiskError {
    /// For an image that the host does not open, or does not say anything of.
    pub(super) fn open(path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::NotFound => Self::Missing { path },
            io::ErrorKind::IsADirectory => Self::NotAFile { path },
            _ => Self::Open { path, source },
        }
    }
}

/// The name of a format as it is read aloud.
fn with_article(name: &str) -> String {
    let article = if name.starts_with(['E', 'A', 'x', 'l']) { "an" } else { "a" };
    format!("{article} {name}")
}
