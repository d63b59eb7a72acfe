//! The synchronisation primitives of the protocol layers, from std or from a model checker: loom
//! under `--cfg loom`, shuttle under `--cfg shuttle`. Protocol code names this module and never
//! `std::sync` for anything whose interleavings matter, so that the code that is checked is the
//! code that runs.

mod zeroed;

#[cfg(not(any(loom, shuttle)))]
mod imp {
    pub use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
    pub use std::sync::{Condvar, Mutex, MutexGuard};
    pub use std::thread::yield_now;

    /// Tells the processor that this is a spin loop.
    pub fn spin_loop() {
        std::hint::spin_loop();
    }
}

#[cfg(loom)]
mod imp {
    pub use loom::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
    pub use loom::sync::{Condvar, Mutex, MutexGuard};
    pub use loom::thread::yield_now;

    /// A spin loop must let the other model threads run.
    pub fn spin_loop() {
        loom::thread::yield_now();
    }
}

#[cfg(shuttle)]
mod imp {
    pub use shuttle::hint::spin_loop;
    pub use shuttle::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
    pub use shuttle::sync::{Condvar, Mutex, MutexGuard};
    pub use shuttle::thread::yield_now;
}

pub use imp::*;
/// The same in all: what is modelled is what the pointer shares, not its count.
pub use std::sync::Arc;
pub use zeroed::{Zeroed, zeroed};

/// A value that readers load without a lock while writers replace it whole.
#[cfg(not(any(loom, shuttle)))]
pub struct Snapshot<T>(arc_swap::ArcSwap<T>);

#[cfg(not(any(loom, shuttle)))]
impl<T> Snapshot<T> {
    /// Starts with `value`.
    pub fn new(value: T) -> Self {
        Self(arc_swap::ArcSwap::from_pointee(value))
    }

    /// The value of this moment; stays as it is while the result lives.
    pub fn load(&self) -> impl std::ops::Deref<Target = std::sync::Arc<T>> + use<T> {
        self.0.load()
    }

    /// Replaces the value.
    pub fn store(&self, value: T) {
        self.0.store(std::sync::Arc::new(value));
    }
}

/// The same interface for the model checkers, which cannot look into the library: the snapshot is
/// one step, what is done with it is checked.
#[cfg(any(loom, shuttle))]
pub struct Snapshot<T>(Mutex<std::sync::Arc<T>>);

#[cfg(any(loom, shuttle))]
impl<T> Snapshot<T> {
    /// Starts with `value`.
    pub fn new(value: T) -> Self {
        Self(Mutex::new(std::sync::Arc::new(value)))
    }

    /// The value of this moment; stays as it is while the result lives.
    pub fn load(&self) -> impl std::ops::Deref<Target = std::sync::Arc<T>> + use<T> {
        Box::new(lock(&self.0).clone())
    }

    /// Replaces the value.
    pub fn store(&self, value: T) {
        *lock(&self.0) = std::sync::Arc::new(value);
    }
}

/// Locks a mutex whose data stays consistent at every point where its holder could panic, so that
/// one thread's panic does not spread to all others.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
