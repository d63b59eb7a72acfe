//! The DMA device: copies, fills and sums up guest memory on a thread of its own, through an IOTLB.
//!
//! Guarantee: it holds at most [`abi::DMA_QUEUE`] descriptors, serves them in the order of their
//! doorbells, and once it is told to stop, it finishes the one at hand and no other, and whoever
//! waits at the doorbell goes on. (A descriptor is bounded, so a stop takes bounded time.)

mod command;

use std::collections::VecDeque;
use std::sync::Arc;

use crate::abi;
use crate::addr::Gpa;
use crate::host_mm::MmError;
use crate::sync::{Condvar, Mutex, MutexGuard, lock};
use crate::sys::Patience;

pub(in crate::vmm) use command::DmaMemory;
use command::{Engine, Served};

use crate::vmm::error::VmError;
use crate::vmm::run::brief_wait::BriefWait;

crate::counters::counters! {
    /// What a DMA device has done.
    pub struct DmaStats {
        /// Commands carried out.
        operations,
        /// Bytes that they copied, filled or summed up.
        bytes,
        /// Descriptors refused.
        refused,
        /// Doorbells for a descriptor that is not in RAM.
        ignored_doorbells,
        /// Doorbells that waited for room in the queue.
        full_queue_waits,
    }
}

/// Life of the device's thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    NotStarted,
    Serving,
    Over,
}

struct State {
    /// Addresses of descriptors; the first one is being served.
    queue: VecDeque<Gpa>,
    life: Life,
    is_stopping: bool,
    stats: DmaStats,
}

/// See the module's documentation.
pub(in crate::vmm) struct DmaDevice {
    memory: Arc<dyn DmaMemory>,
    state: Mutex<State>,
    changed: Condvar,
}

impl DmaDevice {
    /// An idle device that works on `memory`.
    pub(in crate::vmm) fn new(memory: Arc<dyn DmaMemory>) -> Self {
        let state = State {
            queue: VecDeque::with_capacity(abi::DMA_QUEUE),
            life: Life::NotStarted,
            is_stopping: false,
            stats: DmaStats::default(),
        };
        Self { memory, state: Mutex::new(state), changed: Condvar::new() }
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The doorbell: takes the descriptor of this number, once there is room for it.
    pub(super) fn ring(&self, number: u32) {
        let at = u64::from(number) * abi::DMA_ALIGN;
        let mut state = lock(&self.state);
        if at + abi::DMA_ALIGN > self.memory.bytes() {
            state.stats.ignored_doorbells += 1;
            return;
        }
        if state.queue.len() >= abi::DMA_QUEUE {
            state.stats.full_queue_waits += 1;
        }
        while state.queue.len() >= abi::DMA_QUEUE && !state.is_stopping {
            state = self.wait(state);
        }
        if !state.is_stopping {
            state.queue.push_back(Gpa::new(at));
            self.changed.notify_all();
        }
    }

    /// Number of descriptors that are not finished.
    pub(super) fn unfinished(&self) -> u32 {
        u32::try_from(lock(&self.state).queue.len()).unwrap_or(u32::MAX)
    }

    /// What the device has done.
    pub(in crate::vmm) fn stats(&self) -> DmaStats {
        lock(&self.state).stats
    }

    /// The body of the device's thread.
    ///
    /// # Errors
    /// If the host failed under a descriptor.
    pub(in crate::vmm::contract) fn serve(&self) -> Result<(), MmError> {
        let mut engine = Engine::default();
        let mut state = lock(&self.state);
        loop {
            if state.is_stopping {
                return Ok(());
            }
            let Some(&at) = state.queue.front() else {
                state = self.wait(state);
                continue;
            };
            drop(state);
            let served = engine.serve(&*self.memory, at)?;
            state = lock(&self.state);
            match served {
                Served::Done(bytes) => {
                    state.stats.operations += 1;
                    state.stats.bytes += bytes;
                }
                Served::Refused => state.stats.refused += 1,
            }
            state.queue.pop_front();
            self.changed.notify_all();
        }
    }

    /// Waits until nothing is left to do, for as long as the caller does wait.
    /// Whoever wants it to stay idle keeps the vCPUs from the doorbell.
    ///
    /// # Errors
    /// [`VmError::NotRunning`] if the device has stopped, or was never started;
    /// [`VmError::NotInTime`].
    pub(in crate::vmm) fn wait_until_idle(&self, brief: &mut BriefWait) -> Result<(), VmError> {
        let mut state = lock(&self.state);
        while !state.queue.is_empty() && state.life == Life::Serving && !state.is_stopping {
            state = brief.wait(&self.changed, state).ok_or(VmError::NotInTime)?;
        }
        match state.life == Life::Serving && !state.is_stopping {
            true => Ok(()),
            false => Err(VmError::NotRunning),
        }
    }

    /// A thread is about to call [`serve`](Self::serve).
    pub(in crate::vmm::contract) fn starting(&self) {
        lock(&self.state).life = Life::Serving;
    }

    /// That thread uses the device no more.
    pub(in crate::vmm) fn over(&self) {
        lock(&self.state).life = Life::Over;
        self.changed.notify_all();
    }

    /// Has the thread finish what it is at, and lets go whoever waits at the doorbell.
    pub(in crate::vmm) fn stop(&self) {
        lock(&self.state).is_stopping = true;
        self.changed.notify_all();
    }

    /// Waits until no thread serves; `false` when the patience, if there is any limit to it,
    /// runs out first.
    pub(in crate::vmm::contract) fn wait_until_over(
        &self,
        patience: &mut Option<Patience>,
    ) -> bool {
        let mut state = lock(&self.state);
        while state.life == Life::Serving {
            state = match patience {
                None => self.wait(state),
                Some(patience) => {
                    let Some(slice) = patience.slice() else { return false };
                    let waited = self.changed.wait_timeout(state, slice);
                    waited.unwrap_or_else(|poisoned| poisoned.into_inner()).0
                }
            };
        }
        true
    }
}

#[cfg(test)]
pub(super) mod tests;
