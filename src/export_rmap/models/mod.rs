//! Models of the protocol: the real frame table, page lock, reverse map, sequence and notifier
//! list, driven by stand-ins for the layers above ([`host`], [`client`]).
//!
//! - Under loom, small models: every interleaving of two or three threads (of the larger ones, all
//!   with at most [`PREEMPTIONS`] preemptions), under the C11 memory model; a deadlock fails too.
//!   `RUSTFLAGS="--cfg loom" cargo test --release -p gnomon-export-rmap --lib models`
//! - Under shuttle, one large model ([`machine`]): random schedules, sequentially consistent.
//!   `RUSTFLAGS="--cfg shuttle" cargo test --release -p gnomon-export-rmap --lib models`
//!
//! `--release`, because a model's threads are coroutines of one thread of the system, which the
//! lock-order checker of debug builds would take for one. Each test prints how many schedules it
//! ran and how long that took (`-- --nocapture`). `.ci/models` runs them all; `docs/models.md` has the figures,
//! and `docs/mutants.md` what each model notices.

pub(crate) mod client;
pub(crate) mod host;

#[cfg(loom)]
mod dirty;
#[cfg(loom)]
mod fault;
#[cfg(loom)]
mod iotlb;
#[cfg(loom)]
mod lending;
#[cfg(shuttle)]
mod machine;
#[cfg(loom)]
mod notifier_list;
#[cfg(loom)]
mod page_lock;
#[cfg(loom)]
mod reuse;
#[cfg(loom)]
mod sharing;
#[cfg(loom)]
mod two_clients;

#[cfg(loom)]
use crate::addr::Pfn;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

#[cfg(loom)]
pub(crate) use loom::thread;
#[cfg(shuttle)]
use shuttle::thread;

/// Bound of loom's search in the larger models; three found every known mutation of them.
#[cfg(loom)]
const PREEMPTIONS: usize = 3;

#[cfg(loom)]
pub(crate) const FRAME: Pfn = Pfn::new(0);

/// Counts schedules; says how many there were when the search ends, by a failure too.
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

/// Explores every interleaving of `model`.
#[cfg(loom)]
pub(crate) fn check(model: impl Fn() + Send + Sync + 'static) {
    explore(None, model);
}

/// For models that are too large for that: every interleaving with at most [`PREEMPTIONS`]
/// preemptions.
#[cfg(loom)]
pub(crate) fn check_bounded(model: impl Fn() + Send + Sync + 'static) {
    explore(Some(PREEMPTIONS), model);
}

#[cfg(loom)]
fn explore(preemption_bound: Option<usize>, model: impl Fn() + Send + Sync + 'static) {
    let schedules = Schedules::start();
    let count = schedules.count.clone();
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = preemption_bound;
    builder.check(move || {
        count.fetch_add(1, Ordering::Relaxed);
        model();
    });
}
