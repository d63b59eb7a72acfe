//! Virtio devices (VIRTIO 1.2) for guests with drivers of their own: the register block of
//! virtio-mmio, queues, virtio-blk and virtio-balloon. `docs/virtio.md` says what is offered.
//!
//! What this layer guarantees:
//!
//! - guest memory is reached through the device's own [`Iotlb`](crate::iotlb::Iotlb), page by page:
//!   reclaim takes the pages behind a request like any other, and waits for a copy of at most a page,
//!   never for a disk;
//! - once a reset by the driver has returned, nothing that was begun before it touches guest memory
//!   (`rings.rs`), and it waits for no disk either;
//! - whatever the driver writes to registers, rings and buffers, it gets an error status, or a device
//!   that needs a reset, with a sentence for the host; work for one buffer is bounded, and ends at a
//!   reset or when the device is stopped.
//!
//! | file | what |
//! |---|---|
//! | `mmio.rs` | the registers as a vCPU reads and writes them |
//! | `negotiation.rs` | status, features, set-up of queues |
//! | `worker.rs` | the device's thread |
//! | `rings.rs`, `chain.rs` | the queues, guarded against a reset; one buffer of a queue |
//! | `device.rs` | what a kind of device has to say |
//! | `blk/`, `balloon/` | the two kinds |
//!
//! Locks: registers, then rings; whoever has the rings may wait for page locks. No page lock is held
//! when either is taken.

mod balloon;
mod blk;
mod chain;
mod device;
mod mmio;
mod negotiation;
mod rings;
mod worker;

pub use balloon::{Balloon, BalloonStats};
#[cfg(all(any(test, feature = "fuzzing"), feature = "export-notifier"))]
pub(crate) use blk::Disk;
pub use blk::{Block, BlockStats, Contents, DiskError, DiskMode, DiskTrouble, Format};
pub use device::Device;
pub use mmio::{MmioTransport, REGISTER_BYTES};

/// The interrupt line of a device.
pub trait Interrupt: Send + Sync {
    /// Raises an edge.
    ///
    /// # Errors
    /// If the host refuses it; the guest may then wait for ever.
    fn trigger(&self) -> std::io::Result<()>;
}

#[cfg(all(test, feature = "export-notifier"))]
mod tests;
