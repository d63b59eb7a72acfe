//! The tripwire: the kernel itself watches invariant I1.
//!
//! In paranoid mode a freed frame is punched out of the memfd, and the guest view is registered
//! with userfaultfd for missing pages: a touch of a freed frame through a translation that should
//! be gone does not read zeros, it stops here, with the frame and the thread that did it.

use std::sync::Arc;
use std::thread::JoinHandle;

use crate::addr::{PAGE_SIZE, Pfn};
use crate::export_rmap::Owner;
use crate::host_mm::error::MmError;
use crate::host_mm::frames::guest_view::GuestView;
use crate::host_mm::memory::HostMm;
use crate::sys::uffd::Tripwire;

/// A touch of a frame that holds no page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TripReport {
    /// The frame.
    pub pfn: Pfn,
    /// The page that was in it last.
    pub last_owner: Owner,
    /// Whether the touch was a write.
    pub write: bool,
    /// Kernel id of the thread that touched it; for a vCPU that of its `KVM_RUN`.
    pub thread: i32,
}

/// A thread that reports touches of freed frames until it is dropped.
#[derive(Debug)]
pub struct TripwireWatch {
    tripwire: Arc<Tripwire>,
    thread: Option<JoinHandle<()>>,
}

impl TripwireWatch {
    /// Arms the guest view. `on_trip` is called for each touch, before the thread that did it goes
    /// on (with a page of zeros).
    ///
    /// A report alone is no proof: KVM may have read an SPTE just before it was cleared, and find
    /// out only after it has looked for the frame. It drops such a result; whoever handles the
    /// report asks whether a mapping of the frame still stands.
    ///
    /// # Errors
    /// [`MmError::Uffd`] says which right or feature is missing.
    pub fn spawn(
        mm: &Arc<HostMm>,
        view: &GuestView,
        on_trip: impl Fn(TripReport) + Send + 'static,
    ) -> Result<Self, MmError> {
        let tripwire = Arc::new(Tripwire::arm(view.region().clone())?);
        let (watched, mm) = (tripwire.clone(), Arc::downgrade(mm));
        let thread = std::thread::Builder::new()
            .name("gnomon-tripwire".to_owned())
            .spawn(move || {
                // An error ends the watch; the view is disarmed with the last reference to it.
                while let Ok(Some(fault)) = watched.next() {
                    let pfn = u32::try_from(fault.offset / PAGE_SIZE).map(Pfn::new);
                    if let (Ok(pfn), Some(mm)) = (pfn, mm.upgrade())
                        && let Some(last_owner) = mm.last_owner(pfn)
                    {
                        let (write, thread) = (fault.write, fault.thread);
                        on_trip(TripReport { pfn, last_owner, write, thread });
                    }
                    if watched.release_zero(fault.offset).is_err() {
                        return;
                    }
                }
            })
            .map_err(|source| MmError::Host { what: "a thread for the tripwire", source })?;
        Ok(Self { tripwire, thread: Some(thread) })
    }
}

impl Drop for TripwireWatch {
    fn drop(&mut self) {
        // A thread that cannot be woken is left alone rather than waited for.
        if self.tripwire.interrupt().is_ok()
            && let Some(thread) = self.thread.take()
        {
            let _ = thread.join();
        }
    }
}
