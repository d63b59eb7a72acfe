//! What the tripwire caught: a touch of a freed frame, judged.
//!
//! Guarantee: with `HostMmConfig::paranoid`, the first access to a frame that holds no page through
//! an SPTE that still stands ends the VM with a sentence that names the frame, the page that was in
//! it, the address and the vCPU.

use std::sync::{Arc, Weak};

use crate::addr::Pfn;
use crate::export_rmap::{LockedPage, PageFlags};
use crate::host_mm::{HostMm, TripReport, TripwireWatch};
use crate::shadow_mmu::ShadowMmu;
use crate::vmm::error::{StaleAccess, VmError};
use crate::vmm::run::core::Ender;
use crate::vmm::run::kick::Kicker;
use crate::vmm::run::outcome::Outcome;

/// Attempts at a page lock before a touch is let go unjudged.
const LOCK_ATTEMPTS: u32 = 10_000;

/// Arms the guest view of a VM, if its host memory is paranoid.
pub(super) fn watch(
    mm: &Arc<HostMm>,
    shadow: &Arc<ShadowMmu>,
    kickers: &[Arc<Kicker>],
    ender: Ender,
) -> Result<Option<TripwireWatch>, VmError> {
    if !mm.config().paranoid {
        return Ok(None);
    }
    // Weak: the watch must not keep alive what it watches.
    let (weak_mm, weak_shadow) = (Arc::downgrade(mm), Arc::downgrade(shadow));
    let kickers = kickers.to_vec();
    let on_trip = move |report: TripReport| {
        if let (Some(mm), Some(shadow)) = (Weak::upgrade(&weak_mm), Weak::upgrade(&weak_shadow))
            && let Some(stale) = judge(&mm, &shadow, &kickers, report)
        {
            ender.end(Outcome::Failed(VmError::Stale(stale)));
        }
    };
    Ok(Some(TripwireWatch::spawn(mm, shadow.guest_view(), on_trip)?))
}

/// A violation, or `None`: KVM may look for a frame whose SPTE it read just before it was cleared,
/// and drops what it finds; and the frame may have got a new page meanwhile, rightly mapped. The
/// page lock keeps the frame as it is while both are looked at.
fn judge(
    mm: &HostMm,
    shadow: &ShadowMmu,
    kickers: &[Arc<Kicker>],
    report: TripReport,
) -> Option<StaleAccess> {
    let page = lock_frame(mm, report.pfn)?;
    if page.flags().contains(PageFlags::IN_USE) {
        return None;
    }
    // Page lock, then MMU lock: the order of every invalidation.
    let gva = shadow.find_mapping(report.pfn)?;
    drop(page);
    Some(StaleAccess {
        pfn: report.pfn,
        last_owner: report.last_owner,
        gva,
        vcpu: kickers.iter().position(|kicker| kicker.thread_id() == Some(report.thread)),
        write: report.write,
    })
}

/// The lock of the touched frame, within bounds: the vCPU waits meanwhile, and whoever holds the
/// lock must not come to wait for the vCPU.
fn lock_frame(mm: &HostMm, pfn: Pfn) -> Option<LockedPage<'_>> {
    for _ in 0..LOCK_ATTEMPTS {
        let page = mm.frame_table().try_lock(pfn);
        if page.is_some() {
            return page;
        }
        std::thread::yield_now();
    }
    None
}
