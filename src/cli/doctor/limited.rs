//! What the host limits, each with the sentence that `boot` would refuse with.

use super::Finding;
use super::host::SWAP_BYTES;
use crate::cli::limits::{
    Folder, HostLimits, Limited, Needs, Shape, Shortage, SwapInMemory, shortages,
};
use crate::host_mm::MIN_HOST_MEMORY_BYTES;
use crate::lab::text::{human_bytes, human_count};

/// `gnomon boot` unless it is told otherwise.
const BOOT: Shape = Shape {
    memory_bytes: 256 << 20,
    host_memory_bytes: 64 << 20,
    vcpus: 1,
    vms: 1,
    is_direct: false,
};
/// The least that it can be told.
const LEAST: Shape =
    Shape { memory_bytes: 16 << 20, host_memory_bytes: MIN_HOST_MEMORY_BYTES, ..BOOT };
/// What the host limits: no more than a sentence each, the one that boot would refuse with.
pub(super) fn examine(limits: &HostLimits, temporary: &Folder) -> Vec<Finding> {
    let of = |shape: Shape, swap_bytes| {
        let mut needs = Needs::of(shape, swap_bytes);
        needs.swap_in_memory = SwapInMemory::at(temporary, shape.memory_bytes);
        shortages(&needs, limits)
    };
    let boot = of(BOOT, SWAP_BYTES);
    let least = of(LEAST, LEAST.memory_bytes);
    let what = [
        (Limited::Pages, "huge pages", pages(limits)),
        (Limited::Memory, "memory", available(limits)),
        (Limited::Groups, "control groups", groups(limits)),
        (Limited::Commit, "overcommit", overcommit(limits)),
        (Limited::AddressSpace, "address space", address_space(limits)),
        (Limited::FileSize, "file size", file_size(limits)),
        (Limited::Swap, "swap in memory", swap(temporary)),
        (
            Limited::Descriptors,
            "open files",
            up_to(limits.process.descriptors.map(|one| one.limit)),
        ),
        (Limited::Mappings, "mappings", up_to(limits.process.mappings.map(|one| one.limit))),
        (Limited::Threads, "threads", up_to(limits.process.threads)),
    ];
    let finding = |(limited, what, fine): (Limited, &'static str, String)| {
        let first = |found: &[Shortage]| {
            found.iter().find(|one| one.what == limited).map(|one| one.sentence.clone())
        };
        match (first(&least), first(&boot)) {
            (Some(sentence), _) => Finding::missing(what, sentence),
            (None, Some(sentence)) => Finding::limited(what, sentence),
            (None, None) => Finding::ok(what, fine),
        }
    };
    what.into_iter().map(finding).collect()
}

fn swap(temporary: &Folder) -> String {
    let shown = temporary.path.display();
    match temporary.is_in_memory {
        true => format!("{shown} is, and has room for it"),
        false => format!("{shown} is not (tmpfs)"),
    }
}

fn pages(limits: &HostLimits) -> String {
    match limits.page_cost {
        Some(_) => "a page of shared memory takes a page, and gives it back".to_owned(),
        None => "what a page of shared memory takes could not be tried".to_owned(),
    }
}

fn available(limits: &HostLimits) -> String {
    match limits.available_bytes {
        Some(bytes) => format!("{} available", human_bytes(bytes)),
        None => "/proc/meminfo does not say how much is available".to_owned(),
    }
}

fn groups(limits: &HostLimits) -> String {
    let found = &limits.groups;
    let tightest = found.memory.iter().min_by_key(|limit| limit.room());
    let seen = match tightest {
        Some(limit) => {
            format!("{} left of {}", human_bytes(limit.room()), limit.file.display())
        }
        None => "no limit on memory".to_owned(),
    };
    match found.has_hidden_ancestors {
        true => format!("{seen}; this is a namespace, whose outer groups cannot be seen"),
        false => seen,
    }
}

fn overcommit(limits: &HostLimits) -> String {
    match limits.process.commit {
        Some(commit) => format!("{} may be promised yet", human_bytes(commit.room())),
        None => "memory costs nothing until it is used".to_owned(),
    }
}

fn address_space(limits: &HostLimits) -> String {
    match limits.process.address {
        None => "no limit".to_owned(),
        Some(address) => format!(
            "limited to {} (ulimit -v): enough for boot, not for large guests",
            human_bytes(address.limit)
        ),
    }
}

fn file_size(limits: &HostLimits) -> String {
    match limits.process.file_bytes {
        Some(bytes) => format!("up to {}", human_bytes(bytes)),
        None => "no limit".to_owned(),
    }
}

fn up_to(limit: Option<u64>) -> String {
    limit.map_or_else(|| "no limit".to_owned(), |limit| format!("up to {}", human_count(limit)))
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;
    use crate::cli::limits::{Bounded, GroupLimit};
    use crate::sys::small_pages::PageCost;

    /// A place for swap with room for any.
    #[test]
    fn swap_that_fits_into_memory_or_not_is_told() {
        let swap = |free_bytes| {
            let folder = Folder { is_in_memory: true, free_bytes, ..Folder::on_disk() };
            let findings = examine(&HostLimits::default(), &folder);
            let found = findings.into_iter().find(|finding| finding.what == "swap in memory");
            found.unwrap().status
        };
        assert_eq!((swap(None), swap(Some(1 << 20))), (Status::Ok, Status::Missing));
        let between = swap(Some(BOOT.memory_bytes - 1));
        assert_eq!(between, Status::Limited, "less memory is enough");
    }

    #[track_caller]
    fn assert_line(limits: &HostLimits, what: &str, status: Status, part: &str) {
        let findings = examine(limits, &Folder::on_disk());
        let finding = findings.iter().find(|finding| finding.what == what).unwrap();
        assert_eq!(finding.status, status, "{finding}");
        assert!(finding.detail.contains(part), "no {part:?} in: {finding}");
    }

    #[test]
    fn a_host_without_limits_gets_a_line_for_everything() {
        let findings = examine(&HostLimits::default(), &Folder::on_disk());
        assert_eq!(findings.len(), 10);
        assert!(findings.iter().all(|one| one.status == Status::Ok && !one.detail.is_empty()));
        assert_line(&HostLimits::probe(), "huge pages", Status::Ok, "takes a page");
    }

    #[test]
    fn what_a_small_guest_can_do_without_is_only_limited() {
        let mut limits = HostLimits::default();
        let missing = |limits: &HostLimits, what, part| {
            assert_line(limits, what, Status::Missing, part);
        };
        limits.page_cost = Some(PageCost { taken_bytes: 2 << 20, left_bytes: 0 });
        missing(&limits, "huge pages", "shmem_enabled");
        limits.available_bytes = Some(64 << 20);
        assert_line(&limits, "memory", Status::Limited, "--host-memory");
        limits.available_bytes = Some(8 << 20);
        missing(&limits, "memory", "free some");
        let file = "/sys/fs/cgroup/memory.max".into();
        limits.groups.memory = vec![GroupLimit { file, limit: 96 << 20, used: 32 << 20 }];
        assert_line(&limits, "control groups", Status::Limited, "memory.max allows 96 MiB");
        limits.process.file_bytes = Some(1 << 20);
        missing(&limits, "file size", "ulimit -f");
        limits.process.file_bytes = Some(64 << 20);
        assert_line(&limits, "file size", Status::Limited, "--swap-size");
        let bounded = |limit, used| Some(Bounded { limit, used });
        limits.process.address = bounded(60 << 20, 10 << 20);
        missing(&limits, "address space", "ulimit -v");
        limits.process.descriptors = bounded(16, 4);
        missing(&limits, "open files", "ulimit -n");
        limits.process.mappings = bounded(100, 40);
        missing(&limits, "mappings", "vm.max_map_count");
        limits.process.commit = bounded(4 << 30, 4 << 30);
        missing(&limits, "overcommit", "vm.overcommit_memory=2");
    }

    #[test]
    fn a_namespace_of_control_groups_is_told() {
        let mut limits = HostLimits::default();
        limits.groups.has_hidden_ancestors = true;
        assert_line(&limits, "control groups", Status::Ok, "cannot be seen");
    }
}
