//! Each rule, on both sides of its bound.

use std::path::Path;

use super::*;
use crate::cli::limits::{Folder, ProcessLimits, Shape};

const SHAPE: Shape = Shape {
    memory_bytes: 256 << 20,
    host_memory_bytes: 32 << 20,
    vcpus: 2,
    vms: 1,
    is_direct: false,
};

fn needs() -> Needs {
    Needs::of(SHAPE, 256 << 20)
}

/// The sentence about what is not enough of by one; and that what is enough is taken.
#[track_caller]
fn refused(what: Limited, needs: &Needs, enough: u64, with: impl Fn(u64) -> HostLimits) -> String {
    assert_eq!(shortages(needs, &with(enough)), []);
    let found = shortages(needs, &with(enough - 1));
    let [Shortage { what: found, sentence }] = &found[..] else { panic!("{found:?}") };
    assert_eq!(*found, what);
    assert!(!sentence.contains('\n'), "{sentence}");
    sentence.clone()
}

#[track_caller]
fn assert_says(sentence: &str, parts: &[&str]) {
    for part in parts {
        assert!(sentence.contains(part), "no {part:?} in: {sentence}");
    }
}

fn of_process(process: ProcessLimits) -> HostLimits {
    HostLimits { process, ..HostLimits::default() }
}

#[test]
fn a_page_that_costs_more_than_a_page_is_refused() {
    let with = |taken_bytes, left_bytes| HostLimits {
        page_cost: Some(PageCost { taken_bytes, left_bytes }),
        ..HostLimits::default()
    };
    assert_eq!(shortages(&needs(), &with(4096, 0)), []);
    for limits in [with(2 << 20, 2 << 20), with(4096, 4096)] {
        assert_says(&shortages(&needs(), &limits)[0].sentence, &["--host-memory", "shmem_enabled"]);
    }
}

#[test]
fn the_tightest_control_group_is_named_with_what_would_fit() {
    let group = |name: &str, limit, used| GroupLimit { file: name.into(), limit, used };
    let with = |room| HostLimits {
        groups: super::super::Groups {
            memory: vec![
                group("/cg/a/memory.max", 4 << 30, 0),
                group("/cg/memory.high", room + (1 << 20), 1 << 20),
            ],
            ..Default::default()
        },
        ..HostLimits::default()
    };
    let needs = needs();
    assert!(needs.memory_bytes() > 32 << 20);
    let said = refused(Limited::Groups, &needs, needs.memory_bytes(), with);
    assert_says(&said, &["/cg/memory.high", "of which 1 MiB are taken", "up to 32 MiB"]);
    assert_says(&said, &["--host-memory 31M or less", "beside them"]);
    let said = &shortages(&needs, &with(8 << 20))[0].sentence;
    assert_says(said, &["allows 9 MiB of memory, but", "raise it by"]);
    assert!(!said.contains("or give"), "nothing fits there: {said}");
}

fn needs_with_swap_in_memory(free_bytes: u64) -> Needs {
    let folder = Folder { path: "/shm".into(), is_in_memory: true, free_bytes: Some(free_bytes) };
    let mut needs = needs();
    needs.swap_in_memory = SwapInMemory::at(&folder, 224 << 20);
    needs
}

#[test]
fn swap_in_memory_has_to_have_room_there() {
    let short = needs_with_swap_in_memory((224 << 20) - 1);
    let found = shortages(&short, &HostLimits::default());
    let [Shortage { what: Limited::Swap, sentence }] = &found[..] else { panic!("{found:?}") };
    assert_says(sentence, &["/shm is in memory (tmpfs) and has 224 MiB free", "--swap-file"]);
    assert_eq!(shortages(&needs_with_swap_in_memory(224 << 20), &HostLimits::default()), []);
}

#[test]
fn swap_in_memory_is_charged_to_the_group_and_taken_of_the_host() {
    let needs = needs_with_swap_in_memory(1 << 30);
    assert_eq!(needs.memory_bytes(), self::needs().memory_bytes() + (224 << 20));
    let with = |room| HostLimits {
        groups: super::super::Groups {
            memory: vec![GroupLimit { file: "/cg/memory.max".into(), limit: room, used: 0 }],
            ..Default::default()
        },
        ..HostLimits::default()
    };
    let said = refused(Limited::Groups, &needs, needs.memory_bytes(), with);
    assert_says(&said, &["/cg/memory.max", "224 MiB for swap, since /shm is in memory (tmpfs)"]);
    assert_says(&said, &["put swap on a disk with --swap-file"]);
    assert!(!said.contains("give --host-memory"), "that would only move them: {said}");
    let with = |available| HostLimits { available_bytes: Some(available), ..HostLimits::default() };
    refused(Limited::Memory, &needs, needs.memory_bytes(), with);
}

#[test]
fn guests_that_need_less_than_the_ration_are_taken() {
    let small = Needs::of(Shape { memory_bytes: 16 << 20, ..SHAPE }, 16 << 20);
    assert_eq!(small.frames_bytes(), 16 << 20);
    let two = Needs::of(Shape { memory_bytes: 16 << 20, vms: 2, ..SHAPE }, 16 << 20);
    assert_eq!(two.frames_bytes(), 32 << 20);
}

#[test]
fn memory_that_is_not_there_is_refused_unless_the_host_swaps() {
    let needs = needs();
    let with = |available| HostLimits { available_bytes: Some(available), ..HostLimits::default() };
    let said = refused(Limited::Memory, &needs, needs.memory_bytes(), with);
    assert_says(&said, &["available", "free some", "--host-memory 31M or less"]);
    let swapping = HostLimits { free_swap_bytes: 1 << 30, ..with(1 << 20) };
    assert_eq!(shortages(&needs, &swapping), []);
}

#[test]
fn the_largest_files_are_what_counts() {
    let with = |most| of_process(ProcessLimits { file_bytes: Some(most), ..Default::default() });
    let said = refused(Limited::FileSize, &needs(), 256 << 20, with);
    assert_says(&said, &["the swap file has 256 MiB", "ulimit -f", "262144 KiB", "--swap-size"]);
    let frames = Needs::of(SHAPE, 4096);
    let said = refused(Limited::FileSize, &frames, 32 << 20, with);
    assert_says(&said, &["the file of the frames", "--host-memory"]);
    let direct = Needs::of(Shape { is_direct: true, ..SHAPE }, 4096);
    let said = refused(Limited::FileSize, &direct, 256 << 20, with);
    assert_says(&said, &["guest's memory", "--memory"]);
    let mut disk = frames.clone();
    disk.add_disk(Path::new("/d"), 1 << 30);
    let said = refused(Limited::FileSize, &disk, 1 << 30, with);
    assert_says(&said, &["--disk /d has 1 GiB", ",ro"]);
}

#[test]
fn what_a_process_may_have_is_counted_from_what_it_has() {
    let needs = needs();
    let bounded = |room| Some(Bounded { limit: room + 5, used: 5 });
    let said = refused(Limited::AddressSpace, &needs, needs.address_bytes(), |room| {
        of_process(ProcessLimits { address: bounded(room), ..Default::default() })
    });
    assert_says(&said, &["address space (ulimit -v)", "KiB or more"]);
    let said = refused(Limited::AddressSpace, &needs, needs.private_bytes(), |room| {
        of_process(ProcessLimits { data: bounded(room), ..Default::default() })
    });
    assert_says(&said, &["private memory (ulimit -d)"]);
    let said = refused(Limited::Descriptors, &needs, needs.descriptors, |room| {
        of_process(ProcessLimits { descriptors: bounded(room), ..Default::default() })
    });
    assert_says(&said, &["ulimit -n", "5 of them are", "--vcpus"]);
    let said = refused(Limited::Mappings, &needs, needs.mappings(), |room| {
        of_process(ProcessLimits { mappings: bounded(room), ..Default::default() })
    });
    assert_says(&said, &["vm.max_map_count"]);
    let wanted = needs.frames_bytes() + needs.private_bytes();
    let said = refused(Limited::Commit, &needs, wanted, |room| {
        of_process(ProcessLimits { commit: bounded(room), ..Default::default() })
    });
    assert_says(&said, &["vm.overcommit_memory=2", "vm.overcommit_ratio"]);
}

#[test]
fn peers_and_devices_are_counted_in() {
    let plain = needs();
    let mut more = needs();
    more.add_peers();
    more.add_devices(2);
    more.add_threads(3);
    assert!(more.threads >= plain.threads + 33 + 5);
    assert!(more.descriptors > plain.descriptors + 32);
    assert!(more.memory_bytes() >= plain.memory_bytes() + (64 << 20));
    assert!(more.address_bytes() > plain.address_bytes());
}

#[test]
fn the_images_that_are_loaded_are_counted_in() {
    let plain = needs();
    let mut more = needs();
    more.add_image(5 << 20);
    more.add_image(300 << 20);
    assert_eq!(more.memory_bytes(), plain.memory_bytes() + (305 << 20));
    assert_eq!(more.private_bytes(), plain.private_bytes() + (305 << 20));
    assert_eq!(more.address_bytes(), plain.address_bytes() + (305 << 20));
    let with = |bytes| HostLimits { available_bytes: Some(bytes), ..HostLimits::default() };
    let said = refused(Limited::Memory, &more, more.memory_bytes(), with);
    assert_says(&said, &["the program, the files to be loaded)"]);
    assert!(!refused(Limited::Memory, &plain, plain.memory_bytes(), with).contains("loaded"));
}

#[test]
fn too_few_threads_are_put_down_to_the_limit_that_is_tight() {
    let mut limits = HostLimits::default();
    let mut assert_named = |change: &dyn Fn(&mut HostLimits), part: &str| {
        change(&mut limits);
        assert_says(
            &too_few(&limits),
            &[part, "only 2 could be started", "for 2 vCPUs", "--vcpus"],
        );
    };
    assert_named(&|_| (), "does not say");
    assert_named(&|limits| limits.process.threads = Some(9), "may have 9 threads (ulimit -u)");
    // A stack that finds no room is the same error, and then no other limit is told.
    let address = Some(Bounded { limit: 64 << 20, used: 62 << 20 });
    assert_named(&|limits| limits.process.threads = Some(99_999), "(ulimit -u)");
    assert_named(&|limits| limits.process.address = address, "64 MiB of address space (ulimit -v)");
    assert!(!too_few(&limits).contains("ulimit -u"), "{}", too_few(&limits));
    limits.process.address = None;
    let machine = Some(Bounded { limit: 700, used: 699 });
    let mut assert_named = |change: &dyn Fn(&mut HostLimits), part: &str| {
        change(&mut limits);
        assert_says(&too_few(&limits), &[part]);
    };
    assert_named(&|limits| limits.process.kernel_threads = machine, "kernel.threads-max");
    let group = || GroupLimit { file: "/cg/pids.max".into(), limit: 4, used: 3 };
    assert_named(&|limits| limits.groups.pids = vec![group()], "/cg/pids.max allows 4 threads, 3");
}

/// The sentence about two threads that could be started of those that are wanted.
fn too_few(limits: &HostLimits) -> String {
    let error = std::io::Error::from_raw_os_error(libc::EAGAIN);
    too_few_threads(&needs(), limits, 2, &error)
}
