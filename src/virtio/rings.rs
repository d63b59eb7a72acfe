//! The queues of a device, and guest memory for what is being done for them: guarded, so that a reset
//! ends both.
//!
//! Guarantee: every access to guest memory for a device, ring or buffer, is made under one lock and
//! for an *epoch*, the time between two resets. [`Rings::reset`] takes the lock and begins the next
//! epoch. So once it has returned nothing of an earlier one touches guest memory, and what is still
//! under way on the host's side (a disk that is slow) ends with [`Trouble::Reset`]. The lock is held
//! for a whole piece, a copy of up to 128 KiB or up to 512 pages that the balloon gives up, while each
//! page that is needed for it is brought in; never while a disk image is read or written.

use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueOwnedT, QueueT};

use crate::host_mm::MmError;
use crate::iotlb::Iotlb;
use crate::sync::{Mutex, MutexGuard, lock};

use super::chain::{Chain, Segments};
use super::negotiation::QueueSetup;

/// Why a buffer is not served.
#[derive(Debug, thiserror::Error)]
pub enum Trouble {
    /// The driver has reset the device, or the device is being stopped: nothing more is to be done.
    #[error("the device was reset")]
    Reset,
    /// The driver has broken the rules in a way that leaves no place for an error status, or the host
    /// cannot bring the rings in. A sentence.
    #[error("{0}")]
    Broken(String),
    /// Guest memory cannot be accessed there.
    #[error(transparent)]
    Memory(#[from] MmError),
}

struct State {
    epoch: u64,
    /// Those that are ready.
    queues: Vec<Option<Queue>>,
    is_stopped: bool,
}

/// See the module's documentation.
pub(super) struct Rings {
    iotlb: Iotlb,
    state: Mutex<State>,
}

impl Rings {
    pub(super) fn new(iotlb: Iotlb, queues: usize) -> Self {
        let queues = (0..queues).map(|_| None).collect();
        Self { iotlb, state: Mutex::new(State { epoch: 0, queues, is_stopped: false }) }
    }

    pub(super) fn iotlb(&self) -> &Iotlb {
        &self.iotlb
    }

    /// Makes a queue ready.
    ///
    /// # Errors
    /// What is wrong with the set-up, as a sentence.
    pub(super) fn enable(&self, index: usize, setup: &QueueSetup) -> Result<(), String> {
        let queue = setup.queue().and_then(|queue| {
            let is_memory = queue.is_valid(&self.iotlb);
            is_memory.then_some(queue).ok_or_else(|| "not all of it is guest memory".to_owned())
        });
        let queue = queue.map_err(|why| format!("queue {index} cannot be used: {why}"))?;
        if let Some(place) = lock(&self.state).queues.get_mut(index) {
            *place = Some(queue);
        }
        Ok(())
    }

    /// The driver takes a queue back.
    pub(super) fn disable(&self, index: usize) {
        if let Some(place) = lock(&self.state).queues.get_mut(index) {
            *place = None;
        }
    }

    /// Begins the next epoch, without queues.
    pub(super) fn reset(&self) {
        let mut state = lock(&self.state);
        state.epoch += 1;
        state.queues.fill_with(|| None);
    }

    /// Nothing is served any more.
    pub(super) fn stop(&self) {
        lock(&self.state).is_stopped = true;
    }

    pub(super) fn epoch(&self) -> u64 {
        lock(&self.state).epoch
    }

    /// Guest memory and queues, for as long as the result lives.
    fn enter(&self, epoch: u64) -> Result<MutexGuard<'_, State>, Trouble> {
        let state = lock(&self.state);
        if state.epoch == epoch && !state.is_stopped { Ok(state) } else { Err(Trouble::Reset) }
    }

    fn with_queue<T>(
        &self,
        epoch: u64,
        index: usize,
        act: impl FnOnce(&mut Queue, &Iotlb) -> Result<T, virtio_queue::Error>,
    ) -> Result<Option<T>, Trouble> {
        let mut state = self.enter(epoch)?;
        let Some(Some(queue)) = state.queues.get_mut(index) else { return Ok(None) };
        act(queue, &self.iotlb).map(Some).map_err(|error| broken(index, &error))
    }

    /// The next buffer of a queue.
    pub(super) fn pop(&self, epoch: u64, index: usize) -> Result<Option<Chain>, Trouble> {
        let popped = self.with_queue(epoch, index, |queue, iotlb| {
            if queue.avail_idx(iotlb, Ordering::Acquire)?.0 == queue.next_avail() {
                return Ok(None);
            }
            let size = queue.size();
            // It says nothing of an entry of the ring that it cannot read.
            let chain = queue.iter(iotlb)?.next().ok_or(virtio_queue::Error::QueueNotReady)?;
            Ok(Some(Chain::read(chain, size)))
        })?;
        Ok(popped.flatten())
    }

    /// Gives a buffer back; whether the driver wants to be told.
    pub(super) fn push(
        &self,
        epoch: u64,
        index: usize,
        head: u16,
        written: u32,
    ) -> Result<bool, Trouble> {
        let told = self.with_queue(epoch, index, |queue, iotlb| {
            queue.add_used(iotlb, head, written)?;
            queue.needs_notification(iotlb)
        })?;
        Ok(told.unwrap_or(false))
    }

    /// Asks the driver not to tell of new buffers.
    pub(super) fn quiet(&self, epoch: u64, index: usize) -> Result<(), Trouble> {
        self.with_queue(epoch, index, |queue, iotlb| queue.disable_notification(iotlb))?;
        Ok(())
    }

    /// Asks the driver to tell of new buffers; whether there is one already.
    pub(super) fn listen(&self, epoch: u64, index: usize) -> Result<bool, Trouble> {
        let more =
            self.with_queue(epoch, index, |queue, iotlb| queue.enable_notification(iotlb))?;
        Ok(more.unwrap_or(false))
    }
}

fn broken(index: usize, error: &virtio_queue::Error) -> Trouble {
    use virtio_queue::Error::{GuestMemory, GuestMemoryError};
    let why = match error {
        GuestMemory(why) | GuestMemoryError(why) => why.to_string(),
        other => other.to_string(),
    };
    Trouble::Broken(format!("queue {index} cannot be served any more: {why}"))
}

/// A buffer that is being served, and the guest memory that it is in.
pub struct Request<'a> {
    rings: &'a Rings,
    epoch: u64,
    chain: &'a Chain,
}

impl std::fmt::Debug for Request<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Request").field("chain", &self.chain).finish_non_exhaustive()
    }
}

impl<'a> Request<'a> {
    pub(super) fn new(rings: &'a Rings, epoch: u64, chain: &'a Chain) -> Self {
        Self { rings, epoch, chain }
    }

    /// What the device reads.
    pub(super) fn readable(&self) -> &Segments {
        &self.chain.readable
    }

    /// What the device writes.
    pub(super) fn writable(&self) -> &Segments {
        &self.chain.writable
    }

    /// What is wrong with the buffer's descriptors, as the rest of a sentence.
    pub(super) fn fault(&self) -> Option<&'static str> {
        self.chain.fault
    }

    /// Copies what the device reads, from its byte `offset` on; returns how much there was of it.
    ///
    /// # Errors
    /// [`Trouble::Reset`], [`Trouble::Memory`].
    pub(super) fn read(&self, offset: u64, buf: &mut [u8]) -> Result<usize, Trouble> {
        let _state = self.rings.enter(self.epoch)?;
        let mut done = 0;
        for (gpa, len) in self.chain.readable.range(offset, buf.len()) {
            self.rings.iotlb.read(gpa, &mut buf[done..done + len])?;
            done += len;
        }
        Ok(done)
    }

    /// Copies to what the device writes, from its byte `offset` on; returns how much room there was.
    ///
    /// # Errors
    /// [`Trouble::Reset`], [`Trouble::Memory`].
    pub(super) fn write(&self, offset: u64, buf: &[u8]) -> Result<usize, Trouble> {
        let _state = self.rings.enter(self.epoch)?;
        let mut done = 0;
        for (gpa, len) in self.chain.writable.range(offset, buf.len()) {
            self.rings.iotlb.write(gpa, &buf[done..done + len])?;
            done += len;
        }
        Ok(done)
    }

    /// Does something to guest memory that is not an access to it: not after a reset.
    ///
    /// # Errors
    /// [`Trouble::Reset`], and what `act` says.
    pub(super) fn alone<T>(&self, act: impl FnOnce() -> Result<T, MmError>) -> Result<T, Trouble> {
        let _state = self.rings.enter(self.epoch)?;
        Ok(act()?)
    }
}
