//! Models of the whole protocol: this crate's fault, eviction, cleaning, lending, sharing and migration, as
//! they run, against export clients and processors ([`client`]), over frames of a few words ([`host`]).
//!
//! - Under loom, small models: every interleaving of two or three threads (of the larger ones, all
//!   with at most three preemptions), under the C11 memory model; a deadlock fails too.
//!   `RUSTFLAGS="--cfg loom" cargo test --release -p gnomon-host-mm --lib models`
//! - Under shuttle, one large model ([`machine`]): random schedules, sequentially consistent.
//!   `RUSTFLAGS="--cfg shuttle" cargo test --release -p gnomon-host-mm --lib models`
//!
//! `--release`, because a model's threads are coroutines of one thread of the system, which the
//! lock-order checker of debug builds would take for one. Each test prints how many schedules it
//! ran and how long that took (`-- --nocapture`). `.ci/models` runs them all; `docs/models.md` has the figures,
//! and `docs/mutants.md` what each model notices.

mod client;
#[cfg(loom)]
mod exhaustive;
mod host;
#[cfg(shuttle)]
mod machine;
