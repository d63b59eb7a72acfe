//! The reclaim thread: from below the low watermark of free frames up to the high one.

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread::JoinHandle;

use crate::frames::alarm::{Alarm, Round};
use crate::frames::backing::Backing;
use crate::reclaim::Reclaimer;
use gnomon_sys::threads;

/// Background reclaim, as long as this lives. Dropping it ends the thread and waits for it, as
/// [`threads::join`] does: host memory is not the thread's to free then.
#[derive(Debug)]
#[must_use = "background reclaim ends when this is dropped"]
pub struct BackgroundReclaim {
    alarm: Arc<Alarm>,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl BackgroundReclaim {
    /// Has `work` called for each round, until it returns false or the value is dropped.
    pub(crate) fn spawn(
        alarm: &Arc<Alarm>,
        work: impl Fn(&Round<'_>, &AtomicBool) -> bool + Send + 'static,
    ) -> io::Result<Self> {
        let (alarm, over) = (alarm.clone(), Arc::<AtomicBool>::default());
        let (told, end) = (alarm.clone(), over.clone());
        let thread = std::thread::Builder::new().name("gnomon-reclaim".to_owned());
        let thread = thread.spawn(move || {
            while let Some(round) = told.round(&end) {
                if !work(&round, &end) {
                    return;
                }
            }
        })?;
        Ok(Self { alarm, over, thread: Some(thread) })
    }
}

impl<B: Backing> Reclaimer<B> {
    /// Reclaims until the high watermark is reached, or a round gets nothing: then it is for the fault
    /// that needs a frame to find out why.
    pub(crate) fn refill(&self, round: &Round<'_>, over: &AtomicBool) {
        while round.goes_on(over) {
            let missing = self.missing_frames() as usize;
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
