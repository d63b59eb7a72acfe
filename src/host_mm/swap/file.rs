//! Swap in a file.
//!
//! Guarantee: an existing file is never opened, truncated or removed, whatever the path leads to;
//! and a file that was created is removed at the end unless something else stands in its place.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::sys::resource::{Resource, getrlimit};
use nix::sys::statfs::{FsType, TMPFS_MAGIC, fstatfs};

use super::backend::check_range;
use super::{Slot, SwapBackend, SwapConfig, SwapOpenError};
use crate::addr::{PAGE_SIZE, PAGE_SIZE_U64};

/// `RAMFS_MAGIC` of linux/magic.h.
const RAMFS_MAGIC: FsType = FsType(0x8584_58f6);

/// A sparse file of slots. The kernel's page cache stands between it and the disk.
/// `F` is where its system calls go: the file itself, or what stands in front of it.
#[derive(Debug)]
pub struct FileSwap<F = File> {
    file: F,
    slots: u32,
    in_memory: bool,
    /// Removes the file at the end; `None` for one that has no name.
    _named: Option<NamedFile>,
}

impl FileSwap {
    /// Makes the file that the configuration asks for. An unlinked temporary file vanishes with
    /// the process, however it ends; a named one stays behind if the process is killed.
    ///
    /// # Errors
    /// [`SwapOpenError`].
    pub fn open(config: &SwapConfig) -> Result<Self, SwapOpenError> {
        let slots = config.slots()?;
        let bytes = u64::from(slots) * PAGE_SIZE_U64;
        check_file_size_limit(bytes)?;
        let (file, named) = match (&config.path, &config.dir) {
            (Some(path), _) => {
                let (file, named) = create_named(path)?;
                (file, Some(named))
            }
            (None, Some(dir)) => (create_temporary(dir)?, None),
            (None, None) => (create_temporary(&std::env::temp_dir())?, None),
        };
        // From here on an error drops `named`, which removes the file.
        resize(&file, bytes)?;
        let in_memory = fstatfs(&file)
            .is_ok_and(|fs| [TMPFS_MAGIC, RAMFS_MAGIC].contains(&fs.filesystem_type()));
        Ok(Self { file, slots, in_memory, _named: named })
    }
}

impl<F> FileSwap<F> {
    /// The same with something in front of the file.
    pub(in crate::host_mm) fn through<G>(self, wrap: impl FnOnce(F) -> G) -> FileSwap<G> {
        let Self { file, slots, in_memory, _named } = self;
        FileSwap { file: wrap(file), slots, in_memory, _named }
    }
}

impl<F: FileExt + Send + Sync> SwapBackend for FileSwap<F> {
    // std's loops continue after short transfers and EINTR.
    fn read(&self, slot: Slot, page: &mut [u8; PAGE_SIZE]) -> io::Result<()> {
        check_range(self.slots, slot, PAGE_SIZE)?;
        self.file.read_exact_at(page, slot.byte_offset())
    }

    fn write(&self, first: Slot, pages: &[u8]) -> io::Result<()> {
        check_range(self.slots, first, pages.len())?;
        self.file.write_all_at(pages, first.byte_offset())
    }

    fn slots(&self) -> u32 {
        self.slots
    }

    fn is_in_memory(&self) -> bool {
        self.in_memory
    }
}

/// Going over the limit raises a signal that ends the process, so look first.
fn check_file_size_limit(bytes: u64) -> Result<(), SwapOpenError> {
    match getrlimit(Resource::RLIMIT_FSIZE) {
        Ok((limit_bytes, _)) if bytes > limit_bytes => {
            Err(SwapOpenError::FileSizeLimit { bytes, limit_bytes })
        }
        // Where the limit cannot be read, the kernel still enforces it.
        _ => Ok(()),
    }
}

fn create_temporary(dir: &Path) -> Result<File, SwapOpenError> {
    tempfile::tempfile_in(dir)
        .map_err(|source| SwapOpenError::CreateTemporary { dir: dir.to_owned(), source })
}

fn create_named(path: &Path) -> Result<(File, NamedFile), SwapOpenError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::AlreadyExists => SwapOpenError::Exists { path: path.to_owned() },
        _ => SwapOpenError::Create { path: path.to_owned(), source },
    };
    // Absolute, so that it is still the same file if the working directory changes.
    let absolute = std::path::absolute(path).map_err(failed)?;
    // O_EXCL (create_new) takes nothing that exists, O_NOFOLLOW says the same of a symbolic link.
    // The content is the guest's memory: for the owner's eyes only.
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&absolute)
        .map_err(failed)?;
    let metadata = match file.metadata() {
        Ok(metadata) => metadata,
        Err(source) => {
            // Ours beyond doubt: it was created a moment ago.
            let _ = fs::remove_file(&absolute);
            return Err(failed(source));
        }
    };
    let named = NamedFile { path: absolute, device: metadata.dev(), inode: metadata.ino() };
    Ok((file, named))
}

fn resize(file: &File, bytes: u64) -> Result<(), SwapOpenError> {
    file.set_len(bytes).map_err(|source| SwapOpenError::Resize { bytes, source })
}

/// The name of a file that this process created; dropping it removes the file.
#[derive(Debug)]
struct NamedFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Drop for NamedFile {
    fn drop(&mut self) {
        // Whoever put another file under the name wants to keep that one. (Between the look and
        // the removal it may still be replaced; no call removes a name only if it is a given file.)
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|found| (found.dev(), found.ino()) == (self.device, self.inode));
        if ours {
            // Nothing can be done about a failure here; the file is visible to its owner.
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn config(path: &Path, bytes: u64) -> SwapConfig {
        SwapConfig { path: Some(path.to_owned()), dir: None, bytes }
    }

    #[test]
    fn a_named_file_is_private_sparse_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("swap");
        let swap = FileSwap::open(&config(&path, (1 << 30) + 1)).unwrap();
        let metadata = fs::symlink_metadata(&path).unwrap();
        assert_eq!(metadata.permissions().mode() & 0o7777, 0o600);
        assert_eq!((metadata.len(), metadata.blocks()), (1 << 30, 0));
        assert_eq!(swap.slots(), 1 << 18);
        drop(swap);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn an_existing_file_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("precious");
        fs::write(&path, "content").unwrap();
        let link = dir.path().join("link");
        symlink(&path, &link).unwrap();
        let dangling = dir.path().join("dangling");
        symlink(dir.path().join("nowhere"), &dangling).unwrap();
        for path in [&path, &link, &dangling, dir.path()] as [&Path; 4] {
            let error = FileSwap::open(&config(path, 1 << 20)).unwrap_err();
            assert!(matches!(error, SwapOpenError::Exists { .. }), "{error}");
            assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
        }
        assert_eq!(fs::read(&path).unwrap(), b"content");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3, "nothing was created either");
    }

    #[test]
    fn a_file_that_took_the_name_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("swap");
        let swap = FileSwap::open(&config(&path, 1 << 20)).unwrap();
        fs::rename(&path, dir.path().join("moved")).unwrap();
        fs::write(&path, "somebody else's").unwrap();
        drop(swap);
        assert_eq!(fs::read(&path).unwrap(), b"somebody else's");
    }

    #[test]
    fn a_failure_after_creation_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("swap");
        let (file, named) = create_named(&path).unwrap();
        assert!(path.exists());
        // No file can have that size.
        let error = resize(&file, u64::MAX).unwrap_err();
        assert!(matches!(error, SwapOpenError::Resize { bytes: u64::MAX, .. }));
        drop(named);
        assert!(!path.exists());
    }

    #[test]
    fn errors_name_the_place_and_keep_the_errno() {
        let dir = tempfile::tempdir().unwrap();
        let nowhere = dir.path().join("missing/swap");
        match FileSwap::open(&config(&nowhere, 1 << 20)).unwrap_err() {
            SwapOpenError::Create { path, source } => {
                assert_eq!((path, source.raw_os_error()), (nowhere, Some(libc::ENOENT)));
            }
            other => panic!("{other}"),
        }
        let missing = SwapConfig { path: None, dir: Some(dir.path().join("missing")), bytes: 4096 };
        let error = FileSwap::open(&missing).unwrap_err();
        assert!(matches!(error, SwapOpenError::CreateTemporary { .. }));
        assert!(error.to_string().contains("missing"), "{error}");
        let huge = config(&dir.path().join("huge"), u64::MAX);
        assert!(matches!(FileSwap::open(&huge), Err(SwapOpenError::TooLarge { .. })));
        assert!(!dir.path().join("huge").exists());
    }

    #[test]
    fn a_temporary_file_has_no_name() {
        let dir = tempfile::tempdir().unwrap();
        let config =
            SwapConfig { path: None, dir: Some(dir.path().to_owned()), bytes: 8 * PAGE_SIZE_U64 };
        let swap = FileSwap::open(&config).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        let mut page = [1; PAGE_SIZE];
        swap.read(Slot::new(7).unwrap(), &mut page).unwrap();
        assert_eq!(page, [0; PAGE_SIZE], "never written");
        swap.write(Slot::new(2).unwrap(), &[[5; PAGE_SIZE], [6; PAGE_SIZE]].concat()).unwrap();
        swap.read(Slot::new(3).unwrap(), &mut page).unwrap();
        assert_eq!(page, [6; PAGE_SIZE]);
    }

    #[test]
    fn slots_that_do_not_exist_are_refused() {
        let swap = FileSwap::open(&SwapConfig { path: None, dir: None, bytes: 2 * PAGE_SIZE_U64 })
            .unwrap();
        let mut page = [0; PAGE_SIZE];
        let outside = swap.read(Slot::new(2).unwrap(), &mut page).unwrap_err();
        assert_eq!(outside.kind(), io::ErrorKind::InvalidInput);
        for (slot, bytes) in [(2, PAGE_SIZE), (1, 2 * PAGE_SIZE), (0, 100)] {
            let error = swap.write(Slot::new(slot).unwrap(), &vec![1; bytes]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{bytes} bytes at {slot}");
        }
        assert_eq!(swap.file.metadata().unwrap().blocks(), 0, "nothing was written");
    }

    #[test]
    fn tmpfs_is_recognised() {
        let shm = Path::new("/dev/shm");
        let proc_mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let is_tmpfs = proc_mounts.lines().any(|line| line.contains(" /dev/shm tmpfs "));
        if shm.is_dir() && is_tmpfs {
            let config = SwapConfig { path: None, dir: Some(shm.to_owned()), bytes: 4096 };
            assert!(FileSwap::open(&config).unwrap().is_in_memory());
        }
    }
}
