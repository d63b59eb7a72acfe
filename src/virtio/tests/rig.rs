//! A driver: the other end of the registers and rings.

use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use virtio_bindings::bindings::virtio_mmio as regs;
use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

use crate::addr::{Gpa, PAGE_SIZE_U64, Pfn};
use crate::export_rmap::lab::Rule;
use crate::host_mm::{
    HostMm, HostMmConfig, MIN_HOST_MEMORY_BYTES, MemoryObject, Placement, SwapConfig,
};
use crate::sync::lock;
use crate::virtio::{Device, Interrupt, MmioTransport};

/// When something that must happen is given up.
pub(super) const GIVE_UP: Duration = Duration::from_secs(60);

pub(super) const ACKNOWLEDGE: u32 = 1;
pub(super) const DRIVER: u32 = 2;
pub(super) const DRIVER_OK: u32 = 4;
pub(super) const FEATURES_OK: u32 = 8;
pub(super) const NEEDS_RESET: u32 = 64;

pub(super) const VERSION_1: u64 = 1 << 32;
pub(super) const EVENT_IDX: u64 = 1 << 29;

/// Counts edges.
#[derive(Default)]
pub(super) struct Line {
    edges: Mutex<u64>,
    changed: Condvar,
}

impl Interrupt for Line {
    fn trigger(&self) -> std::io::Result<()> {
        *lock(&self.edges) += 1;
        self.changed.notify_all();
        Ok(())
    }
}

impl Line {
    pub(super) fn edges(&self) -> u64 {
        *lock(&self.edges)
    }
}

/// Runs until it is so.
pub(super) fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !is_so() {
        assert!(begin.elapsed() < GIVE_UP, "not seen: {what}");
        std::thread::sleep(Duration::from_micros(50));
    }
}

/// Host memory of the smallest ration, for a guest of four times as much.
pub(super) fn host(placement: Kind, sabotage: Option<Rule>) -> (Arc<HostMm>, Arc<MemoryObject>) {
    let guest_bytes = 4 * MIN_HOST_MEMORY_BYTES;
    let config = HostMmConfig {
        placement: match placement {
            Kind::Anywhere => Placement::Anywhere,
            Kind::Identity => Placement::Identity { guest_bytes },
        },
        swap: SwapConfig { path: None, dir: None, bytes: 64 << 20 },
        check_evictions: true,
        sabotage,
        ..HostMmConfig::new(MIN_HOST_MEMORY_BYTES)
    };
    let mm = HostMm::new(config).unwrap();
    let object = mm.create_object(guest_bytes).unwrap();
    (mm, object)
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    Anywhere,
    Identity,
}

pub(super) const BOTH: [Kind; 2] = [Kind::Anywhere, Kind::Identity];

pub(super) fn all_frames(mm: &HostMm) -> Vec<Pfn> {
    (0..mm.frame_count()).map(Pfn::new).collect()
}

/// A piece of a buffer: address, length, whether the device writes it.
pub(super) type Piece = (u64, u32, bool);

struct Ring {
    size: u16,
    base: u64,
    next_available: u16,
    seen: u16,
    next_descriptor: u16,
}

impl Ring {
    fn descriptor(&self, index: u16) -> u64 {
        self.base + 16 * u64::from(index % self.size)
    }

    fn available(&self) -> u64 {
        self.base + PAGE_SIZE_U64
    }

    fn used(&self) -> u64 {
        self.base + 2 * PAGE_SIZE_U64
    }
}

pub(super) struct Driver {
    pub(super) transport: MmioTransport,
    pub(super) object: Arc<MemoryObject>,
    pub(super) line: Arc<Line>,
    rings: Mutex<Vec<Ring>>,
}

/// Where the rings are; each queue has four pages.
pub(super) const RINGS: u64 = 0x1_0000;
/// Free for buffers, to the end of memory.
pub(super) const BUFFERS: u64 = 0x10_0000;

impl Driver {
    /// A driver for a device that nobody has touched.
    pub(super) fn new(device: Arc<dyn Device>, object: &Arc<MemoryObject>) -> Self {
        let line = Arc::new(Line::default());
        let transport = MmioTransport::new(device, object.clone(), line.clone()).unwrap();
        Self { transport, object: object.clone(), line, rings: Mutex::default() }
    }

    /// One that has accepted these features, and set up all queues with so many entries.
    pub(super) fn ready(
        device: Arc<dyn Device>,
        object: &Arc<MemoryObject>,
        features: u64,
        size: u16,
    ) -> Self {
        let this = Self::new(device, object);
        this.begin(features, size);
        this
    }

    /// From a reset to a driven device.
    pub(super) fn begin(&self, features: u64, size: u16) {
        self.set(regs::VIRTIO_MMIO_STATUS, 0);
        assert_eq!(self.get(regs::VIRTIO_MMIO_STATUS), 0);
        self.set(regs::VIRTIO_MMIO_STATUS, ACKNOWLEDGE);
        self.set(regs::VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER);
        self.accept(features);
        let negotiated = ACKNOWLEDGE | DRIVER | FEATURES_OK;
        self.set(regs::VIRTIO_MMIO_STATUS, negotiated);
        assert_eq!(self.get(regs::VIRTIO_MMIO_STATUS), negotiated);
        lock(&self.rings).clear();
        while self.queue_max(lock(&self.rings).len()) > 0 {
            self.set_up(size);
        }
        self.set(regs::VIRTIO_MMIO_STATUS, negotiated | DRIVER_OK);
        assert_eq!(self.get(regs::VIRTIO_MMIO_STATUS), negotiated | DRIVER_OK);
    }

    pub(super) fn accept(&self, features: u64) {
        for word in [0, 1] {
            self.set(regs::VIRTIO_MMIO_DRIVER_FEATURES_SEL, word);
            let half = u32::try_from(features >> (32 * word) & u64::from(u32::MAX)).unwrap();
            self.set(regs::VIRTIO_MMIO_DRIVER_FEATURES, half);
        }
    }

    pub(super) fn offered(&self) -> u64 {
        [0, 1].iter().fold(0, |all, &word| {
            self.set(regs::VIRTIO_MMIO_DEVICE_FEATURES_SEL, word);
            all | u64::from(self.get(regs::VIRTIO_MMIO_DEVICE_FEATURES)) << (32 * word)
        })
    }

    pub(super) fn queue_max(&self, index: usize) -> u32 {
        self.set(regs::VIRTIO_MMIO_QUEUE_SEL, u32::try_from(index).unwrap());
        self.get(regs::VIRTIO_MMIO_QUEUE_NUM_MAX)
    }

    /// Sets the next queue up.
    fn set_up(&self, size: u16) {
        let mut rings = lock(&self.rings);
        let base = RINGS + 4 * PAGE_SIZE_U64 * rings.len() as u64;
        let ring = Ring { size, base, next_available: 0, seen: 0, next_descriptor: 0 };
        self.object.write(Gpa::new(base), &vec![0; 4 * 4096]).unwrap();
        self.set(regs::VIRTIO_MMIO_QUEUE_NUM, size.into());
        for (register, address) in [
            (regs::VIRTIO_MMIO_QUEUE_DESC_LOW, ring.descriptor(0)),
            (regs::VIRTIO_MMIO_QUEUE_AVAIL_LOW, ring.available()),
            (regs::VIRTIO_MMIO_QUEUE_USED_LOW, ring.used()),
        ] {
            self.set(register, u32::try_from(address).unwrap());
            self.set(register + 4, 0);
        }
        self.set(regs::VIRTIO_MMIO_QUEUE_READY, 1);
        assert_eq!(self.get(regs::VIRTIO_MMIO_QUEUE_READY), 1);
        rings.push(ring);
    }

    pub(super) fn get(&self, register: u32) -> u32 {
        let mut word = [0; 4];
        self.transport.read(register.into(), &mut word);
        u32::from_le_bytes(word)
    }

    pub(super) fn set(&self, register: u32, value: u32) {
        self.transport.write(register.into(), &value.to_le_bytes());
    }

    pub(super) fn config<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.transport.read(0x100 + offset, &mut bytes);
        bytes
    }

    pub(super) fn write(&self, gpa: u64, bytes: &[u8]) {
        self.object.write(Gpa::new(gpa), bytes).unwrap();
    }

    pub(super) fn read(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.object.read(Gpa::new(gpa), &mut bytes).unwrap();
        bytes
    }

    fn word(&self, gpa: u64) -> u16 {
        let bytes = self.read(gpa, 2);
        u16::from_le_bytes([bytes[0], bytes[1]])
    }

    /// Writes a descriptor as it is given.
    pub(super) fn describe(&self, queue: usize, index: u16, fields: (u64, u32, u16, u16)) {
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&fields.0.to_le_bytes());
        bytes.extend_from_slice(&fields.1.to_le_bytes());
        bytes.extend_from_slice(&fields.2.to_le_bytes());
        bytes.extend_from_slice(&fields.3.to_le_bytes());
        let at = lock(&self.rings)[queue].descriptor(index);
        self.write(at, &bytes);
    }

    /// Makes a buffer available whose first descriptor is this one.
    pub(super) fn offer(&self, queue: usize, head: u16) {
        let mut rings = lock(&self.rings);
        let ring = &mut rings[queue];
        let entry = ring.available() + 4 + 2 * u64::from(ring.next_available % ring.size);
        self.write(entry, &head.to_le_bytes());
        ring.next_available = ring.next_available.wrapping_add(1);
        self.write(ring.available() + 2, &ring.next_available.to_le_bytes());
    }

    /// Says what the index of the available ring is, whatever is in the ring.
    pub(super) fn claim(&self, queue: usize, index: u16) {
        let at = lock(&self.rings)[queue].available() + 2;
        self.write(at, &index.to_le_bytes());
    }

    /// Makes a buffer of these pieces available; returns its first descriptor.
    pub(super) fn add(&self, queue: usize, pieces: &[Piece]) -> u16 {
        let (head, size) = {
            let mut rings = lock(&self.rings);
            let ring = &mut rings[queue];
            let head = ring.next_descriptor;
            let count = u16::try_from(pieces.len()).unwrap();
            ring.next_descriptor = (head + count) % ring.size;
            (head, ring.size)
        };
        for (number, &(gpa, len, is_written)) in (0..).zip(pieces) {
            let index = (head + number) % size;
            let mut flags = 0;
            if usize::from(number) + 1 < pieces.len() {
                flags |= VRING_DESC_F_NEXT;
            }
            if is_written {
                flags |= VRING_DESC_F_WRITE;
            }
            let flags = u16::try_from(flags).unwrap();
            self.describe(queue, index, (gpa, len, flags, (index + 1) % size));
        }
        self.offer(queue, head);
        head
    }

    pub(super) fn kick(&self, queue: usize) {
        self.set(regs::VIRTIO_MMIO_QUEUE_NOTIFY, u32::try_from(queue).unwrap());
    }

    /// The next buffer that came back, if one did: its first descriptor and the bytes written.
    pub(super) fn poll(&self, queue: usize) -> Option<(u32, u32)> {
        let mut rings = lock(&self.rings);
        let ring = &mut rings[queue];
        if self.word(ring.used() + 2) == ring.seen {
            return None;
        }
        let entry = self.read(ring.used() + 4 + 8 * u64::from(ring.seen % ring.size), 8);
        ring.seen = ring.seen.wrapping_add(1);
        let word = |at: usize| u32::from_le_bytes(entry[at..at + 4].try_into().unwrap());
        Some((word(0), word(4)))
    }

    /// Waits for the next buffer that comes back.
    pub(super) fn take(&self, queue: usize) -> (u32, u32) {
        let mut found = None;
        until("a buffer that comes back", || {
            assert!(!self.needs_reset(), "{:?}", self.transport.failure());
            found = self.poll(queue);
            found.is_some()
        });
        found.unwrap()
    }

    /// Has one buffer served; returns the bytes written.
    pub(super) fn serve(&self, queue: usize, pieces: &[Piece]) -> u32 {
        let head = self.add(queue, pieces);
        self.kick(queue);
        let (back, written) = self.take(queue);
        assert_eq!(back, u32::from(head));
        written
    }

    pub(super) fn needs_reset(&self) -> bool {
        self.get(regs::VIRTIO_MMIO_STATUS) & NEEDS_RESET != 0
    }
}
