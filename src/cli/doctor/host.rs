//! The rest of the host: kernel, page-fault handling, memory and its limits, swap.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;

use nix::sys::resource::{Resource, getrlimit, rlim_t};
use nix::sys::statvfs::statvfs;
use vm_memory::MmapRegion;

use super::Finding;
use crate::addr::{PAGE_SIZE, PAGE_SIZE_U64};
use crate::cli::limits;
use crate::cli::values::human_bytes;
use crate::host_mm::MIN_HOST_MEMORY_BYTES;
use crate::sys::memory::{ProcessMadvise, create_memfd, discard};
use crate::sys::small_pages;
use crate::sys::uffd::{Features, Tripwire, UffdError, uffd_features};
use crate::sys::uffd_window::Window;

/// Memory that `gnomon boot` takes unless it is told otherwise: frames, tables, itself.
const BOOT_BYTES: u64 = 96 << 20;
/// Swap of `gnomon boot` unless it is told otherwise.
const SWAP_BYTES: u64 = 1 << 30;
/// The first kernel with all that is needed.
const LEAST_KERNEL: (u32, u32) = (4, 17);

pub(super) fn examine() -> Vec<Finding> {
    let release = nix::sys::utsname::uname().ok();
    let release = release.as_ref().and_then(|name| name.release().to_str());
    let temporary = std::env::temp_dir();
    vec![
        kernel(release.unwrap_or_default()),
        memfd(memfd_works()),
        vectored_flush(ProcessMadvise::probe().is_supported()),
        fault_handling(uffd_features(), &arm_tripwire()),
        memory(limits::available_bytes(), control_group_room()),
        overcommit(&read("/proc/sys/vm/overcommit_memory")),
        address_space(limit(Resource::RLIMIT_AS)),
        swap_directory(&temporary, probe_directory(&temporary)),
        file_size(limit(Resource::RLIMIT_FSIZE)),
    ]
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

/// The soft limit, if there is one.
fn limit(resource: Resource) -> Option<u64> {
    let (soft, _): (rlim_t, rlim_t) = getrlimit(resource).ok()?;
    (soft != libc::RLIM_INFINITY).then_some(soft)
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

fn memory(available: Option<u64>, control_group: Option<u64>) -> Finding {
    let what = "memory";
    let Some(available) = available else {
        return Finding::limited(what, "/proc/meminfo does not say how much is available");
    };
    let (room, whose) = match control_group {
        Some(room) if room < available => (room, "in this control group"),
        _ => (available, "available"),
    };
    let said = format!("{} {whose}", human_bytes(room));
    if room < MIN_HOST_MEMORY_BYTES {
        return Finding::missing(what, format!("{said}: too little for any guest; free some"));
    }
    if room < BOOT_BYTES {
        return Finding::limited(
            what,
            format!("{said}: give boot less than its 64M with --host-memory, or free some"),
        );
    }
    Finding::ok(what, said)
}

/// Bytes that this process's control group may still take, where there is a limit.
fn control_group_room() -> Option<u64> {
    let groups = read("/proc/self/cgroup");
    groups.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?);
        let number = |path: String| read(&path).parse::<u64>().ok();
        if controllers.is_empty() {
            let folder = format!("/sys/fs/cgroup{path}");
            let limit = number(format!("{folder}/memory.max"))?;
            Some(limit.saturating_sub(number(format!("{folder}/memory.current"))?))
        } else if controllers.split(',').any(|name| name == "memory") {
            let folder = format!("/sys/fs/cgroup/memory{path}");
            let limit = number(format!("{folder}/memory.limit_in_bytes"))?;
            Some(limit.saturating_sub(number(format!("{folder}/memory.usage_in_bytes"))?))
        } else {
            None
        }
    })
}

fn overcommit(mode: &str) -> Finding {
    let what = "overcommit";
    match mode {
        "2" => Finding::limited(
            what,
            "the kernel counts every mapping in full (vm.overcommit_memory=2): guests with very much memory may be refused; 0 or 1 does away with that",
        ),
        "0" | "1" => Finding::ok(
            what,
            format!("mappings cost nothing until they are used (vm.overcommit_memory={mode})"),
        ),
        _ => Finding::limited(what, "vm.overcommit_memory cannot be read"),
    }
}

fn address_space(limit: Option<u64>) -> Finding {
    let what = "address space";
    match limit {
        None => Finding::ok(what, "no limit"),
        Some(bytes) => Finding::limited(
            what,
            format!(
                "limited to {}: large guests may be refused; ulimit -v unlimited does away with that",
                human_bytes(bytes)
            ),
        ),
    }
}

/// What was found out about a directory for swap.
struct Directory {
    free_bytes: u64,
    in_memory: bool,
}

fn probe_directory(dir: &Path) -> io::Result<Directory> {
    // Unnamed: gone with the value.
    tempfile::tempfile_in(dir)?;
    let found = statvfs(dir)?;
    Ok(Directory {
        free_bytes: found.blocks_available().saturating_mul(found.fragment_size()),
        in_memory: limits::is_in_memory(dir),
    })
}

fn swap_directory(dir: &Path, probed: io::Result<Directory>) -> Finding {
    let what = "swap directory";
    let shown = dir.display();
    let elsewhere = "set TMPDIR, or name another place with --swap-file";
    match probed {
        // Swap is always opened, whether or not it is then needed.
        Err(error) => {
            Finding::missing(what, format!("{shown} cannot be written to: {error}; {elsewhere}"))
        }
        Ok(found) => {
            let room = human_bytes(found.free_bytes);
            if found.in_memory {
                Finding::limited(
                    what,
                    format!(
                        "{shown} is in memory (tmpfs), {room} free: swapping there frees nothing; {elsewhere}"
                    ),
                )
            } else if found.free_bytes < SWAP_BYTES {
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

fn file_size(limit: Option<u64>) -> Finding {
    let what = "file size";
    match limit {
        Some(bytes) if bytes < SWAP_BYTES => Finding::missing(
            what,
            format!(
                "files are limited to {}, below the default size of swap: ulimit -f unlimited, or a smaller --swap-size",
                human_bytes(bytes)
            ),
        ),
        Some(bytes) => Finding::ok(what, format!("up to {}", human_bytes(bytes))),
        None => Finding::ok(what, "no limit"),
    }
}

#[cfg(test)]
mod tests {
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
    fn memory_is_what_the_tighter_bound_leaves() {
        assert_finding(&memory(Some(8 << 30), None), Status::Ok, "8 GiB available");
        assert_finding(&memory(Some(8 << 30), Some(1 << 30)), Status::Ok, "1 GiB in this control");
        assert_finding(&memory(Some(8 << 30), Some(64 << 20)), Status::Limited, "--host-memory");
        assert_finding(&memory(Some(1 << 20), None), Status::Missing, "too little");
        assert_finding(&memory(None, None), Status::Limited, "/proc/meminfo");
    }

    #[test]
    fn limits_are_told_with_their_remedy() {
        assert_finding(&overcommit("2"), Status::Limited, "vm.overcommit_memory=2");
        assert_finding(&overcommit("0"), Status::Ok, "nothing until");
        assert_finding(&overcommit(""), Status::Limited, "cannot be read");
        assert_finding(&address_space(Some(1 << 32)), Status::Limited, "ulimit -v");
        assert_finding(&address_space(None), Status::Ok, "no limit");
        assert_finding(&file_size(Some(1 << 20)), Status::Missing, "ulimit -f");
        assert_finding(&file_size(Some(2 << 30)), Status::Ok, "2 GiB");
        assert_finding(&vectored_flush(false), Status::Limited, "6.13");
        let refused = memfd(Err(io::Error::from(Errno::ENOSYS)));
        assert_finding(&refused, Status::Missing, "seccomp");
    }

    #[test]
    fn a_swap_directory_needs_room_on_a_disk() {
        let dir = Path::new("/some/where");
        let found = |free_bytes, in_memory| Ok(Directory { free_bytes, in_memory });
        assert_finding(&swap_directory(dir, found(2 << 30, false)), Status::Ok, "/some/where");
        assert_finding(&swap_directory(dir, found(1 << 20, false)), Status::Limited, "only 1 MiB");
        assert_finding(&swap_directory(dir, found(2 << 30, true)), Status::Limited, "tmpfs");
        let refused = Err(io::Error::from(Errno::EROFS));
        assert_finding(&swap_directory(dir, refused), Status::Missing, "TMPDIR");
    }

    #[test]
    fn probing_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let found = probe_directory(dir.path()).unwrap();
        assert!(found.free_bytes > 0);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        assert!(probe_directory(&dir.path().join("no")).is_err());
    }

    #[test]
    fn this_host_gets_a_line_for_everything() {
        let findings = examine();
        assert_eq!(findings.len(), 9);
        assert!(findings.iter().all(|finding| !finding.detail.is_empty()), "{findings:?}");
    }
}
