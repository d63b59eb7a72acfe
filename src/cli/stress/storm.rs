//! Storm threads: one for each kind of invalidation, forced upon frames chosen at random.
//!
//! Guarantee: a storm keeps to its rate (pages tried a second) on average or, where the host cannot
//! keep up, falls behind without a later burst; it sleeps between batches; and stopping it waits
//! for at most one batch.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rand::SeedableRng;
use rand::rngs::StdRng;

use super::sources::{Source, source};
use crate::addr::Pfn;
use crate::cli::args::{Invalidate, name_of};
use crate::cli::fleet::Objects;
use crate::host_mm::swap::{SwapError, SwapOp};
use crate::host_mm::{HostFault, HostMm, InjectionPlan, MmError};
use crate::sync::{Condvar, Mutex, lock};
use crate::sys::threads;

/// Frames that one call invalidates.
const BATCH: u32 = 32;
/// A storm that is further behind than this gives the rest up.
const MAX_LAG: Duration = Duration::from_millis(100);

/// What a storm of one kind has done.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub(crate) struct StormCount {
    /// Kind of invalidation.
    pub(crate) kind: String,
    /// Frames chosen; many hold no page, or somebody has them locked.
    pub(crate) tried: u64,
    /// Pages invalidated.
    pub(crate) done: u64,
    /// Batches that ended with an error.
    pub(crate) failed_batches: u64,
    /// The first error that is neither a lack of swap nor injected: something is broken.
    pub(crate) broken: Option<String>,
}

#[derive(Default)]
struct Live {
    tried: AtomicU64,
    done: AtomicU64,
    failed_batches: AtomicU64,
    broken: Mutex<Option<String>>,
}

#[derive(Default)]
struct Stop {
    stopped: Mutex<bool>,
    changed: Condvar,
}

/// The storms of a run; dropping them stops them.
pub(crate) struct Storms {
    stop: Arc<Stop>,
    live: Vec<(Invalidate, Arc<Live>)>,
    threads: Vec<JoinHandle<()>>,
    injected: InjectionPlan,
}

impl Storms {
    /// Starts a storm of each kind, with `rate` pages a second each.
    ///
    /// # Errors
    /// If the host has no thread left, or there is no memory object for copies.
    pub(crate) fn start(
        mm: &Arc<HostMm>,
        objects: &Arc<Objects>,
        kinds: &[Invalidate],
        rate: u32,
        seed: u64,
    ) -> anyhow::Result<Self> {
        let injected = mm.config().inject.clone();
        let mut storms =
            Self { stop: Arc::default(), live: Vec::new(), threads: Vec::new(), injected };
        for &kind in kinds {
            if let Some(work) = source(kind, mm, objects)? {
                storms.spawn(kind, work, mm.frame_count(), rate, seed)?;
            }
        }
        Ok(storms)
    }

    fn spawn(
        &mut self,
        kind: Invalidate,
        work: Box<Source>,
        frames: u32,
        rate: u32,
        seed: u64,
    ) -> std::io::Result<()> {
        let live = Arc::new(Live::default());
        let (stop, counts) = (self.stop.clone(), live.clone());
        let injected = self.injected.clone();
        // Each kind has its own sequence, which does not depend on what else runs.
        let random = StdRng::seed_from_u64(seed ^ ((kind as u64 + 1) << 32));
        let thread = std::thread::Builder::new()
            .name(format!("storm-{}", name_of(kind)))
            .spawn(move || storm(&stop, &counts, &injected, &*work, random, frames, rate))?;
        self.live.push((kind, live));
        self.threads.push(thread);
        Ok(())
    }

    /// What they have done so far.
    pub(crate) fn counts(&self) -> Vec<StormCount> {
        let counts = self.live.iter().map(|(kind, live)| StormCount {
            kind: name_of(*kind),
            tried: live.tried.load(Ordering::Relaxed),
            done: live.done.load(Ordering::Relaxed),
            failed_batches: live.failed_batches.load(Ordering::Relaxed),
            broken: lock(&live.broken).clone(),
        });
        counts.collect()
    }

    /// Whether one of them has met an error that is neither a lack of swap nor injected.
    pub(crate) fn is_broken(&self) -> bool {
        self.live.iter().any(|(_, live)| lock(&live.broken).is_some())
    }

    /// Ends them, as [`threads::join`] does.
    pub(crate) fn stop(&mut self) {
        *lock(&self.stop.stopped) = true;
        self.stop.changed.notify_all();
        for thread in self.threads.drain(..) {
            if let Some(Err(_)) = threads::join(thread) {
                let died = "a storm thread panicked".to_owned();
                if let Some((_, live)) = self.live.first() {
                    lock(&live.broken).get_or_insert(died);
                }
            }
        }
    }
}

impl Drop for Storms {
    fn drop(&mut self) {
        self.stop();
    }
}

fn storm(
    stop: &Stop,
    live: &Live,
    injected: &InjectionPlan,
    work: &Source,
    mut random: StdRng,
    frames: u32,
    rate: u32,
) {
    let batch = BATCH.min(frames);
    let mut pace = Pace::new(rate, batch);
    while stop.wait_until(pace.next(Instant::now())) {
        let chosen = rand::seq::index::sample(&mut random, index(frames), index(batch));
        let chosen: Vec<Pfn> =
            chosen.iter().filter_map(|i| u32::try_from(i).ok().map(Pfn::new)).collect();
        live.tried.fetch_add(u64::from(batch), Ordering::Relaxed);
        match work(&chosen, &mut random) {
            Ok(done) => {
                live.done.fetch_add(done as u64, Ordering::Relaxed);
            }
            Err(error) => {
                live.failed_batches.fetch_add(1, Ordering::Relaxed);
                if !is_expected(&error, injected) {
                    lock(&live.broken).get_or_insert_with(|| error.to_string());
                }
            }
        }
    }
}

fn index(value: u32) -> usize {
    // Lossless: only 64-bit targets are supported.
    value as usize
}

/// Whether an error is one that a run has to live with: nothing is wrong.
pub(super) fn is_expected(error: &MmError, injected: &InjectionPlan) -> bool {
    is_lack_of_swap(error) || is_injected(error, injected)
}

/// Whether swap was just too small for what was asked: the page stayed, nothing is wrong.
fn is_lack_of_swap(error: &MmError) -> bool {
    matches!(error, MmError::Swap(SwapError::Full { .. } | SwapError::NoSpace { .. }))
}

/// Whether a write to swap failed as it was told to: the page stayed, and that is what was asked
/// for.
fn is_injected(error: &MmError, injected: &InjectionPlan) -> bool {
    let MmError::Swap(SwapError::Io { op: SwapOp::Write, source, .. }) = error else {
        return false;
    };
    injected.items.iter().any(|item| {
        matches!(item.fault, HostFault::SwapWrite(errno)
            if source.raw_os_error() == Some(errno as i32))
    })
}

impl Stop {
    /// Sleeps until then; `false` at once when the storms are to stop.
    fn wait_until(&self, moment: Instant) -> bool {
        let mut stopped = lock(&self.stopped);
        loop {
            if *stopped {
                return false;
            }
            let left = moment.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return true;
            }
            let waited = self.changed.wait_timeout(stopped, left);
            stopped = waited.unwrap_or_else(std::sync::PoisonError::into_inner).0;
        }
    }
}

/// When batches are due.
struct Pace {
    interval: Duration,
    due: Option<Instant>,
}

impl Pace {
    fn new(rate: u32, batch: u32) -> Self {
        Self { interval: Duration::from_secs(1) * batch / rate.max(1), due: None }
    }

    /// When the next batch is due, given that it is `now`.
    fn next(&mut self, now: Instant) -> Instant {
        let due = match self.due {
            None => now,
            Some(due) => due + self.interval,
        };
        let due = if now.saturating_duration_since(due) > MAX_LAG { now } else { due };
        self.due = Some(due);
        due
    }
}

#[cfg(test)]
mod tests {
    use nix::errno::Errno;

    use super::*;
    use crate::host_mm::{Injection, When};

    #[test]
    fn batches_keep_the_pace_and_lost_time_is_not_made_up_in_a_burst() {
        let mut pace = Pace::new(3200, 32);
        let start = Instant::now();
        let ms = |n: u64| start + Duration::from_millis(n);
        assert_eq!(pace.next(ms(0)), ms(0));
        assert_eq!(pace.next(ms(1)), ms(10), "ahead: wait");
        assert_eq!(pace.next(ms(50)), ms(20), "behind a little: catch up");
        assert_eq!(pace.next(ms(50)), ms(30));
        assert_eq!(pace.next(ms(500)), ms(500), "far behind: start over");
        assert_eq!(pace.next(ms(500)), ms(510));
    }

    fn storms(injected: InjectionPlan) -> Storms {
        Storms { stop: Arc::default(), live: Vec::new(), threads: Vec::new(), injected }
    }

    /// Runs `work` as a reclaim storm over `frames` frames until `until` says so.
    fn run(
        work: Box<Source>,
        frames: u32,
        rate: u32,
        until: impl Fn(&StormCount) -> bool,
    ) -> StormCount {
        let mut storms = storms(InjectionPlan::default());
        storms.spawn(Invalidate::Reclaim, work, frames, rate, 1).unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        while !until(&storms.counts()[0]) && Instant::now() < deadline {
            std::thread::yield_now();
        }
        storms.stop();
        let count = storms.counts().remove(0);
        assert!(until(&count), "{count:?}");
        count
    }

    #[test]
    fn batches_hold_distinct_frames_and_are_counted() {
        let work = Box::new(|chosen: &[Pfn], _: &mut StdRng| {
            let mut distinct = chosen.to_vec();
            distinct.sort_unstable();
            distinct.dedup();
            assert_eq!(distinct.len(), 32);
            assert!(chosen.iter().all(|pfn| pfn.as_u32() < 40));
            Ok(3)
        });
        let count = run(work, 40, 1_000_000, |count| count.tried >= 320);
        assert_eq!(count.tried % 32, 0);
        assert_eq!(count.done, count.tried / 32 * 3);
        assert_eq!((count.failed_batches, count.broken), (0, None));
        assert_eq!(count.kind, "reclaim");
    }

    #[test]
    fn fewer_frames_than_a_batch_are_all_taken() {
        let work = Box::new(|chosen: &[Pfn], _: &mut StdRng| Ok(chosen.len()));
        let count = run(work, 5, 1_000_000, |count| count.tried > 0);
        assert_eq!(count.done, count.tried);
    }

    #[test]
    fn a_lack_of_swap_is_no_breakage_and_other_errors_are() {
        let full =
            Box::new(|_: &[Pfn], _: &mut StdRng| Err(MmError::Swap(SwapError::Full { slots: 1 })));
        let count = run(full, 64, 1_000_000, |count| count.failed_batches > 3);
        assert_eq!(count.broken, None);
        let broken = Box::new(|_: &[Pfn], _: &mut StdRng| Err(MmError::TooManyObjects));
        let count = run(broken, 64, 1_000_000, |count| count.failed_batches > 3);
        assert!(count.broken.unwrap().contains("memory objects"));
    }

    #[test]
    fn only_the_failure_that_was_injected_is_expected() {
        let slot = crate::addr::SwapSlot::new(0).unwrap();
        let failed =
            |op, errno: Errno| MmError::Swap(SwapError::Io { op, slot, source: errno.into() });
        let item = Injection { fault: HostFault::SwapWrite(Errno::EIO), when: When::ALWAYS };
        let plan = InjectionPlan { items: vec![item], seed: 0 };
        assert!(is_injected(&failed(SwapOp::Write, Errno::EIO), &plan));
        assert!(!is_injected(&failed(SwapOp::Write, Errno::ENOMEM), &plan));
        assert!(!is_injected(&failed(SwapOp::Read, Errno::EIO), &plan));
        assert!(!is_injected(&MmError::TooManyObjects, &plan));
        assert!(!is_injected(&failed(SwapOp::Write, Errno::EIO), &InjectionPlan::default()));
    }

    #[test]
    fn a_stop_does_not_wait_for_the_next_batch() {
        let mut storms = storms(InjectionPlan::default());
        // One batch in 32 seconds: the second one would come long after the test.
        let work = Box::new(|chosen: &[Pfn], _: &mut StdRng| Ok(chosen.len()));
        storms.spawn(Invalidate::Clean, work, 64, 1, 1).unwrap();
        let begun = Instant::now();
        storms.stop();
        assert!(begun.elapsed() < Duration::from_secs(16));
        assert!(storms.counts()[0].tried <= 32);
    }
}
