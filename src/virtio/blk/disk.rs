//! The disk image: a raw file, locked.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

/// The unit of sizes and positions, 5.2.4.
pub(super) const SECTOR_BYTES: u64 = 512;

/// What a guest may do to its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskMode {
    /// Read it. Several may at once.
    ReadOnly,
    /// Write it, too. Nobody else may use it.
    ReadWrite,
}

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
    #[error("the disk image {} cannot be opened: {source}", path.display())]
    Open {
        /// The image.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A directory, a device, a pipe.
    #[error("{} is no disk image: it is not a regular file", path.display())]
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
        "the disk image {} has {bytes} bytes, which is no multiple of 512: is it a raw image?",
        path.display()
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
    #[error("the disk image {} cannot be locked: {source}", path.display())]
    Lock {
        /// The image.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Where a disk's content is. Reads and writes may be short, as those of files; the whole of a range
/// is [`FileExt::read_exact_at`] and [`FileExt::write_all_at`].
pub(crate) trait Disk: FileExt + Send + Sync {
    /// Returns once everything that was written is durable.
    ///
    /// # Errors
    /// What the host says.
    fn sync(&self) -> io::Result<()>;
}

/// A raw image.
pub(super) struct FileDisk(File);

impl FileDisk {
    /// Opens and locks it; returns its size in bytes, too.
    pub(super) fn open(path: &Path, mode: DiskMode) -> Result<(Self, u64), DiskError> {
        let own = || path.to_owned();
        let refused = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => DiskError::Missing { path: own() },
            io::ErrorKind::IsADirectory => DiskError::NotAFile { path: own() },
            _ => DiskError::Open { path: own(), source },
        };
        // Opening a pipe would wait for its other end.
        if !std::fs::metadata(path).map_err(refused)?.is_file() {
            return Err(DiskError::NotAFile { path: own() });
        }
        let is_writable = mode == DiskMode::ReadWrite;
        let file = OpenOptions::new().read(true).write(is_writable).open(path).map_err(refused)?;
        lock(&file, mode).map_err(|errno| match errno {
            Errno::EAGAIN | Errno::EACCES => DiskError::Locked { path: own() },
            errno => DiskError::Lock { path: own(), source: errno.into() },
        })?;
        // Once it is locked: nobody who keeps to the locks changes it any more.
        let metadata = file.metadata().map_err(refused)?;
        match metadata.len() {
            _ if !metadata.is_file() => Err(DiskError::NotAFile { path: own() }),
            0 => Err(DiskError::Empty { path: own() }),
            bytes if bytes % SECTOR_BYTES != 0 => Err(DiskError::OddSize { path: own(), bytes }),
            bytes => Ok((Self(file), bytes)),
        }
    }
}

/// Locks the whole file, for everyone who writes against everyone else. The lock belongs to the open
/// file description, so it goes with the process however that ends.
fn lock(file: &File, mode: DiskMode) -> Result<(), Errno> {
    let kind = match mode {
        DiskMode::ReadOnly => libc::F_RDLCK,
        DiskMode::ReadWrite => libc::F_WRLCK,
    };
    let to_short = |value: i32| libc::c_short::try_from(value).map_err(|_| Errno::EINVAL);
    let all = libc::flock {
        l_type: to_short(kind)?,
        l_whence: to_short(libc::SEEK_SET)?,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_OFD_SETLK(&all)).map(drop)
}

impl FileExt for FileDisk {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.0.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize> {
        self.0.write_at(buf, offset)
    }
}

impl Disk for FileDisk {
    fn sync(&self) -> io::Result<()> {
        self.0.sync_data()
    }
}
