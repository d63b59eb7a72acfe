//! How models are gone through, for this crate's and those of the crates above: under loom every
//! interleaving, under shuttle so many random schedules. Each says how many there were when it ends, by a
//! failure too.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

pub use imp::*;

/// Counts schedules; says how many there were when the search ends.
struct Schedules {
    count: Arc<AtomicU64>,
    begin: Instant,
}

impl Schedules {
    fn start() -> Self {
        Self { count: Arc::new(AtomicU64::new(0)), begin: Instant::now() }
    }
}

impl Drop for Schedules {
    fn drop(&mut self) {
        let name = std::thread::current().name().unwrap_or_default().to_owned();
        let how = if std::thread::panicking() { "failed after" } else { "held for" };
        let (count, time) = (self.count.load(Ordering::Relaxed), self.begin.elapsed());
        println!("{name}: {how} {count} schedules in {:.2} s", time.as_secs_f64());
    }
}

#[cfg(loom)]
mod imp {
    use super::{Arc, Ordering, Schedules};

    /// The model's threads, with stacks on which pages of 4 KiB find room: loom's own have 32 KiB.
    pub mod thread {
        pub use loom::thread::{JoinHandle, yield_now};

        const STACK_WORDS: usize = 1 << 14;

        /// A thread of the model.
        ///
        /// # Panics
        /// Outside of a model.
        pub fn spawn<T: Send + 'static>(run: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
            let builder = loom::thread::Builder::new().stack_size(STACK_WORDS);
            builder.spawn(run).expect("loom has no thread left")
        }
    }

    /// Bound of the search in the larger models; three found every known mutation of them.
    const PREEMPTIONS: usize = 3;
    /// Steps of one schedule after which a model counts as one that does not end.
    const MAX_STEPS: usize = 10_000;

    /// Explores every interleaving of `model`.
    pub fn check(model: impl Fn() + Send + Sync + 'static) {
        explore(None, model);
    }

    /// For models that are too large for that: every interleaving with at most three preemptions, that is,
    /// switches away from a thread that could go on.
    pub fn check_bounded(model: impl Fn() + Send + Sync + 'static) {
        explore(Some(PREEMPTIONS), model);
    }

    fn explore(preemption_bound: Option<usize>, model: impl Fn() + Send + Sync + 'static) {
        let schedules = Schedules::start();
        let count = schedules.count.clone();
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = preemption_bound;
        builder.max_branches = MAX_STEPS;
        let model = Arc::new(model);
        builder.check(move || {
            count.fetch_add(1, Ordering::Relaxed);
            let model = model.clone();
            thread::spawn(move || model()).join().expect("a model says what is wrong by a panic");
        });
    }
}

#[cfg(shuttle)]
mod imp {
    use super::{Ordering, Schedules};
    use shuttle::scheduler::Scheduler;

    pub use shuttle::{rand, scheduler, thread};

    /// Takes the scheduler's schedules through `model`.
    pub fn check(scheduler: impl Scheduler + 'static, model: impl Fn() + Send + Sync + 'static) {
        let schedules = Schedules::start();
        let count = schedules.count.clone();
        let mut config = shuttle::Config::new();
        // Every ordering is taken for sequentially consistent: loom's models look at the orderings.
        config.silence_warnings = true;
        shuttle::Runner::new(scheduler, config).run(move || {
            count.fetch_add(1, Ordering::Relaxed);
            model();
        });
    }
}
