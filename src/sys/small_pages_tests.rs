use std::os::unix::fs::FileExt;

use nix::fcntl::{FallocateFlags, fallocate};
use vm_memory::{Bytes, VolatileMemory};

use super::*;
use crate::generous::on_generous_tmpfs;

#[test]
fn a_page_costs_a_page_on_this_host() {
    assert_eq!(PageCost::measure().unwrap(), PageCost::RIGHT);
}

#[test]
fn populating_brings_in_what_is_missing_and_changes_nothing_else() {
    let file = create_memfd("gnomon-test", TRIED_BYTES).unwrap();
    let region = map(file.try_clone().unwrap(), TRIED_BYTES).unwrap();
    region.as_volatile_slice().write_obj(7_u64, PAGE_SIZE).unwrap();
    populate(&region, 0, 3 * PAGE_SIZE).unwrap();
    assert_eq!(allocated_bytes(&file).unwrap(), 3 * PAGE_SIZE_U64);
    assert_eq!(region.as_volatile_slice().read_obj::<u64>(PAGE_SIZE).unwrap(), 7);
    let outside = populate(&region, region.size(), PAGE_SIZE).unwrap_err();
    assert_eq!(outside.kind(), io::ErrorKind::InvalidInput);
}

/// That the check sees it when the rule is broken, and that keeping it is enough.
#[test]
#[cfg_attr(
    not(huge_tmpfs),
    ignore = "no tmpfs of huge pages can be mounted here: that takes root and CONFIG_TRANSPARENT_HUGEPAGE"
)]
fn the_mapping_decides_where_the_host_is_generous() {
    on_generous_tmpfs(TRIED_BYTES, |file| {
        let broken = |write: &dyn Fn(&File)| {
            let file = file();
            let write = || {
                write(&file);
                Ok(())
            };
            PageCost::of(&file, write).unwrap()
        };
        for cost in [
            broken(&|file| file.write_all_at(&[1], 0).unwrap()),
            broken(&|file| fallocate(file, FallocateFlags::empty(), 0, 4096).unwrap()),
            broken(&|file| {
                let bytes = usize::try_from(TRIED_BYTES).unwrap();
                let whole = FileOffset::new(file.try_clone().unwrap(), 0);
                let region = MmapRegion::<()>::from_file(whole, bytes).unwrap();
                region.as_volatile_slice().write_obj(1_u8, 0).unwrap();
            }),
        ] {
            assert!(cost.taken_bytes > PAGE_SIZE_U64, "{cost:?}");
            assert!(cost.left_bytes > 0, "{cost:?}");
        }
        let kept = |write: &dyn Fn(&MmapRegion)| {
            let file = file();
            let region = map(file.try_clone().unwrap(), TRIED_BYTES).unwrap();
            let write = || {
                write(&region);
                Ok(())
            };
            PageCost::of(&file, write).unwrap()
        };
        for cost in [
            kept(&|region| populate(region, 0, PAGE_SIZE).unwrap()),
            kept(&|region| region.as_volatile_slice().write_obj(1_u8, 0).unwrap()),
        ] {
            assert_eq!(cost, PageCost::RIGHT);
        }
    });
}

/// As on kernels before 5.14.
#[test]
fn a_page_is_tried_where_it_cannot_be_populated_too() {
    let file = create_memfd("gnomon-test", TRIED_BYTES).unwrap();
    let region = map(file.try_clone().unwrap(), TRIED_BYTES).unwrap();
    let cost = PageCost::of(&file, || fill_first_page(&region, |_, _, _| Ok(())));
    assert_eq!(cost.unwrap(), PageCost::RIGHT);
}
