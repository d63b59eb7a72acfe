//! Which limits may be behind an error of the kernel, found by looking at how much is left of each.
//!
//! Guarantee: a limit is named only if there is one and the kernel gives that error where it is
//! reached. Where some are nearly reached, no other is named; where none is, all that there are.

use std::fs;

use nix::errno::Errno;
use nix::unistd::getuid;

use super::HostLimits;
use super::process::{Bounded, STACK_BYTES};
use crate::lab::text::{human_bytes, human_count};

/// Addresses that a thread takes beside its stack: its signal stack, what is rounded up.
const BESIDE_STACK_BYTES: u64 = 256 << 10;
/// Mappings that a thread takes: its stack, its signal stack, a page in front of each.
const THREAD_MAPPINGS: u64 = 4;
/// Less than this of a count is little: others use it, too, and what was given back is free again.
const FEW: u64 = 16;

/// A limit, and whether there is little left of it.
struct Candidate {
    text: String,
    is_near: bool,
}

/// The limits that may be behind `errno`, with what to do, as the rest of a sentence. `beside` threads
/// were there at the time that `limits` does not count any more, or not yet.
pub(crate) fn behind(errno: Errno, limits: &HostLimits, beside: u64) -> Option<String> {
    let candidates = match errno {
        Errno::EAGAIN => of_threads(limits, beside),
        Errno::ENOMEM => of_memory(limits, beside),
        Errno::EMFILE => limits.process.descriptors.map(descriptors).into_iter().collect(),
        Errno::EFBIG => limits.process.file_bytes.map(file).into_iter().collect(),
        _ => Vec::new(),
    };
    let any_near = candidates.iter().any(|one| one.is_near);
    let named = candidates.into_iter().filter(|one| one.is_near || !any_near);
    let named: Vec<String> = named.map(|one| one.text).collect();
    match (&named[..], any_near) {
        ([], _) => None,
        ([only], _) => Some(format!("{only}: raise that limit")),
        (several, _) => Some(format!("{}: raise what is too little", several.join(", and "))),
    }
}

/// Of a thread that cannot be had, which is EAGAIN also where its stack finds no room.
fn of_threads(limits: &HostLimits, beside: u64) -> Vec<Candidate> {
    let process = &limits.process;
    let mut found = of_memory(limits, beside);
    found.extend(limits.groups.pids.iter().map(|group| Candidate {
        text: format!(
            "the control group's limit {} allows {} threads, {} of them taken",
            group.file.display(),
            human_count(group.limit),
            human_count(group.used)
        ),
        is_near: group.room() <= beside + FEW,
    }));
    found.extend(process.kernel_threads.filter(|all| all.room() <= beside + FEW).map(|all| {
        Candidate {
            text: format!(
                "this machine may have {} threads (kernel.threads-max), {} of them taken",
                human_count(all.limit),
                human_count(all.used)
            ),
            is_near: true,
        }
    }));
    // The kernel lets the superuser have as many as there are.
    if let (Some(limit), false) = (process.threads, process.is_superuser) {
        let used = process.threads_used.unwrap_or(0);
        found.push(Candidate {
            text: format!(
                "this user may have {} threads (ulimit -u), {} of them taken",
                human_count(limit),
                human_count(used)
            ),
            is_near: limit.saturating_sub(used) <= beside + FEW,
        });
    }
    found
}

fn of_memory(limits: &HostLimits, beside: u64) -> Vec<Candidate> {
    let process = &limits.process;
    let stacks = (beside + 1) * (STACK_BYTES + BESIDE_STACK_BYTES);
    let bytes = |what: &str, option: &str, limit: Bounded| Candidate {
        text: format!(
            "this process may have {} {what} ({option}), {} of it taken",
            human_bytes(limit.limit),
            human_bytes(limit.used)
        ),
        is_near: limit.room() < stacks,
    };
    let mut found = Vec::new();
    found.extend(process.address.map(|limit| bytes("of address space", "ulimit -v", limit)));
    found.extend(process.data.map(|limit| bytes("of private memory", "ulimit -d", limit)));
    found.extend(process.commit.map(|limit| Candidate {
        text: format!(
            "the host promises {} of memory (vm.overcommit_memory=2), {} of it taken",
            human_bytes(limit.limit),
            human_bytes(limit.used)
        ),
        is_near: limit.room() < stacks,
    }));
    // Every process has this one, so that it is told only where it is near.
    let few = (beside + FEW) * THREAD_MAPPINGS;
    found.extend(process.mappings.filter(|limit| limit.room() <= few).map(|limit| Candidate {
        text: format!(
            "a process may have {} mappings (vm.max_map_count), {} of them taken",
            human_count(limit.limit),
            human_count(limit.used)
        ),
        is_near: true,
    }));
    found
}

fn descriptors(limit: Bounded) -> Candidate {
    let text = format!("this process may have {} open files (ulimit -n)", human_count(limit.limit));
    Candidate { text, is_near: true }
}

fn file(most: u64) -> Candidate {
    let text = format!("this process may have {} in one file (ulimit -f)", human_bytes(most));
    Candidate { text, is_near: true }
}

/// Threads of this process's user, by the files of all processes.
pub(super) fn threads_of_user() -> Option<u64> {
    let user = getuid().as_raw();
    let statuses = fs::read_dir("/proc").ok()?.filter_map(|entry| {
        let entry = entry.ok()?;
        let name = entry.file_name();
        name.to_str()?.parse::<u32>().ok()?;
        fs::read_to_string(entry.path().join("status")).ok()
    });
    Some(statuses.filter_map(|status| threads_in(&status, user)).sum())
}

/// The number of threads in a /proc/PID/status, if the process is that user's.
fn threads_in(status: &str, user: u32) -> Option<u64> {
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
    let owner: u32 = field("Uid:")?.split_whitespace().next()?.parse().ok()?;
    (owner == user).then(|| field("Threads:")?.trim().parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::limits::{GroupLimit, ProcessLimits};

    const AMPLE: Bounded = Bounded { limit: 1 << 40, used: 1 << 20 };
    const TIGHT: Bounded = Bounded { limit: 1 << 20, used: (1 << 20) - 1 };

    fn with(change: impl FnOnce(&mut ProcessLimits)) -> HostLimits {
        let process = ProcessLimits {
            address: Some(AMPLE),
            threads: Some(50_000),
            threads_used: Some(100),
            kernel_threads: Some(AMPLE),
            mappings: Some(AMPLE),
            ..ProcessLimits::default()
        };
        let mut limits = HostLimits { process, ..HostLimits::default() };
        change(&mut limits.process);
        limits
    }

    /// What is named for a thread that could not be started.
    #[track_caller]
    fn assert_named(limits: &HostLimits, names: &[&str]) {
        let said = behind(Errno::EAGAIN, limits, 3).unwrap_or_default();
        for name in
            ["ulimit -v", "ulimit -d", "ulimit -u", "threads-max", "max_map_count", "commit", "/cg"]
        {
            assert_eq!(said.contains(name), names.contains(&name), "{name:?} in {said:?}");
        }
    }

    #[test]
    fn a_limit_that_is_near_is_named_and_no_other() {
        assert_named(&with(|all| all.address = Some(TIGHT)), &["ulimit -v"]);
        assert_named(&with(|all| all.data = Some(TIGHT)), &["ulimit -d"]);
        assert_named(&with(|all| all.commit = Some(TIGHT)), &["commit"]);
        assert_named(&with(|all| all.mappings = Some(TIGHT)), &["max_map_count"]);
        assert_named(&with(|all| all.kernel_threads = Some(TIGHT)), &["threads-max"]);
        assert_named(&with(|all| all.threads = Some(100)), &["ulimit -u"]);
        let mut group = with(|_| ());
        group.groups.pids = vec![GroupLimit { file: "/cg/pids.max".into(), limit: 9, used: 9 }];
        assert_named(&group, &["/cg"]);
        let both = with(|all| (all.address, all.threads) = (Some(TIGHT), Some(100)));
        assert_named(&both, &["ulimit -v", "ulimit -u"]);
        // So many stacks as were there at the time count, and one more.
        let stacks = |count: u64| Bounded { limit: count * STACK_BYTES, used: 0 };
        assert_named(&with(|all| all.address = Some(stacks(4))), &["ulimit -v"]);
        assert_named(&with(|all| all.address = Some(stacks(9))), &["ulimit -v", "ulimit -u"]);
    }

    #[test]
    fn where_none_is_near_all_are_named_that_are_set() {
        assert_named(&with(|_| ()), &["ulimit -v", "ulimit -u"]);
        assert_named(&with(|all| all.is_superuser = true), &["ulimit -v"]);
        assert_eq!(behind(Errno::EAGAIN, &HostLimits::default(), 3), None);
    }

    #[test]
    fn each_error_has_its_limits() {
        let limits = with(|all| {
            all.descriptors = Some(Bounded { limit: 12, used: 12 });
            all.file_bytes = Some(4096);
        });
        let said = |errno| behind(errno, &limits, 0).unwrap_or_default();
        assert!(said(Errno::ENOMEM).contains("ulimit -v"), "{}", said(Errno::ENOMEM));
        assert!(!said(Errno::ENOMEM).contains("ulimit -u"), "{}", said(Errno::ENOMEM));
        assert!(said(Errno::EMFILE).contains("12 open files (ulimit -n): raise that limit"));
        assert!(said(Errno::EFBIG).contains("4 KiB in one file (ulimit -f)"));
        assert_eq!(said(Errno::EIO), "", "no limit says so");
    }

    #[test]
    fn threads_are_counted_by_user() {
        let status = "Name:\tx\nUid:\t7\t8\t8\t8\nThreads:\t12\n";
        assert_eq!(threads_in(status, 7), Some(12));
        assert_eq!(threads_in(status, 8), None);
        assert_eq!(threads_in("Name:\tx\n", 7), None);
        assert!(threads_of_user().unwrap() >= 1, "this one");
    }
}
