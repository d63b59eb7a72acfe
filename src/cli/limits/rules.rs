//! What a run needs against what the host allows: one rule for each limit.

use std::fmt;

use nix::errno::Errno;

use super::behind::{behind, threads_of_user};
use super::groups::GroupLimit;
use super::process::{Bounded, try_threads};
use super::{HostLimits, Needs, SwapInMemory};
use crate::cli::values::size;
use crate::host_mm::MIN_HOST_MEMORY_BYTES;
use crate::lab::text::{human_bytes, human_count};
use crate::sys::small_pages::PageCost;

/// What is limited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Limited {
    Pages,
    Memory,
    Groups,
    Commit,
    AddressSpace,
    FileSize,
    Swap,
    Descriptors,
    Mappings,
    Threads,
}

/// Something that cannot be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Shortage {
    pub(crate) what: Limited,
    /// What is wrong, and what to do.
    pub(crate) sentence: String,
}

/// All that the host does not allow, the worst first.
pub(crate) fn shortages(needs: &Needs, limits: &HostLimits) -> Vec<Shortage> {
    let mut found = Vec::new();
    let mut add = |what, sentence: Option<String>| {
        found.extend(sentence.map(|sentence| Shortage { what, sentence }));
    };
    let process = &limits.process;
    add(Limited::Pages, limits.page_cost.and_then(pages));
    add(Limited::FileSize, process.file_bytes.and_then(|most| file_size(needs, most)));
    add(Limited::Swap, needs.swap_in_memory.as_ref().and_then(swap_room));
    add(Limited::Groups, group(needs, &limits.groups.memory));
    add(Limited::Memory, memory(needs, limits));
    add(Limited::Commit, process.commit.and_then(|commit| promised(needs, commit)));
    let address = process
        .address
        .and_then(|limit| too_much("-v", "address space", needs.address_bytes(), limit));
    let private = || {
        let limit = process.data?;
        too_much("-d", "private memory", needs.private_bytes(), limit)
    };
    add(Limited::AddressSpace, address.or_else(private));
    add(Limited::Descriptors, process.descriptors.and_then(|limit| descriptors(needs, limit)));
    add(Limited::Mappings, process.mappings.and_then(|limit| mappings(needs, limit)));
    // Tried last: a limit from above has its own sentence.
    if limits.tries_threads && found.is_empty() {
        let threads = threads(needs, limits);
        found.extend(threads.map(|sentence| Shortage { what: Limited::Threads, sentence }));
    }
    found
}

fn pages(cost: PageCost) -> Option<String> {
    (cost != PageCost::RIGHT).then(|| {
        format!(
            "a page of shared memory takes {} on this host and leaves {} behind when it is freed, so --host-memory would not be kept: write never to /sys/kernel/mm/transparent_hugepage/shmem_enabled",
            human_bytes(cost.taken_bytes),
            human_bytes(cost.left_bytes)
        )
    })
}

fn file_size(needs: &Needs, most: u64) -> Option<String> {
    let file = needs.files.iter().find(|file| file.bytes > most)?;
    Some(format!(
        "{} has {}, but this process may write files of {} only (ulimit -f): raise that limit to {} KiB or more, or {}",
        file.what,
        human_bytes(file.bytes),
        human_bytes(most),
        file.bytes.div_ceil(1024),
        file.advice
    ))
}

fn swap_room(swap: &SwapInMemory) -> Option<String> {
    let free = swap.folder.free_bytes.filter(|&free| free < swap.bytes)?;
    Some(format!(
        "{} is in memory (tmpfs) and has {} free, but swap takes up to {} there: put swap on a disk with --swap-file, make that file system larger, or give less --memory, more --host-memory or less --swap-size",
        swap.folder.path.display(),
        human_bytes(free),
        human_bytes(swap.bytes)
    ))
}

/// What is wanted of memory, as a part of a sentence.
struct Wanted<'a>(&'a Needs);

impl fmt::Display for Wanted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let needs = self.0;
        write!(
            f,
            "frames take up to {} and about {} is wanted beside them (tables, KVM, the program{})",
            human_bytes(needs.frames_bytes()),
            human_bytes(needs.beside_bytes()),
            if needs.has_images() { ", the files to be loaded" } else { "" }
        )?;
        match &needs.swap_in_memory {
            Some(swap) => write!(
                f,
                ", and {} for swap, since {} is in memory (tmpfs)",
                human_bytes(swap.bytes),
                swap.folder.path.display()
            ),
            None => Ok(()),
        }
    }
}

/// What can be done where there is room for so many bytes: all but the last word.
fn smaller(needs: &Needs, room: u64) -> String {
    if needs.swap_in_memory.is_some() {
        // What frames do not hold, swap would have to.
        return ", put swap on a disk with --swap-file, or give less --memory".to_owned();
    }
    let beside = needs.memory_bytes() - needs.frames_bytes();
    let left = room.saturating_sub(beside) >> 20 << 20;
    match left >= MIN_HOST_MEMORY_BYTES {
        true => format!(", or give --host-memory {} or less", size(left)),
        false => String::new(),
    }
}

fn group(needs: &Needs, limits: &[GroupLimit]) -> Option<String> {
    // The first of those that are equally tight: the group's own.
    let tightest = limits.iter().min_by_key(|limit| limit.room())?;
    let wanted = needs.memory_bytes();
    if tightest.room() >= wanted {
        return None;
    }
    let GroupLimit { file, limit, used } = tightest;
    let taken = match limit < &wanted {
        true => String::new(),
        false => format!(", of which {} are taken", human_bytes(*used)),
    };
    Some(format!(
        "the control group's limit {} allows {} of memory{taken}, but {}: raise it by {} or more{}",
        file.display(),
        human_bytes(*limit),
        Wanted(needs),
        human_bytes((wanted - tightest.room()).next_multiple_of(1 << 20)),
        smaller(needs, tightest.room())
    ))
}

fn memory(needs: &Needs, limits: &HostLimits) -> Option<String> {
    // With swap of its own the host is slow, but does not end anybody.
    let room = limits.available_bytes?.saturating_add(limits.free_swap_bytes);
    (needs.memory_bytes() > room).then(|| {
        format!(
            "this host has {} of memory available, but {}: free some{}",
            human_bytes(room),
            Wanted(needs),
            smaller(needs, room)
        )
    })
}

fn promised(needs: &Needs, commit: Bounded) -> Option<String> {
    let wanted = needs.frames_bytes() + needs.private_bytes();
    (wanted > commit.room()).then(|| {
        format!(
            "the host promises no more than {} of memory (vm.overcommit_memory=2), {} of it are taken, and with {} of frames {} are wanted: set vm.overcommit_memory to 0 or raise vm.overcommit_ratio{}",
            human_bytes(commit.limit),
            human_bytes(commit.used),
            human_bytes(needs.frames_bytes()),
            human_bytes(wanted),
            smaller(needs, commit.room())
        )
    })
}

/// For a limit of a shell's `ulimit`, in bytes there and in KiB here.
fn too_much(option: &str, what: &str, wanted: u64, limit: Bounded) -> Option<String> {
    (wanted > limit.room()).then(|| {
        format!(
            "this process may have {} of {what} (ulimit {option}), {} of it are taken, and about {} are wanted: raise that limit to {} KiB or more, or give less --memory or --host-memory",
            human_bytes(limit.limit),
            human_bytes(limit.used),
            human_bytes(wanted),
            wanted.saturating_add(limit.used).div_ceil(1024)
        )
    })
}

fn descriptors(needs: &Needs, limit: Bounded) -> Option<String> {
    (needs.descriptors > limit.room()).then(|| {
        format!(
            "this process may have {} files open (ulimit -n), {} of them are, and {} more are wanted: raise that limit to {} or more, or give less --vcpus",
            human_count(limit.limit),
            human_count(limit.used),
            human_count(needs.descriptors),
            limit.used + needs.descriptors
        )
    })
}

fn mappings(needs: &Needs, limit: Bounded) -> Option<String> {
    (needs.mappings() > limit.room()).then(|| {
        format!(
            "a process may have {} mappings on this host (vm.max_map_count), {} of them are taken here, and about {} more are wanted: raise it to {} or more, or give less --vcpus",
            human_count(limit.limit),
            human_count(limit.used),
            human_count(needs.mappings()),
            limit.used + needs.mappings()
        )
    })
}

fn threads(needs: &Needs, limits: &HostLimits) -> Option<String> {
    // One is there already.
    let wanted = needs.threads.saturating_sub(1);
    let (started, error) = try_threads(wanted).err()?;
    // Counted only now: it takes a look at every process.
    let mut limits = limits.clone();
    limits.process.threads_used = threads_of_user();
    Some(too_few_threads(needs, &limits, started, &error))
}

fn too_few_threads(
    needs: &Needs,
    limits: &HostLimits,
    started: u64,
    error: &std::io::Error,
) -> String {
    let wanted = needs.threads.saturating_sub(1);
    let errno = Errno::from_raw(error.raw_os_error().unwrap_or_default());
    let why = behind(errno, limits, started);
    let why = why.unwrap_or_else(|| "the kernel does not say why: end other programs".to_owned());
    format!(
        "{wanted} threads are wanted for {} vCPUs and what serves them, but only {started} could be started ({error}): {why}, or give less --vcpus",
        needs.vcpus()
    )
}

#[cfg(test)]
#[path = "rules_tests.rs"]
mod tests;
