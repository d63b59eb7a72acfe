//! Models of the protocol's own parts under loom: every interleaving of two or three threads, under the
//! C11 memory model; a deadlock fails too. The models of the protocol with a host side are those of
//! `gnomon-host-mm`, on its own fault and eviction.
//!
//! `RUSTFLAGS="--cfg loom" cargo test --release -p gnomon-export-rmap --lib models`
//!
//! `--release`, because a model's threads are coroutines of one thread of the system, which the
//! lock-order checker of debug builds would take for one. Each test prints how many schedules it
//! ran and how long that took (`-- --nocapture`). `.ci/models` runs them all; `docs/models.md` has the figures,
//! and `docs/mutants.md` what each model notices.

mod notifier_list;
mod page_lock;

use crate::addr::Pfn;

const FRAME: Pfn = Pfn::new(0);
