//! Memory that somebody removes behind this layer's back, in the middle of an eviction.

use super::rig::{FRAMES, config, page};
use crate::frames::backing::Backing;
use crate::reclaim::evict::drop_clean;
use crate::revoke::vacate::Vacator;
use crate::swap::MemorySwap;
use crate::{HostMm, HostMmConfig, Placement};
use gnomon_export_rmap::LockedPage;
use gnomon_export_rmap::addr::{Gfn, PAGE_SIZE_U64};

const ONE: Gfn = Gfn::new(1);

/// What the checks find of a clean page to which `happens` after it was settled.
fn found(happens: impl FnOnce(&Vacator, &LockedPage<'_>)) -> u64 {
    let guest_bytes = FRAMES * PAGE_SIZE_U64;
    let config = HostMmConfig { placement: Placement::Identity { guest_bytes }, ..config() };
    let mm = HostMm::with_backend(config, Box::new(MemorySwap::new(16))).unwrap();
    let object = mm.create_object(guest_bytes).unwrap();
    object.write(ONE.base(), &page(1)).unwrap();
    let pfn = object.try_lock_resident(ONE).map(|page| page.pfn()).unwrap();
    assert_eq!(mm.clean_frames(&[pfn]).unwrap(), 1);
    mm.expect_holes();
    let page = object.try_lock_resident(ONE).unwrap();
    let of: &Vacator = &mm.pager;
    of.settle_hole(&page).unwrap();
    happens(of, &page);
    assert_eq!(drop_clean(of, &page).unwrap(), page.slot());
    drop(page);
    mm.violations().1
}

#[test]
fn a_clean_page_that_is_removed_after_it_was_settled_is_no_violation() {
    assert_eq!(found(|_, _| ()), 0);
    assert_eq!(found(|of, page| of.view.punch(page.pfn(), 1).unwrap()), 0);
}

#[test]
fn a_clean_page_that_was_written_unnoticed_is_a_violation() {
    assert_eq!(found(|of, page| of.view.write(page, 0, &[8]).unwrap()), 1);
}
