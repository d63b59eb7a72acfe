//! A host whose shared memory comes in huge pages, for one thread of a test.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

/// Calls `test` with a maker of unnamed files of `bytes` bytes, each on a tmpfs that gives a huge page
/// to whoever asks for a page, as the kernel's own tmpfs, which memfds are on, does with
/// `shmem_enabled` at `always`. For tests that are ignored where this cannot be had (`build.rs`).
pub fn on_generous_tmpfs(bytes: u64, test: impl FnOnce(&dyn Fn() -> File) + Send) {
    let in_namespace = || {
        let folder = std::env::temp_dir();
        mount_over(&folder).unwrap();
        let file = || {
            let file = tempfile::tempfile_in(&folder).unwrap();
            file.set_len(bytes).unwrap();
            file
        };
        let probe = file();
        probe.write_all_at(&[1], 0).unwrap();
        assert!(probe.metadata().unwrap().blocks() > 8, "the host has changed: touch build.rs");
        test(&file);
    };
    // The mount namespace is the thread's, and goes away with it.
    std::thread::scope(|scope| {
        let ended = scope.spawn(in_namespace).join();
        ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

/// What is under the folder is hidden from this thread only.
fn mount_over(folder: &Path) -> Result<(), Errno> {
    let none = None::<&str>;
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    mount(Some("tmpfs"), folder, Some("tmpfs"), MsFlags::empty(), Some("huge=always"))
}

/// No test is ignored that could run: what was found when this was built is what is there.
#[test]
fn tests_are_ignored_exactly_where_there_is_no_such_tmpfs() {
    let probe = || {
        let folder = std::env::temp_dir();
        mount_over(&folder).ok()?;
        let file = tempfile::tempfile_in(&folder).ok()?;
        file.set_len(4 << 20).ok()?;
        file.write_all_at(&[1], 0).ok()?;
        Some(file.metadata().ok()?.blocks() > 8)
    };
    let now = std::thread::spawn(probe).join().unwrap().unwrap_or(false);
    assert_eq!(now, cfg!(huge_tmpfs), "the host or its user has changed: touch build.rs");
}
