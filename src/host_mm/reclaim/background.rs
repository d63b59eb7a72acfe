//! The reclaim thread: from below the low watermark of free frames up to the high one.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;

use crate::host_mm::HostMm;
use crate::host_mm::error::MmError;
use crate::host_mm::frames::alarm::{Alarm, Quiet, Round};
use crate::sys::threads;

/// Background reclaim, as long as this lives. Dropping it ends the thread and waits for it, as
/// [`threads::join`] does: host memory is not the thread's to free then.
#[derive(Debug)]
#[must_use = "background reclaim ends when this is dropped"]
pub struct BackgroundReclaim {
    alarm: Arc<Alarm>,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl HostMm {
    /// Starts background reclaim. One thread is enough: more of them share the work.
    ///
    /// # Errors
    /// If the host has no thread left.
    pub fn start_background_reclaim(self: &Arc<Self>) -> Result<BackgroundReclaim, MmError> {
        let (alarm, over) = (self.alarm.clone(), Arc::<AtomicBool>::default());
        // Weak: the thread must not keep alive what it works for.
        let (mm, told, end) = (Arc::downgrade(self), alarm.clone(), over.clone());
        let thread =
            std::thread::Builder::new().name("gnomon-reclaim".to_owned()).spawn(move || {
                while let Some(round) = told.round(&end) {
                    let Some(mm) = Weak::upgrade(&mm) else { return };
                    mm.refill(&round, &end);
                }
            });
        let thread = thread
            .map_err(|source| MmError::Host { what: "a thread for background reclaim", source })?;
        Ok(BackgroundReclaim { alarm, over, thread: Some(thread) })
    }

    /// Holds background reclaim back, and waits for the round under way.
    pub fn quiet(&self) -> Quiet<'_> {
        self.alarm.quiet()
    }

    /// Whether it is this host memory's reclaim that is held back.
    #[must_use]
    pub fn is_quiet(&self, quiet: &Quiet<'_>) -> bool {
        quiet.is_of(&self.alarm)
    }

    /// Reclaims until the high watermark is reached, or a round gets nothing: then it is for the fault
    /// that needs a frame to find out why.
    fn refill(&self, round: &Round<'_>, over: &AtomicBool) {
        while round.goes_on(over) {
            let missing = self.free.missing() as usize;
            if missing == 0 {
                return;
            }
            self.counters.background_reclaims.add(1);
            if self.reclaim(missing).frames == 0 {
                return;
            }
        }
    }
}

impl Drop for BackgroundReclaim {
    fn drop(&mut self) {
        self.alarm.end(&self.over);
        if let Some(thread) = self.thread.take() {
            // A panic was told on standard error, and nobody needs the thread any more.
            let _ = threads::join(thread);
        }
    }
}
