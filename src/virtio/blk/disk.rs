//! The disk image: a raw file, or a block device, locked.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

use super::error::DiskError;
use super::format::Format;
use crate::sys::block_device;

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

/// How an image is to be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contents {
    /// Refused if it looks like anything else than a raw image.
    Checked,
    /// Raw, whatever it looks like.
    Raw,
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

/// An image that can be used.
pub(super) struct Opened {
    pub(super) disk: FileDisk,
    pub(super) bytes: u64,
    /// What the guest had better write at a time, and what partitions are counted in.
    pub(super) sector_bytes: u64,
    /// Whether others on this host may change it: it is a device that is mounted, or the like.
    pub(super) is_shared: bool,
}

impl FileDisk {
    /// Opens and locks it.
    pub(super) fn open(
        path: &Path,
        mode: DiskMode,
        contents: Contents,
    ) -> Result<Opened, DiskError> {
        let own = || path.to_owned();
        let refused = |source: io::Error| DiskError::open(path, source);
        // Opening a pipe would wait for its other end.
        let kind = std::fs::metadata(path).map_err(refused)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DiskError::NotAFile { path: own() });
        }
        let is_device = kind.is_block_device();
        let (file, is_shared) = match mode {
            DiskMode::ReadWrite => (open_writable(path, is_device)?, false),
            DiskMode::ReadOnly => {
                // Several may read it, so none claims it; whether somebody does is tried first.
                let is_shared = is_device && is_claimed(path);
                (File::open(path).map_err(refused)?, is_shared)
            }
        };
        lock(&file, mode).map_err(|errno| match errno {
            Errno::EAGAIN | Errno::EACCES => DiskError::Locked { path: own() },
            errno => DiskError::Lock { path: own(), source: errno.into() },
        })?;
        // Once it is locked: nobody who keeps to the locks changes it any more.
        if file.metadata().map_err(refused)?.file_type() != kind {
            return Err(DiskError::NotAFile { path: own() });
        }
        // A device has a size as well, but not in its metadata.
        let bytes = (&file).seek(SeekFrom::End(0)).map_err(refused)?;
        if bytes == 0 && is_device {
            return Err(DiskError::NoMedium { path: own() });
        }
        if bytes == 0 {
            return Err(DiskError::Empty { path: own() });
        }
        if contents == Contents::Checked
            && let Some(format) = Format::of(&file, bytes).map_err(refused)?
        {
            return Err(DiskError::Format { path: own(), format });
        }
        if bytes % SECTOR_BYTES != 0 {
            return Err(DiskError::OddSize { path: own(), bytes });
        }
        let sector_bytes = match is_device {
            true => block_device::sector_bytes(&file).map_err(refused)?,
            false => SECTOR_BYTES,
        };
        Ok(Opened { disk: Self(file), bytes, sector_bytes, is_shared })
    }
}

/// Opens an image for writing; a device only if nothing on this host has claimed it: a file system, swap,
/// a volume, another guest.
fn open_writable(path: &Path, is_device: bool) -> Result<File, DiskError> {
    let claim = if is_device { libc::O_EXCL } else { 0 };
    let opened = OpenOptions::new().read(true).write(true).custom_flags(claim).open(path);
    let not_writable = |source| DiskError::NotWritable { path: path.to_owned(), source };
    let file = opened.map_err(|source| match source.raw_os_error() {
        Some(libc::EBUSY) => DiskError::Claimed { path: path.to_owned() },
        Some(libc::EACCES | libc::EPERM | libc::EROFS) if File::open(path).is_ok() => {
            not_writable(source)
        }
        _ => DiskError::open(path, source),
    })?;
    // Not every kernel refuses to open one for writing that takes no writes.
    if is_device
        && block_device::is_read_only(&file).map_err(|error| DiskError::open(path, error))?
    {
        return Err(not_writable(io::Error::from_raw_os_error(libc::EROFS)));
    }
    Ok(file)
}

/// Whether something on this host has claimed the device, as file systems do.
fn is_claimed(path: &Path) -> bool {
    let claimed = OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(path);
    claimed.is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY))
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
