//! Names in the file system, and those that are gone once the process is, however it ends short of
//! SIGKILL.
//!
//! Guarantee: a [`Leftover`] that is dropped removes its name, and so do the second signal that asks
//! the process to stop ([`StopNotice`](super::signal::StopNotice)) and [`remove_all`]; none of them
//! removes what somebody else has put there since.

use std::ffi::CString;
use std::io;
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

use nix::errno::Errno;

/// The directory that a path's last name is in; the current one for a bare name.
#[must_use]
pub fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// Names at a time that a signal removes; a run has two or three.
const MOST: usize = 16;

/// What the handler of a signal, which can take no lock, is to remove.
static NAMES: [AtomicPtr<Name>; MOST] = [const { AtomicPtr::new(ptr::null_mut()) }; MOST];

#[derive(Debug)]
struct Name {
    /// Absolute: the working directory may change.
    path: CString,
    /// Device and inode of what is to go.
    identity: (u64, u64),
}

/// A name to be removed.
#[derive(Debug)]
pub struct Leftover {
    name: &'static Name,
    /// Its place in the list; `None` if that is full: then only a drop removes it.
    slot: Option<&'static AtomicPtr<Name>>,
}

impl Leftover {
    /// Has what is at `path` now removed.
    ///
    /// # Errors
    /// If there is nothing.
    pub fn new(path: &Path) -> io::Result<Self> {
        let path = CString::new(std::path::absolute(path)?.as_os_str().as_bytes())?;
        let identity = identity(&path)?;
        // Never freed, for a handler may be reading it: some bytes for each socket and report.
        let name: &'static Name = Box::leak(Box::new(Name { path, identity }));
        let entry = ptr::from_ref(name).cast_mut();
        let slot = NAMES.iter().find(|slot| {
            // Release pairs with the Acquire in `remove_all`.
            slot.compare_exchange(ptr::null_mut(), entry, Ordering::Release, Ordering::Relaxed)
                .is_ok()
        });
        Ok(Self { name, slot })
    }
}

impl Drop for Leftover {
    fn drop(&mut self) {
        // Removed first: a signal in between removes it twice, and not never.
        self.name.remove();
        if let Some(slot) = self.slot {
            slot.store(ptr::null_mut(), Ordering::Relaxed);
        }
    }
}

impl Name {
    /// Safe in a signal handler.
    fn remove(&self) {
        // (Between the look and the removal something else may take its place; no call removes a
        // name only if it is a given file.)
        if identity(&self.path).is_ok_and(|found| found == self.identity) {
            // SAFETY: the path is a string that ends with NUL.
            unsafe { libc::unlink(self.path.as_ptr()) };
        }
    }
}

/// Removes all names that there are. Safe in a signal handler.
pub fn remove_all() {
    for slot in &NAMES {
        let name = slot.load(Ordering::Acquire);
        // SAFETY: what is in the list is never freed, and is not changed once it is there.
        if let Some(name) = unsafe { name.as_ref() } {
            name.remove();
        }
    }
}

/// Device and inode of what is at a path; a symbolic link is not followed. Safe in a signal handler.
fn identity(path: &CString) -> Result<(u64, u64), Errno> {
    // SAFETY: stat is a C structure of integers: all zeros is a value of it.
    let mut found: libc::stat = unsafe { MaybeUninit::zeroed().assume_init() };
    // SAFETY: the path is a string that ends with NUL, and `found` a local variable of the type that
    // lstat fills in.
    Errno::result(unsafe { libc::lstat(path.as_ptr(), &raw mut found) })?;
    Ok((found.st_dev, found.st_ino))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_name_goes_unless_it_is_somebody_elses_by_then() {
        let folder = tempfile::tempdir().unwrap();
        let [ours, taken] = ["ours", "taken"].map(|name| folder.path().join(name));
        for path in [&ours, &taken] {
            fs::write(path, "ours").unwrap();
        }
        let leftovers = [&ours, &taken].map(|path| Leftover::new(path).unwrap());
        fs::rename(&taken, folder.path().join("moved")).unwrap();
        fs::write(&taken, "somebody else's").unwrap();
        drop(leftovers);
        assert!(!ours.exists());
        assert_eq!(fs::read_to_string(&taken).unwrap(), "somebody else's");
        let error = Leftover::new(&ours).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOENT));
    }

    #[test]
    fn more_names_than_the_list_holds_are_removed_all_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let names: Vec<Leftover> = (0..MOST + 3)
            .map(|number| {
                let path = folder.path().join(number.to_string());
                fs::write(&path, "").unwrap();
                Leftover::new(&path).unwrap()
            })
            .collect();
        drop(names);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
