//! Storm threads: one for each kind of invalidation, forced upon frames chosen at random; and those
//! that look on.
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

use super::fleet::Objects;
use super::judge::Judge;
use super::observe;
use super::plan::StormPlan;
use super::setup::SetupError;
use super::sources::source;
use super::violations::Check;
use crate::addr::Pfn;
use crate::host_mm::swap::SwapError;
use crate::host_mm::{HostMm, MmError};
use crate::sync::{Condvar, Mutex, lock};
use crate::sys::threads::{self, NotStarted};

/// Frames that one call invalidates.
const BATCH: u32 = 32;
/// A storm that is further behind than this gives the rest up.
const MAX_LAG: Duration = Duration::from_millis(100);

/// Invalidates the pages in these frames as far as possible; returns how many it did.
pub(super) type Source = dyn Fn(&[Pfn], &mut StdRng) -> Result<usize, Trouble> + Send;

/// Turns that somebody who looks on takes in a second.
const LOOKS_PER_SECOND: u32 = 20;

/// Why a batch did not come to its end.
#[derive(Debug)]
pub(super) enum Trouble {
    /// Host memory could not.
    Host(MmError),
    /// Something is not as it must be.
    Wrong(String),
}

impl Trouble {
    /// What it has to say of the host, if that is what it is about.
    fn host_limit(&self, judge: &Judge) -> Option<String> {
        match self {
            Self::Host(error) if !judge.is_expected(error) => judge.host_limit(error),
            _ => None,
        }
    }

    /// What has found it, unless a run has to live with it.
    fn check(&self, judge: &Judge) -> Option<Check> {
        match self {
            Self::Wrong(_) => Some(Check::Observer),
            Self::Host(error) if judge.is_expected(error) => None,
            Self::Host(MmError::Swap(SwapError::Checksum { .. })) => Some(Check::SwapChecksum),
            Self::Host(_) => Some(Check::Run),
        }
    }
}

impl From<MmError> for Trouble {
    fn from(error: MmError) -> Self {
        Self::Host(error)
    }
}

/// What a storm of one kind has done.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct StormCount {
    /// Kind of invalidation.
    pub kind: String,
    /// Frames chosen; many hold no page, or somebody has them locked.
    pub tried: u64,
    /// Pages invalidated.
    pub done: u64,
    /// Batches that ended with an error.
    pub failed_batches: u64,
    /// The first error that is neither a lack of swap nor injected: something is broken.
    pub broken: Option<String>,
    /// The first thing that was found not to be as it must.
    pub wrong: Option<String>,
    /// The first limit of the host that it came up against.
    pub limited: Option<String>,
}

#[derive(Default)]
struct Live {
    tried: AtomicU64,
    done: AtomicU64,
    failed_batches: AtomicU64,
    broken: Mutex<Option<String>>,
    wrong: Mutex<Option<String>>,
    limited: Mutex<Option<String>>,
    /// What found the first of both.
    by: Mutex<Option<Check>>,
}

impl Live {
    fn count(&self, kind: &str) -> StormCount {
        StormCount {
            kind: kind.to_owned(),
            tried: self.tried.load(Ordering::Relaxed),
            done: self.done.load(Ordering::Relaxed),
            failed_batches: self.failed_batches.load(Ordering::Relaxed),
            broken: lock(&self.broken).clone(),
            wrong: lock(&self.wrong).clone(),
            limited: lock(&self.limited).clone(),
        }
    }
}

#[derive(Default)]
struct Stop {
    stopped: Mutex<bool>,
    changed: Condvar,
}

/// The storms of a run; dropping them stops them.
pub struct Storms {
    stop: Arc<Stop>,
    live: Vec<(String, Arc<Live>)>,
    /// Those who look on.
    observers: Vec<(String, Arc<Live>)>,
    threads: Vec<(Arc<Live>, JoinHandle<()>)>,
    judge: Judge,
}

impl Storms {
    /// Starts a storm of each kind.
    ///
    /// # Errors
    /// If the host has no thread left, or there is no memory object for copies.
    pub fn start(
        judge: Judge,
        mm: &Arc<HostMm>,
        objects: &Arc<Objects>,
        plan: &StormPlan,
    ) -> Result<Self, SetupError> {
        let mut storms = Self::none(judge);
        for &kind in &plan.kinds {
            if let Some(work) = source(kind, mm, objects)? {
                // Each kind has its own sequence, which does not depend on what else runs.
                let random = StdRng::seed_from_u64(plan.seed ^ ((kind as u64 + 1) << 32));
                let live = storms.spawn(kind.name(), work, random, mm.frame_count(), plan.rate)?;
                storms.live.push((kind.name().to_owned(), live));
            }
        }
        Ok(storms)
    }

    fn none(judge: Judge) -> Self {
        let (stop, threads) = (Arc::default(), Vec::new());
        Self { stop, live: Vec::new(), observers: Vec::new(), threads, judge }
    }

    /// Has somebody look on: compare the dirty log with what is written. `removes` says that parts of
    /// a window are removed meanwhile.
    ///
    /// # Errors
    /// If the host has no thread left.
    pub fn observe(
        &mut self,
        objects: &Arc<Objects>,
        removes: bool,
        seed: u64,
    ) -> Result<(), NotStarted> {
        if cfg!(not(feature = "export-notifier")) {
            return Ok(());
        }
        let (name, random) = ("dirty log", StdRng::seed_from_u64(seed ^ 1));
        let work = observe::dirty_log(objects.clone(), removes);
        let live = self.spawn(name, work, random, BATCH, LOOKS_PER_SECOND * BATCH)?;
        self.observers.push((name.to_owned(), live));
        Ok(())
    }

    fn spawn(
        &mut self,
        name: &str,
        work: Box<Source>,
        random: StdRng,
        frames: u32,
        rate: u32,
    ) -> Result<Arc<Live>, NotStarted> {
        let live = Arc::new(Live::default());
        let (stop, counts) = (self.stop.clone(), live.clone());
        let judge = self.judge.clone();
        let body = move || storm(&stop, &counts, &judge, &*work, random, frames, rate);
        let thread = threads::start(format!("storm-{name}"), "a storm of invalidations", body)?;
        self.threads.push((live.clone(), thread));
        Ok(live)
    }

    /// What they have done so far.
    pub fn counts(&self) -> Vec<StormCount> {
        self.live.iter().map(|(kind, live)| live.count(kind)).collect()
    }

    /// What those who look on have done so far: turns taken, pages found written.
    pub fn observed(&self) -> Vec<StormCount> {
        self.observers.iter().map(|(name, live)| live.count(name)).collect()
    }

    /// What one of them has come upon first, if anything: that something is not as it must be, or an
    /// error that is neither a lack of swap nor injected.
    pub fn found(&self) -> Option<Check> {
        self.live.iter().chain(&self.observers).find_map(|(_, live)| *lock(&live.by))
    }

    /// Ends them, as [`threads::join`] does.
    pub fn stop(&mut self) {
        *lock(&self.stop.stopped) = true;
        self.stop.changed.notify_all();
        for (live, thread) in self.threads.drain(..) {
            if let Some(Err(_)) = threads::join(thread) {
                lock(&live.broken).get_or_insert_with(|| "its thread panicked".to_owned());
                lock(&live.by).get_or_insert(Check::Run);
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
    judge: &Judge,
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
                if let Some(limit) = error.host_limit(judge) {
                    lock(&live.limited).get_or_insert(limit);
                    continue;
                }
                if let Some(check) = error.check(judge) {
                    lock(&live.by).get_or_insert(check);
                }
                match error {
                    Trouble::Wrong(what) => _ = lock(&live.wrong).get_or_insert(what),
                    Trouble::Host(error) if judge.is_expected(&error) => {}
                    Trouble::Host(error) => {
                        lock(&live.broken).get_or_insert_with(|| error.to_string());
                    }
                }
            }
        }
    }
}

fn index(value: u32) -> usize {
    // Lossless: only 64-bit targets are supported.
    value as usize
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
    use super::*;
    use crate::host_mm::InjectionPlan;

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

    fn storms() -> Storms {
        Storms::none(Judge::new(InjectionPlan::default(), |_| String::new()))
    }

    /// Runs `work` as a reclaim storm over `frames` frames until `until` says so.
    fn run(
        work: Box<Source>,
        frames: u32,
        rate: u32,
        until: impl Fn(&StormCount) -> bool,
    ) -> StormCount {
        let mut storms = storms();
        let live = storms.spawn("reclaim", work, StdRng::seed_from_u64(1), frames, rate).unwrap();
        storms.live.push(("reclaim".to_owned(), live));
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
        let full = Box::new(|_: &[Pfn], _: &mut StdRng| {
            Err(MmError::Swap(SwapError::Full { slots: 1 }).into())
        });
        let count = run(full, 64, 1_000_000, |count| count.failed_batches > 3);
        assert_eq!(count.broken, None);
        let broken = Box::new(|_: &[Pfn], _: &mut StdRng| Err(MmError::TooManyObjects.into()));
        let count = run(broken, 64, 1_000_000, |count| count.failed_batches > 3);
        assert!(count.broken.unwrap().contains("memory objects"));
    }

    #[test]
    fn a_stop_does_not_wait_for_the_next_batch() {
        let mut storms = storms();
        // One batch in 32 seconds: the second one would come long after the test.
        let work = Box::new(|chosen: &[Pfn], _: &mut StdRng| Ok(chosen.len()));
        let live = storms.spawn("clean", work, StdRng::seed_from_u64(1), 64, 1).unwrap();
        storms.live.push(("clean".to_owned(), live));
        let begun = Instant::now();
        storms.stop();
        assert!(begun.elapsed() < Duration::from_secs(16));
        assert!(storms.counts()[0].tried <= 32);
    }
}
