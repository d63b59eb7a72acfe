//! Swap in a file.
//!
//! Guarantee: the file has no name from the beginning, so that it is gone with its process, however that
//! ends (what is in it is a guest's memory), and blocks no other; an existing file is never opened,
//! truncated or removed, whatever the path leads to.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;

use nix::sys::resource::{Resource, getrlimit};
use nix::sys::statfs::{FsType, TMPFS_MAGIC, fstatfs};

use super::backend::check_range;
use super::{Slot, SwapBackend, SwapConfig, SwapOpenError};
use gnomon_export_rmap::addr::{PAGE_SIZE, PAGE_SIZE_U64};
use gnomon_sys::names::folder_of;

/// `RAMFS_MAGIC` of linux/magic.h.
const RAMFS_MAGIC: FsType = FsType(0x8584_58f6);

/// A sparse file of slots. The kernel's page cache stands between it and the disk.
/// `F` is where its system calls go: the file itself, or what stands in front of it.
#[derive(Debug)]
pub struct FileSwap<F = File> {
    file: F,
    slots: u32,
    in_memory: bool,
}

impl FileSwap {
    /// Makes the file where the configuration asks for it.
    ///
    /// # Errors
    /// [`SwapOpenError`].
    pub fn open(config: &SwapConfig) -> Result<Self, SwapOpenError> {
        let slots = config.slots()?;
        let bytes = u64::from(slots) * PAGE_SIZE_U64;
        check_file_size_limit(bytes)?;
        let file = match (&config.path, &config.dir) {
            (Some(path), _) => create_at(path)?,
            (None, Some(dir)) => create_in(dir)?,
            (None, None) => create_in(&std::env::temp_dir())?,
        };
        resize(&file, bytes)?;
        let in_memory = fstatfs(&file)
            .is_ok_and(|fs| [TMPFS_MAGIC, RAMFS_MAGIC].contains(&fs.filesystem_type()));
        Ok(Self { file, slots, in_memory })
    }
}

#[cfg(feature = "lab")]
impl<F> FileSwap<F> {
    /// The same with something in front of the file.
    pub(crate) fn through<G>(self, wrap: impl FnOnce(F) -> G) -> FileSwap<G> {
        let Self { file, slots, in_memory } = self;
        FileSwap { file: wrap(file), slots, in_memory }
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

fn create_in(dir: &Path) -> Result<File, SwapOpenError> {
    nameless(dir).map_err(|source| SwapOpenError::CreateTemporary { dir: dir.to_owned(), source })
}

/// For the owner's eyes only, who finds it in `/proc`.
fn nameless(dir: &Path) -> io::Result<File> {
    let file = tempfile::tempfile_in(dir)?;
    file.set_permissions(fs::Permissions::from_mode(0o600))?;
    Ok(file)
}

/// The path says where: nothing ever stands there, and nothing may.
fn create_at(path: &Path) -> Result<File, SwapOpenError> {
    let failed = |source| SwapOpenError::Create { path: path.to_owned(), source };
    match fs::symlink_metadata(path) {
        // The user may take it for what will be used, or have meant another one.
        Ok(_) => return Err(SwapOpenError::Exists { path: path.to_owned() }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    nameless(folder_of(path)).map_err(failed)
}

fn resize(file: &File, bytes: u64) -> Result<(), SwapOpenError> {
    file.set_len(bytes).map_err(|source| SwapOpenError::Resize { bytes, source })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, symlink};

    use super::*;

    fn config(path: &Path, bytes: u64) -> SwapConfig {
        SwapConfig { path: Some(path.to_owned()), dir: None, bytes }
    }

    #[test]
    fn a_file_is_private_sparse_and_nameless() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("swap");
        let swap = FileSwap::open(&config(&path, (1 << 30) + 1)).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        let metadata = swap.file.metadata().unwrap();
        assert_eq!(metadata.permissions().mode() & 0o7777, 0o600);
        assert_eq!((metadata.len(), metadata.blocks(), metadata.nlink()), (1 << 30, 0, 0));
        let there = fs::metadata(dir.path()).unwrap();
        assert_eq!(metadata.dev(), there.dev(), "on the file system that was named");
        assert_eq!(swap.slots(), 1 << 18);
        // Another run may name the same place meanwhile: each has its own.
        let page = [5; PAGE_SIZE];
        let other = FileSwap::open(&config(&path, 1 << 20)).unwrap();
        swap.write(Slot::new(1).unwrap(), &page).unwrap();
        let mut read = page;
        other.read(Slot::new(1).unwrap(), &mut read).unwrap();
        assert_eq!(read, [0; PAGE_SIZE]);
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
    fn a_size_that_no_file_can_have_is_told() {
        let file = create_in(&std::env::temp_dir()).unwrap();
        let error = resize(&file, u64::MAX).unwrap_err();
        assert!(matches!(error, SwapOpenError::Resize { bytes: u64::MAX, .. }));
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
