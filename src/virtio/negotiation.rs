//! What the driver has agreed with the device: status, features and the set-up of queues (VIRTIO 1.2,
//! 2.1, 3.1, 4.2.2). No guest memory, no interrupts: what has to happen is handed out as an
//! [`Effect`].
//!
//! Guarantee: whatever is written, in whatever order, the device is driven only after a status of
//! `ACKNOWLEDGE`, `DRIVER`, `FEATURES_OK` and `DRIVER_OK`, with features of those that were offered,
//! `VIRTIO_F_VERSION_1` among them. What comes at the wrong time is ignored.

use virtio_bindings::bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

/// Features of the transport and its queues, which every device has.
const COMMON_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// How the driver has set a queue up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct QueueSetup {
    max_size: u16,
    size: u32,
    is_ready: bool,
    descriptors: u64,
    available: u64,
    used: u64,
    event_idx: bool,
}

impl QueueSetup {
    fn new(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size.into(),
            is_ready: false,
            descriptors: 0,
            available: 0,
            used: 0,
            event_idx: false,
        }
    }

    /// The queue; whether it is in guest memory is not looked at.
    ///
    /// # Errors
    /// What is wrong with it, as the rest of a sentence.
    pub(super) fn queue(&self) -> Result<Queue, String> {
        let build = || {
            let mut queue = Queue::new(self.max_size)?;
            let size = u16::try_from(self.size);
            queue.try_set_size(size.map_err(|_| virtio_queue::Error::InvalidSize)?)?;
            queue.try_set_desc_table_address(GuestAddress(self.descriptors))?;
            queue.try_set_avail_ring_address(GuestAddress(self.available))?;
            queue.try_set_used_ring_address(GuestAddress(self.used))?;
            queue.set_event_idx(self.event_idx);
            queue.set_ready(true);
            Ok(queue)
        };
        // What the library takes for a ring that was never set.
        if self.available == 0 {
            return Err("its available ring is at address 0".to_owned());
        }
        build().map_err(|error: virtio_queue::Error| error.to_string())
    }
}

/// A part of a queue, of which the address is written in two halves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RingPart {
    Descriptors,
    Available,
    Used,
}

/// What has to happen after a register was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    Nothing,
    /// The device begins anew.
    Reset,
    /// The features are settled.
    Negotiated,
    /// The driver drives.
    Driven,
    /// A queue was made ready.
    Enable(usize),
    /// A queue was taken back.
    Disable(usize),
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Negotiation {
    offered: u64,
    accepted: u64,
    status: u32,
    features_select: u32,
    accepted_select: u32,
    queue_select: u32,
    queues: Vec<QueueSetup>,
}

impl Negotiation {
    /// Of a device that offers these features beside the common ones.
    pub(super) fn new(features: u64, queue_sizes: &[u16]) -> Self {
        Self {
            offered: features | COMMON_FEATURES,
            accepted: 0,
            status: 0,
            features_select: 0,
            accepted_select: 0,
            queue_select: 0,
            queues: queue_sizes.iter().map(|&size| QueueSetup::new(size)).collect(),
        }
    }

    /// As at the beginning.
    pub(super) fn reset(&mut self) {
        let sizes: Vec<u16> = self.queues.iter().map(|queue| queue.max_size).collect();
        *self = Self { offered: self.offered, ..Self::new(0, &sizes) };
    }

    pub(super) fn status(&self) -> u32 {
        self.status
    }

    pub(super) fn accepted(&self) -> u64 {
        self.accepted
    }

    fn has(&self, bits: u32) -> bool {
        self.status & bits == bits
    }

    /// Whether the device may use its queues.
    pub(super) fn is_driven(&self) -> bool {
        self.has(VIRTIO_CONFIG_S_DRIVER_OK) && !self.needs_reset()
    }

    pub(super) fn needs_reset(&self) -> bool {
        self.has(VIRTIO_CONFIG_S_NEEDS_RESET)
    }

    /// The device cannot go on.
    pub(super) fn set_needs_reset(&mut self) {
        self.status |= VIRTIO_CONFIG_S_NEEDS_RESET;
    }

    pub(super) fn write_status(&mut self, value: u32) -> Effect {
        if value == 0 {
            return Effect::Reset;
        }
        let known = VIRTIO_CONFIG_S_ACKNOWLEDGE
            | VIRTIO_CONFIG_S_DRIVER
            | VIRTIO_CONFIG_S_FEATURES_OK
            | VIRTIO_CONFIG_S_DRIVER_OK
            | VIRTIO_CONFIG_S_FAILED;
        // 2.1.1: the driver must not clear a bit. NEEDS_RESET is the device's to set.
        let mut new = value & known & !self.status;
        if (self.status | new) & !VIRTIO_CONFIG_S_NEEDS_RESET != value & known {
            return Effect::Nothing;
        }
        let begun = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER;
        let mut effect = Effect::Nothing;
        if new & VIRTIO_CONFIG_S_FEATURES_OK != 0 {
            if (self.status | new) & begun == begun && self.is_acceptable() {
                effect = Effect::Negotiated;
            } else {
                new &= !VIRTIO_CONFIG_S_FEATURES_OK;
            }
        }
        if new & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            if self.has(VIRTIO_CONFIG_S_FEATURES_OK) && !self.has(VIRTIO_CONFIG_S_FAILED) {
                effect = Effect::Driven;
            } else {
                new &= !VIRTIO_CONFIG_S_DRIVER_OK;
            }
        }
        self.status |= new;
        effect
    }

    fn is_acceptable(&self) -> bool {
        self.accepted & !self.offered == 0 && self.accepted & (1 << VIRTIO_F_VERSION_1) != 0
    }

    pub(super) fn select_features(&mut self, select: u32) {
        self.features_select = select;
    }

    /// 32 of the offered features.
    pub(super) fn offered_word(&self) -> u32 {
        let [low, high] = halves(self.offered);
        match self.features_select {
            0 => low,
            1 => high,
            _ => 0,
        }
    }

    pub(super) fn select_accepted(&mut self, select: u32) {
        self.accepted_select = select;
    }

    /// The driver accepts 32 features, before it says that it has accepted all.
    pub(super) fn accept_word(&mut self, word: u32) {
        let is_settled = self.has(VIRTIO_CONFIG_S_FEATURES_OK);
        if is_settled || !self.has(VIRTIO_CONFIG_S_DRIVER) {
            return;
        }
        match self.accepted_select {
            0 => self.accepted = with_low(self.accepted, word),
            1 => self.accepted = with_high(self.accepted, word),
            // There are none to accept, and one that were is not offered.
            _ => {}
        }
    }

    pub(super) fn select_queue(&mut self, select: u32) {
        self.queue_select = select;
    }

    fn selected(&self) -> Option<usize> {
        let index = usize::try_from(self.queue_select).ok()?;
        (index < self.queues.len()).then_some(index)
    }

    /// Most entries of the selected queue, 0 if there is none.
    pub(super) fn queue_max_size(&self) -> u32 {
        self.selected().map_or(0, |index| self.queues[index].max_size.into())
    }

    pub(super) fn queue_is_ready(&self) -> bool {
        self.selected().is_some_and(|index| self.queues[index].is_ready)
    }

    pub(super) fn setup(&self, index: usize) -> &QueueSetup {
        &self.queues[index]
    }

    /// The selected queue, if it may be set up now.
    fn selected_setup(&mut self) -> Option<&mut QueueSetup> {
        let index = self.selected()?;
        let may = self.has(VIRTIO_CONFIG_S_FEATURES_OK) && !self.queues[index].is_ready;
        may.then(|| &mut self.queues[index])
    }

    pub(super) fn set_queue_size(&mut self, size: u32) {
        if let Some(queue) = self.selected_setup() {
            queue.size = size;
        }
    }

    /// Half of the address of a part of the selected queue.
    pub(super) fn set_queue_address(&mut self, part: RingPart, is_high: bool, word: u32) {
        let Some(queue) = self.selected_setup() else { return };
        let address = match part {
            RingPart::Descriptors => &mut queue.descriptors,
            RingPart::Available => &mut queue.available,
            RingPart::Used => &mut queue.used,
        };
        *address = if is_high { with_high(*address, word) } else { with_low(*address, word) };
    }

    pub(super) fn write_queue_ready(&mut self, value: u32) -> Effect {
        let event_idx = self.accepted & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        match (value, self.selected()) {
            (1, Some(index)) => match self.selected_setup() {
                Some(queue) => {
                    queue.is_ready = true;
                    queue.event_idx = event_idx;
                    Effect::Enable(index)
                }
                None => Effect::Nothing,
            },
            (0, Some(index)) if self.queues[index].is_ready => {
                self.not_ready(index);
                Effect::Disable(index)
            }
            _ => Effect::Nothing,
        }
    }

    /// The queue is not in use.
    pub(super) fn not_ready(&mut self, index: usize) {
        self.queues[index].is_ready = false;
    }
}

fn halves(word: u64) -> [u32; 2] {
    #[expect(clippy::cast_possible_truncation, reason = "each is the half that is meant")]
    [word as u32, (word >> 32) as u32]
}

fn with_low(address: u64, word: u32) -> u64 {
    address >> 32 << 32 | u64::from(word)
}

fn with_high(address: u64, word: u32) -> u64 {
    u64::from(word) << 32 | u64::from(halves(address)[0])
}
