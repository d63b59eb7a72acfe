//! The registers of a device: virtio-mmio version 2 (VIRTIO 1.2, 4.2.2), and behind them the device's
//! configuration space.
//!
//! Any offset, width and value is taken: what is no register reads as zero, and a write to it is
//! ignored, as is any access to a register that is not of 32 bits.

use std::sync::Arc;
use std::thread::JoinHandle;

use virtio_bindings::bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_DEVICE_FEATURES,
    VIRTIO_MMIO_DEVICE_FEATURES_SEL, VIRTIO_MMIO_DEVICE_ID, VIRTIO_MMIO_DRIVER_FEATURES,
    VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INTERRUPT_STATUS,
    VIRTIO_MMIO_MAGIC_VALUE, VIRTIO_MMIO_QUEUE_AVAIL_HIGH, VIRTIO_MMIO_QUEUE_AVAIL_LOW,
    VIRTIO_MMIO_QUEUE_DESC_HIGH, VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_NOTIFY,
    VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_NUM_MAX, VIRTIO_MMIO_QUEUE_READY,
    VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_QUEUE_USED_HIGH, VIRTIO_MMIO_QUEUE_USED_LOW,
    VIRTIO_MMIO_SHM_BASE_HIGH, VIRTIO_MMIO_SHM_BASE_LOW, VIRTIO_MMIO_SHM_LEN_HIGH,
    VIRTIO_MMIO_SHM_LEN_LOW, VIRTIO_MMIO_STATUS, VIRTIO_MMIO_VENDOR_ID, VIRTIO_MMIO_VERSION,
};

use crate::host_mm::{MemoryObject, MmError};
use crate::iotlb::{Iotlb, IotlbStats};
use crate::sync::lock;

use super::Interrupt;
use super::device::Device;
use super::negotiation::{Effect, RingPart};
use super::rings::Rings;
use super::worker::{Registers, Shared};

/// Bytes of a device's registers with its configuration space.
pub const REGISTER_BYTES: u64 = 0x200;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VENDOR: u32 = u32::from_le_bytes(*b"gnmn");
const VERSION: u32 = 2;
/// Entries of the device's IOTLB: a ring and the buffers of a few requests.
const IOTLB_ENTRIES: usize = 64;

/// A device with its registers, its thread and its way to guest memory. Dropping it stops the device;
/// if it is at a disk, once that has answered.
pub struct MmioTransport {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for MmioTransport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MmioTransport")
            .field("id", &self.shared.device.id())
            .finish_non_exhaustive()
    }
}

impl MmioTransport {
    /// Puts a device behind registers and starts its thread.
    ///
    /// # Errors
    /// If the host refuses the mapping of the frames, a client number or a thread.
    pub fn new(
        device: Arc<dyn Device>,
        memory: Arc<MemoryObject>,
        interrupt: Arc<dyn Interrupt>,
    ) -> Result<Self, MmError> {
        let shared = Self::shared(device, Iotlb::new(memory, IOTLB_ENTRIES)?, interrupt);
        let worker = shared.clone();
        let thread = std::thread::Builder::new()
            .name(format!("gnomon-virtio-{}", shared.device.id()))
            .spawn(move || worker.work())
            .map_err(|source| MmError::Host { what: "a thread for a virtio device", source })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    fn shared(device: Arc<dyn Device>, iotlb: Iotlb, line: Arc<dyn Interrupt>) -> Arc<Shared> {
        let rings = Rings::new(iotlb, device.queue_sizes().len());
        Arc::new(Shared::new(device, rings, line))
    }

    /// The same without a thread: it works when it is told to.
    #[cfg(all(any(test, feature = "fuzzing"), feature = "export-notifier"))]
    pub(crate) fn idle(device: Arc<dyn Device>, iotlb: Iotlb, line: Arc<dyn Interrupt>) -> Self {
        Self { shared: Self::shared(device, iotlb, line), thread: None }
    }

    /// Without a thread: serves what there is to do.
    #[cfg(all(any(test, feature = "fuzzing"), feature = "export-notifier"))]
    pub(crate) fn work_off(&self) {
        self.shared.work_off();
    }

    /// A vCPU reads so many bytes at an offset from the first register.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(offset) = offset.checked_sub(VIRTIO_MMIO_CONFIG.into()) {
            self.shared.device.read_config(offset, data);
        } else if let Ok(word) = <&mut [u8; 4]>::try_from(data)
            && let Ok(register) = u32::try_from(offset)
        {
            *word = self.read_register(register).to_le_bytes();
        }
    }

    /// A vCPU writes so many bytes at an offset from the first register.
    pub fn write(&self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(VIRTIO_MMIO_CONFIG.into()) {
            self.shared.device.write_config(offset, data);
        } else if let Ok(&word) = <&[u8; 4]>::try_from(data)
            && let Ok(register) = u32::try_from(offset)
        {
            self.write_register(register, u32::from_le_bytes(word));
        }
    }

    /// Has the device serve nothing more, for good: when this returns it touches no guest memory any
    /// longer, though a request may still be at its disk.
    pub fn stop(&self) {
        self.shared.stop();
    }

    /// The device's configuration space has changed: tells the driver.
    pub fn config_changed(&self) {
        self.shared.config_changed();
    }

    /// Why the device needs a reset, or last needed one, as a sentence.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        lock(&self.shared.registers).failure.clone()
    }

    /// What its accesses to guest memory were.
    #[must_use]
    pub fn iotlb_stats(&self) -> IotlbStats {
        self.shared.rings.iotlb().stats()
    }

    /// Compares the reverse map with the device's translations (invariant I3): a sentence for each
    /// difference.
    #[must_use]
    pub fn check_reverse_map(&self) -> Vec<String> {
        self.shared.rings.iotlb().check_reverse_map()
    }

    fn read_register(&self, register: u32) -> u32 {
        let registers = lock(&self.shared.registers);
        let negotiation = &registers.negotiation;
        match register {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.shared.device.id(),
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => negotiation.offered_word(),
            VIRTIO_MMIO_QUEUE_NUM_MAX => negotiation.queue_max_size(),
            VIRTIO_MMIO_QUEUE_READY => negotiation.queue_is_ready().into(),
            VIRTIO_MMIO_INTERRUPT_STATUS => registers.interrupt_status,
            VIRTIO_MMIO_STATUS => negotiation.status(),
            VIRTIO_MMIO_CONFIG_GENERATION => registers.config_generation,
            // There is no shared memory region, whichever is selected: 4.2.2.
            VIRTIO_MMIO_SHM_LEN_LOW
            | VIRTIO_MMIO_SHM_LEN_HIGH
            | VIRTIO_MMIO_SHM_BASE_LOW
            | VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            _ => 0,
        }
    }

    fn write_register(&self, register: u32, value: u32) {
        let registers = &mut *lock(&self.shared.registers);
        let negotiation = &mut registers.negotiation;
        let effect = match register {
            VIRTIO_MMIO_STATUS => negotiation.write_status(value),
            VIRTIO_MMIO_QUEUE_READY => negotiation.write_queue_ready(value),
            _ => Effect::Nothing,
        };
        match register {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => negotiation.select_features(value),
            VIRTIO_MMIO_DRIVER_FEATURES => negotiation.accept_word(value),
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => negotiation.select_accepted(value),
            VIRTIO_MMIO_QUEUE_SEL => negotiation.select_queue(value),
            VIRTIO_MMIO_QUEUE_NUM => negotiation.set_queue_size(value),
            VIRTIO_MMIO_QUEUE_DESC_LOW => {
                negotiation.set_queue_address(RingPart::Descriptors, false, value);
            }
            VIRTIO_MMIO_QUEUE_DESC_HIGH => {
                negotiation.set_queue_address(RingPart::Descriptors, true, value);
            }
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => {
                negotiation.set_queue_address(RingPart::Available, false, value);
            }
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => {
                negotiation.set_queue_address(RingPart::Available, true, value);
            }
            VIRTIO_MMIO_QUEUE_USED_LOW => {
                negotiation.set_queue_address(RingPart::Used, false, value);
            }
            VIRTIO_MMIO_QUEUE_USED_HIGH => {
                negotiation.set_queue_address(RingPart::Used, true, value);
            }
            VIRTIO_MMIO_QUEUE_NOTIFY => {
                // 64 queues are more than any device has.
                if let Some(bit) = 1u64.checked_shl(value) {
                    self.shared.notify(registers, bit);
                }
            }
            VIRTIO_MMIO_INTERRUPT_ACK => registers.interrupt_status &= !value,
            _ => {}
        }
        self.carry_out(registers, effect);
    }

    fn carry_out(&self, registers: &mut Registers, effect: Effect) {
        let shared = &*self.shared;
        match effect {
            Effect::Nothing => {}
            Effect::Reset => shared.reset(registers),
            Effect::Negotiated => shared.device.negotiated(registers.negotiation.accepted()),
            // Told too early of a buffer, the device has not looked.
            Effect::Driven => shared.notify(registers, u64::MAX),
            Effect::Enable(index) => {
                if let Err(why) = shared.rings.enable(index, registers.negotiation.setup(index)) {
                    registers.negotiation.not_ready(index);
                    shared.needs_reset(registers, why);
                }
            }
            Effect::Disable(index) => shared.rings.disable(index),
        }
    }
}

impl Drop for MmioTransport {
    fn drop(&mut self) {
        self.stop();
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}
