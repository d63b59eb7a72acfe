//! What a guest writes is what it reads, through evictions and every kind of fault.

use std::io::{Read, Write};
use std::time::Duration;

use vm_memory::{ReadVolatile, VolatileMemory, WriteVolatile};

use super::rig::{FRAMES, Rig, memory, page, pfn};
use crate::addr::{Gfn, PAGE_SIZE, PAGE_SIZE_U64};
use crate::direct_mmu::DirectConfig;
use crate::host_mm::hooks::EINTR;
use crate::host_mm::{
    HostMm, HostMmConfig, Injection, InjectionPlan, MmError, Placement, ReclaimPolicy, When,
};
use crate::sys::uffd::Features;

/// Writes and reads all of a memory four times as large as the ration, twice.
fn keeps_its_content(direct: DirectConfig) -> Rig {
    content_is_kept(memory(4 * FRAMES), direct)
}

fn content_is_kept(memory: HostMmConfig, direct: DirectConfig) -> Rig {
    let rig = Rig::new(memory, direct);
    let reclaim = rig.mm.start_background_reclaim().unwrap();
    for round in 1..=2_u64 {
        for number in 0..4 * FRAMES {
            rig.write(number, &page(round << 20 | number));
            if number % 256 == 0 {
                rig.assert_within_ration();
            }
        }
        for number in 0..4 * FRAMES {
            assert!(rig.read(number) == page(round << 20 | number), "page {number}");
        }
    }
    assert!(rig.mm.stats().swap_ins > 4 * FRAMES, "{:?}", rig.mm.stats());
    drop(reclaim);
    rig.assert_sound();
    rig
}

#[test]
#[cfg_attr(
    not(kernel_faults),
    ignore = "no userfaultfd for kernel-mode faults here: see `gnomon doctor`"
)]
fn memory_four_times_as_large_as_the_ration_keeps_its_content() {
    let rig = keeps_its_content(DirectConfig::default());
    let (stats, mmu) = (rig.mm.stats(), rig.mmu.stats());
    let protects = rig.mmu.mmu.shards[0].window.protects_at_install();
    assert_eq!(
        stats.clean_drops > 0,
        protects,
        "pages that were only read are not written again, where the kernel can tell: {stats:?}"
    );
    assert!(mmu.write_protected > 0, "{mmu:?}");
}

/// A call that ages pages raises an event, and one more if it is made again.
#[test]
#[cfg_attr(
    not(kernel_faults),
    ignore = "no userfaultfd for kernel-mode faults here: see `gnomon doctor`"
)]
fn interrupted_calls_remove_nothing() {
    let eintr = Injection { fault: EINTR.plain(), when: When::Chance(0.5) };
    let inject = InjectionPlan { items: vec![eintr], seed: 1, ..InjectionPlan::default() };
    let config = HostMmConfig { inject, ..memory(4 * FRAMES) };
    let rig = content_is_kept(config, DirectConfig::default());
    let stats = rig.mmu.stats();
    assert!(stats.aged_zaps > 0, "{stats:?}");
    assert_eq!(stats.removed, 0, "{stats:?}");
}

#[test]
#[cfg_attr(
    not(kernel_faults),
    ignore = "no userfaultfd for kernel-mode faults here: see `gnomon doctor`"
)]
fn several_parts_of_the_window_have_a_thread_each() {
    let direct = DirectConfig { shards: 3, fault_around: 1, ..DirectConfig::default() };
    let rig = keeps_its_content(direct);
    assert_eq!(rig.mmu.stats().fault_around, 0);
    assert_eq!(rig.mmu.mmu.shards.len(), 3);
}

/// As on Linux 6.1: `UFFDIO_CONTINUE` cannot protect, so each page that is mapped counts as written.
#[test]
#[cfg_attr(
    not(kernel_faults),
    ignore = "no userfaultfd for kernel-mode faults here: see `gnomon doctor`"
)]
fn a_kernel_that_cannot_protect_as_it_maps_loses_nothing() {
    let features = Features::all().difference(Features::WRITE_PROTECT_UNPOPULATED);
    let spin = Duration::ZERO;
    let direct = DirectConfig { features, spin, ..DirectConfig::default() };
    let rig = keeps_its_content(direct);
    assert_eq!(rig.mm.stats().clean_drops, 0, "{:?}", rig.mm.stats());
    assert_eq!(rig.mmu.stats().already_mapped, rig.mmu.stats().upgrades);
}

#[test]
#[cfg_attr(
    not(protecting_faults),
    ignore = "this kernel cannot protect pages as it maps them: Linux 6.4 can"
)]
fn a_page_is_read_only_until_it_is_written() {
    let direct = DirectConfig { fault_around: 4, ..DirectConfig::default() };
    let rig = Rig::new(memory(FRAMES), direct);
    assert!(rig.mmu.mmu.shards[0].window.protects_at_install());
    assert_eq!(rig.read(7), page(0));
    let before = rig.mmu.stats();
    rig.write(7, &page(1));
    let after = rig.mmu.stats();
    assert_eq!((after.upgrades - before.upgrades, after.installs - before.installs), (1, 0));
    rig.evict(7);
    assert_eq!(rig.mm.stats().swap_outs, 1);
    assert!(rig.read(7) == page(1));
    rig.evict(7);
    assert_eq!((rig.mm.stats().swap_outs, rig.mm.stats().clean_drops), (1, 1));
    // Cleaned, it is read on, and the next write is seen.
    rig.write(7, &page(2));
    assert_eq!(rig.mm.clean_frames(&[pfn(7)]).unwrap(), 1);
    let before = rig.mmu.stats();
    assert!(rig.read(7) == page(2));
    assert_eq!(rig.mmu.stats().faults, before.faults, "it stayed mapped");
    rig.write(7, &page(3));
    assert_eq!(rig.mmu.stats().upgrades, before.upgrades + 1);
    rig.evict(7);
    assert!(rig.read(7) == page(3));
    rig.assert_sound();
}

#[test]
#[cfg_attr(
    not(kernel_faults),
    ignore = "no userfaultfd for kernel-mode faults here: see `gnomon doctor`"
)]
fn a_fault_maps_the_pages_after_it_that_are_in_frames() {
    let direct = DirectConfig { fault_around: 4, ..DirectConfig::default() };
    let rig = Rig::new(memory(FRAMES), direct);
    // By the host: in frames, and mapped nowhere.
    for number in [10_u64, 11, 12, 14] {
        rig.object.write(Gfn::new(number).base(), &page(number)).unwrap();
    }
    assert!(rig.read(10) == page(10));
    assert_eq!((rig.mmu.stats().installs, rig.mmu.stats().fault_around), (1, 2));
    assert!(rig.read(11) == page(11) && rig.read(12) == page(12));
    assert_eq!(rig.mmu.stats().faults, 1);
    assert!(rig.read(13) == page(0) && rig.read(14) == page(14));
    rig.assert_sound();
}

/// As KVM does, the kernel touches the window itself.
#[test]
#[cfg_attr(
    not(kernel_faults),
    ignore = "no userfaultfd for kernel-mode faults here: see `gnomon doctor`"
)]
fn the_kernel_touches_the_window_as_kvm_does() {
    let rig = Rig::new(memory(FRAMES), DirectConfig::default());
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&page(5)).unwrap();
    std::io::Seek::rewind(&mut file).unwrap();
    let region = rig.window().region();
    let mut slice = region.get_slice(9 * PAGE_SIZE, PAGE_SIZE).unwrap();
    file.read_exact_volatile(&mut slice).unwrap();
    assert!(rig.read(9) == page(5));
    rig.evict(9);
    let slice = region.get_slice(9 * PAGE_SIZE, PAGE_SIZE).unwrap();
    let mut written = tempfile::tempfile().unwrap();
    written.write_all_volatile(&slice).unwrap();
    std::io::Seek::rewind(&mut written).unwrap();
    let mut found = [0; PAGE_SIZE];
    written.read_exact(&mut found).unwrap();
    assert!(found == page(5));
    rig.assert_sound();
}

/// Re-faults of 64 pages that are used all the time, while twice the ration is written five times.
fn hot_refaults(policy: ReclaimPolicy) -> u64 {
    let direct = DirectConfig { fault_around: 1, ..DirectConfig::default() };
    let rig = Rig::new(HostMmConfig { policy, ..memory(2 * FRAMES) }, direct);
    (0..64).for_each(|number| rig.write(number, &page(number + 1)));
    rig.object.watch(Gfn::new(0), 64);
    for number in (0..5).flat_map(|_| 64..2 * FRAMES) {
        rig.write(number, &page(number + 1));
        assert!(rig.read(number % 64) == page(number % 64 + 1));
    }
    assert_eq!(rig.mmu.stats().aged_zaps > 0, policy == ReclaimPolicy::Clock);
    rig.assert_sound();
    rig.mm.stats().watched_swap_ins
}

#[test]
#[cfg_attr(
    not(kernel_faults),
    ignore = "no userfaultfd for kernel-mode faults here: see `gnomon doctor`"
)]
fn pages_that_are_used_prove_it_by_faulting_and_stay() {
    let clock = hot_refaults(ReclaimPolicy::Clock);
    let fifo = hot_refaults(ReclaimPolicy::Fifo);
    // Each may go once: the clock's first round knows nothing yet.
    assert!(2 * clock <= fifo, "{clock} with the clock, {fifo} with a FIFO");
}

#[test]
fn what_needs_another_frame_is_refused_with_a_sentence() {
    let mm = HostMm::new(memory(2 * FRAMES)).unwrap();
    let object = mm.create_object(2 * FRAMES * PAGE_SIZE_U64).unwrap();
    object.write(Gfn::new(3).base(), &page(1)).unwrap();
    assert_eq!(object.lock_page(Gfn::new(3)).unwrap().pfn(), pfn(3));
    let (gfn, frames) = (Gfn::new(3), [pfn(3)]);
    let refused = [
        mm.create_object(4096).map(drop),
        mm.migrate_frames(&frames).map(drop),
        mm.merge_frames(pfn(3), pfn(4)).map(drop),
        mm.merge_zero_frame(pfn(3)).map(drop),
        object.copy_on_write_clone().map(drop),
        object.share_pages(std::iter::once(gfn)).map(drop),
        object.exchange_pages(gfn, &object, Gfn::new(9), 1),
        object.remap_to_copies(gfn, &object, Gfn::new(9), 1),
    ];
    for refused in refused {
        let error = refused.unwrap_err();
        assert!(matches!(error, MmError::FixedFrames { .. }), "{error}");
        assert!(error.to_string().contains("each guest page has a frame of its own"), "{error}");
    }
    drop(object);
    assert_eq!(mm.stats().frames_in_use, 0);
    assert_eq!(mm.resident_bytes().unwrap(), 0, "the memory of free frames is given back");
    let too_large = mm.create_object(2 * FRAMES * PAGE_SIZE_U64 + 1).unwrap_err();
    assert!(matches!(too_large, MmError::FixedFrames { .. }), "{too_large}");
    assert!(mm.create_object(2 * FRAMES * PAGE_SIZE_U64).is_ok());
}

#[test]
fn other_host_memory_is_refused() {
    let config = HostMmConfig { placement: Placement::Anywhere, ..memory(FRAMES) };
    let mm = HostMm::new(config).unwrap();
    let object = mm.create_object(4096).unwrap();
    let view = mm.map_guest_view().unwrap();
    let refused = crate::direct_mmu::DirectMmu::new(DirectConfig::default(), object, view, |_| {});
    assert!(refused.unwrap_err().to_string().contains("placement `identity`"));
}
