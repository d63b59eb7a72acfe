//! A directory, as a place for files that grow.

use std::path::{Path, PathBuf};

use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use nix::sys::statvfs::statvfs;

/// What was seen of a directory, at one look.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Folder {
    pub(crate) path: PathBuf,
    /// Whether files there live in memory.
    pub(crate) is_in_memory: bool,
    /// Bytes that can be written to new files there; `None` where the file system has no bound of its
    /// own, or does not say.
    pub(crate) free_bytes: Option<u64>,
}

impl Folder {
    /// Looks at it now.
    pub(crate) fn look_at(path: PathBuf) -> Self {
        let is_in_memory = statfs(&path).is_ok_and(|found| found.filesystem_type() == TMPFS_MAGIC);
        let free_bytes = free_bytes(&path);
        Self { path, is_in_memory, free_bytes }
    }

    /// One on a disk without bounds, whatever the host has.
    #[cfg(test)]
    pub(crate) fn on_disk() -> Self {
        Self { path: "/tmp".into(), is_in_memory: false, free_bytes: None }
    }
}

fn free_bytes(path: &Path) -> Option<u64> {
    let found = statvfs(path).ok().filter(|found| found.blocks() > 0)?;
    Some(found.blocks_available().saturating_mul(found.fragment_size()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_no_room_of_its_own_is_neither_memory_nor_full() {
        let proc = Folder::look_at("/proc".into());
        assert_eq!((proc.is_in_memory, proc.free_bytes), (false, None), "procfs is not tmpfs");
        let nowhere = Folder::look_at("/proc/none".into());
        assert_eq!((nowhere.is_in_memory, nowhere.free_bytes), (false, None));
    }
}
