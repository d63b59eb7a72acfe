//! The rest of the host: kernel, shared memory, page-fault handling, swap.

use std::io;
use std::path::Path;
use std::sync::Arc;

use vm_memory::MmapRegion;

use super::Finding;
use crate::addr::{PAGE_SIZE, PAGE_SIZE_U64};
use crate::cli::limits::Folder;
use crate::lab::text::human_bytes;
use crate::sys::memory::{ProcessMadvise, create_memfd, discard};
use crate::sys::small_pages;
use crate::sys::uffd::{Features, Tripwire, UffdError, uffd_features};
use crate::sys::uffd_window::Window;

/// Swap of `gnomon boot` unless it is told otherwise.
pub(super) const SWAP_BYTES: u64 = 1 << 30;
/// The first kernel with all that is needed.
const LEAST_KERNEL: (u32, u32) = (4, 17);

pub(super) fn examine(temporary: &Folder) -> Vec<Finding> {
    let release = nix::sys::utsname::uname().ok();
    let release = release.as_ref().and_then(|name| name.release().to_str());
    vec![
        kernel(release.unwrap_or_default()),
        memfd(memfd_works()),
        vectored_flush(ProcessMadvise::probe().is_supported()),
        fault_handling(uffd_features(), &arm_tripwire()),
        swap_directory(temporary, write_to(&temporary.path)),
    ]
}

fn kernel(release: &str) -> Finding {
    let what = "kernel";
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    let (major, minor) = LEAST_KERNEL;
    match (numbers.next(), numbers.next()) {
        (Some(Ok(found_major)), Some(Ok(found_minor))) => {
            if (found_major, found_minor) >= LEAST_KERNEL {
                Finding::ok(what, format!("Linux {release}"))
            } else {
                Finding::limited(
                    what,
                    format!(
                        "Linux {release} is older than {major}.{minor}, on which nothing was tried: use a newer one"
                    ),
                )
            }
        }
        _ => Finding::limited(
            what,
            format!("{release:?} does not say which: {major}.{minor} or later is needed"),
        ),
    }
}

/// Makes a memfd, maps it, and drops the mapping's page: what each frame's life is made of.
fn memfd_works() -> io::Result<()> {
    let region = small_memfd()?;
    discard(&region, 0, PAGE_SIZE)
}

fn small_memfd() -> io::Result<MmapRegion> {
    small_pages::map(create_memfd("gnomon-doctor", PAGE_SIZE_U64)?, PAGE_SIZE_U64)
}

fn memfd(works: io::Result<()>) -> Finding {
    match works {
        Ok(()) => {
            Finding::ok("shared memory", "memfd can be made, mapped and unmapped by the page")
        }
        Err(error) => Finding::missing(
            "shared memory",
            format!(
                "memfd cannot be used: {error}; look for a seccomp filter or sysctl vm.memfd_noexec"
            ),
        ),
    }
}

fn vectored_flush(supported: bool) -> Finding {
    let what = "process_madvise";
    if supported {
        return Finding::ok(what, "flushes scattered frames in one call");
    }
    Finding::limited(
        what,
        "not for this process: one call a run of frames instead; Linux 6.13 has it",
    )
}

/// Tries what `--paranoid` does: a userfaultfd that sees kernel-mode faults on shared memory.
fn arm_tripwire() -> Result<(), UffdError> {
    match small_memfd() {
        Ok(region) => Tripwire::arm(Arc::new(region)).map(drop),
        // The finding on shared memory tells the reason.
        Err(_) => Err(UffdError::NoSuchCall),
    }
}

/// Tries what `--paging direct` does: a userfaultfd for all kinds of faults on shared memory.
fn open_window() -> Result<(), UffdError> {
    match small_memfd() {
        Ok(region) => {
            let bytes = region.size();
            Window::open(Arc::new(region), 0..bytes, Features::all()).map(drop)
        }
        // The finding on shared memory tells the reason.
        Err(_) => Err(UffdError::NoSuchCall),
    }
}

fn fault_handling(features: Result<Features, UffdError>, armed: &Result<(), UffdError>) -> Finding {
    let what = "userfaultfd";
    match (armed, features) {
        (Ok(()), Ok(features)) => {
            let names: Vec<String> = features
                .iter_names()
                .map(|(name, _)| name.to_ascii_lowercase().replace('_', "-"))
                .collect();
            let works = match open_window() {
                Ok(()) => "--paranoid and --paging direct work".to_owned(),
                Err(error) => format!("--paranoid works, no --paging direct: {error}"),
            };
            Finding::ok(what, format!("{works}; kernel-mode faults, {}", names.join(", ")))
        }
        (Err(error), _) => {
            Finding::limited(what, format!("no --paranoid, no --paging direct: {error}"))
        }
        (Ok(()), Err(error)) => {
            Finding::limited(what, format!("its features are unknown: {error}"))
        }
    }
}

/// Makes a file there.
fn write_to(dir: &Path) -> io::Result<()> {
    // Unnamed: gone with the value.
    tempfile::tempfile_in(dir).map(drop)
}

fn swap_directory(folder: &Folder, written: io::Result<()>) -> Finding {
    let what = "swap directory";
    let shown = folder.path.display();
    let elsewhere = "set TMPDIR, or name another place with --swap-file";
    match written {
        // Swap is always opened, whether or not it is then needed.
        Err(error) => {
            Finding::missing(what, format!("{shown} cannot be written to: {error}; {elsewhere}"))
        }
        Ok(()) => {
            let free_bytes = folder.free_bytes.unwrap_or(u64::MAX);
            let room = human_bytes(free_bytes);
            if folder.is_in_memory {
                Finding::limited(
                    what,
                    format!(
                        "{shown} is in memory (tmpfs), {room} free: swapping there frees nothing; {elsewhere}"
                    ),
                )
            } else if free_bytes < SWAP_BYTES {
                Finding::limited(
                    what,
                    format!("{shown} has only {room} free: free some, or {elsewhere}"),
                )
            } else {
                Finding::ok(what, format!("{shown}, {room} free"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use nix::errno::Errno;

    use super::super::Status;
    use super::*;

    #[track_caller]
    fn assert_finding(finding: &Finding, status: Status, part: &str) {
        assert_eq!(finding.status, status, "{finding}");
        assert!(finding.detail.contains(part), "no {part:?} in: {finding}");
    }

    #[test]
    fn kernels_are_judged_by_their_first_two_numbers() {
        assert_finding(&kernel("6.18.0-rc1+"), Status::Ok, "Linux 6.18.0-rc1+");
        assert_finding(&kernel("4.17"), Status::Ok, "4.17");
        assert_finding(&kernel("4.4.302"), Status::Limited, "older than 4.17");
        assert_finding(&kernel("next"), Status::Limited, "does not say");
        assert_finding(&kernel(""), Status::Limited, "does not say");
    }

    #[test]
    fn without_rights_there_is_no_paranoia_but_everything_else() {
        let refused = || UffdError::NotPermitted {
            device: io::Error::from(Errno::EACCES),
            call: Errno::EPERM,
        };
        let finding = fault_handling(Ok(Features::MISSING_SHMEM), &Err(refused()));
        assert_finding(&finding, Status::Limited, "vm.unprivileged_userfaultfd");
        let features = Features::MISSING_SHMEM | Features::THREAD_ID;
        let finding = fault_handling(Ok(features), &Ok(()));
        assert_finding(&finding, Status::Ok, "missing-shmem, thread-id");
    }

    #[test]
    fn what_is_missing_is_told_with_its_remedy() {
        assert_finding(&vectored_flush(false), Status::Limited, "6.13");
        let refused = memfd(Err(io::Error::from(Errno::ENOSYS)));
        assert_finding(&refused, Status::Missing, "seccomp");
    }

    #[test]
    fn a_swap_directory_needs_room_on_a_disk() {
        let folder = |bytes, is_in_memory| Folder {
            path: "/some/where".into(),
            is_in_memory,
            free_bytes: Some(bytes),
        };
        let found = |bytes, is_in_memory| swap_directory(&folder(bytes, is_in_memory), Ok(()));
        assert_finding(&found(2 << 30, false), Status::Ok, "/some/where");
        assert_finding(&found(1 << 20, false), Status::Limited, "only 1 MiB");
        assert_finding(&found(2 << 30, true), Status::Limited, "tmpfs");
        let refused = swap_directory(&folder(2 << 30, false), Err(Errno::EROFS.into()));
        assert_finding(&refused, Status::Missing, "TMPDIR");
    }

    #[test]
    fn probing_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        write_to(dir.path()).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        assert!(write_to(&dir.path().join("no")).is_err());
    }

    #[test]
    fn this_host_gets_a_line_for_everything() {
        let dir = tempfile::tempdir().unwrap();
        let temporary = Folder::look_at(dir.path().to_owned());
        assert!(temporary.free_bytes.is_none_or(|bytes| bytes > 0));
        let findings = examine(&temporary);
        assert_eq!(findings.len(), 5);
        assert!(findings.iter().all(|finding| !finding.detail.is_empty()), "{findings:?}");
    }
}
