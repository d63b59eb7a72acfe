//! The device's thread: sleeps until the driver says that there is something in a queue, and serves
//! it.
//!
//! What it does not do is wait for the driver, or hold anything while it works but what
//! [`rings`](super::rings) says. It stops after the buffer at hand, at the latest after the piece of
//! it that is at the disk.

use std::sync::Arc;

use virtio_bindings::bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};

use crate::sync::{Condvar, Mutex, MutexGuard, lock};

use super::Interrupt;
use super::device::Device;
use super::negotiation::Negotiation;
use super::rings::{Request, Rings, Trouble};

/// What registers and thread share.
pub(super) struct Shared {
    pub(super) device: Arc<dyn Device>,
    pub(super) rings: Rings,
    pub(super) registers: Mutex<Registers>,
    changed: Condvar,
    interrupt: Arc<dyn Interrupt>,
}

/// What stands in the registers.
pub(super) struct Registers {
    pub(super) negotiation: Negotiation,
    pub(super) interrupt_status: u32,
    pub(super) config_generation: u32,
    /// Why the device needs a reset, or needed one at last.
    pub(super) failure: Option<String>,
    /// Queues that there may be something in, as bits.
    pending: u64,
    is_stopping: bool,
}

impl Shared {
    pub(super) fn new(
        device: Arc<dyn Device>,
        rings: Rings,
        interrupt: Arc<dyn Interrupt>,
    ) -> Self {
        let negotiation = Negotiation::new(device.features(), device.queue_sizes());
        let registers = Registers {
            negotiation,
            interrupt_status: 0,
            config_generation: 0,
            failure: None,
            pending: 0,
            is_stopping: false,
        };
        let registers = Mutex::new(registers);
        Self { device, rings, registers, changed: Condvar::new(), interrupt }
    }

    /// There may be something in these queues.
    pub(super) fn notify(&self, registers: &mut Registers, queues: u64) {
        registers.pending |= queues;
        self.changed.notify_all();
    }

    /// The driver resets the device: what is under way ends, and is forgotten.
    pub(super) fn reset(&self, registers: &mut Registers) {
        self.rings.reset();
        self.device.reset();
        registers.negotiation.reset();
        registers.interrupt_status = 0;
        registers.pending = 0;
    }

    /// Tells the driver something.
    fn raise(&self, registers: &mut Registers, bit: u32) {
        registers.interrupt_status |= bit;
        if let Err(error) = self.interrupt.trigger() {
            registers.failure.get_or_insert_with(|| format!("an interrupt was refused: {error}"));
        }
    }

    /// The configuration space has changed.
    pub(super) fn config_changed(&self) {
        let mut registers = lock(&self.registers);
        registers.config_generation = registers.config_generation.wrapping_add(1);
        if registers.negotiation.is_driven() {
            self.raise(&mut registers, VIRTIO_MMIO_INT_CONFIG);
        }
    }

    /// The device cannot go on before it is reset (2.1.2).
    pub(super) fn needs_reset(&self, registers: &mut Registers, why: String) {
        let was_driven = registers.negotiation.is_driven();
        registers.negotiation.set_needs_reset();
        registers.failure = Some(why);
        if was_driven {
            self.raise(registers, VIRTIO_MMIO_INT_CONFIG);
        }
    }

    /// Lets the thread go.
    pub(super) fn stop(&self) {
        self.rings.stop();
        lock(&self.registers).is_stopping = true;
        self.changed.notify_all();
    }

    /// The body of the thread.
    pub(super) fn work(&self) {
        while let Some((epoch, queues)) = self.wait() {
            self.serve(epoch, queues);
        }
    }

    /// Without a thread: serves what there is to do now.
    #[cfg(all(any(test, feature = "fuzzing"), feature = "export-notifier"))]
    pub(super) fn work_off(&self) {
        loop {
            let pending = self.take_pending(&mut lock(&self.registers));
            let Some((epoch, queues)) = pending else { return };
            self.serve(epoch, queues);
        }
    }

    /// Sleeps until there is something to do. `None` at the end.
    fn wait(&self) -> Option<(u64, u64)> {
        let mut registers = lock(&self.registers);
        while !registers.is_stopping {
            if let Some(pending) = self.take_pending(&mut registers) {
                return Some(pending);
            }
            let waited = self.changed.wait(registers);
            registers = waited.unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        None
    }

    /// What there is to do: for which epoch, in which queues.
    fn take_pending(&self, registers: &mut Registers) -> Option<(u64, u64)> {
        let is_due = registers.pending != 0 && registers.negotiation.is_driven();
        is_due.then(|| (self.rings.epoch(), std::mem::take(&mut registers.pending)))
    }

    /// Serves all that is in these queues.
    fn serve(&self, epoch: u64, queues: u64) {
        for queue in (0..u64::BITS as usize).filter(|queue| queues >> queue & 1 != 0) {
            match self.drain(epoch, queue) {
                Ok(()) => {}
                Err(Trouble::Reset) => return,
                Err(trouble @ (Trouble::Broken(_) | Trouble::Memory(_))) => {
                    if let Some(mut registers) = self.registers_in(epoch) {
                        self.needs_reset(&mut registers, trouble.to_string());
                    }
                    return;
                }
            }
        }
    }

    /// The registers, if there was no reset since: resets hold them.
    fn registers_in(&self, epoch: u64) -> Option<MutexGuard<'_, Registers>> {
        let registers = lock(&self.registers);
        (self.rings.epoch() == epoch).then_some(registers)
    }

    /// Serves all that is in a queue.
    fn drain(&self, epoch: u64, queue: usize) -> Result<(), Trouble> {
        self.rings.quiet(epoch, queue)?;
        loop {
            while let Some(chain) = self.rings.pop(epoch, queue)? {
                let request = Request::new(&self.rings, epoch, &chain);
                let written = self.device.serve(queue, &request)?;
                if self.rings.push(epoch, queue, chain.head, written)?
                    && let Some(mut registers) = self.registers_in(epoch)
                {
                    self.raise(&mut registers, VIRTIO_MMIO_INT_VRING);
                }
            }
            if !self.rings.listen(epoch, queue)? {
                return Ok(());
            }
        }
    }
}
