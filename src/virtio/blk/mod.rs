//! virtio-blk (VIRTIO 1.2, 5.2) over a raw disk image or a block device.
//!
//! What a guest is told is true: a write is acknowledged once the image has it, and, unless the
//! driver has agreed to a write-back cache, once it is durable; a flush is acknowledged once all
//! writes before it are durable. A flush that failed once makes all later ones fail: the host may have
//! dropped what it could not write, and would call the next one a success.

mod disk;
mod error;
mod format;
mod request;
mod trouble;

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_ID_BYTES,
};

pub use disk::{Contents, DiskMode};
pub use error::DiskError;
pub use format::Format;
pub use trouble::DiskTrouble;

pub(crate) use disk::Disk;
use disk::{FileDisk, Opened, SECTOR_BYTES};
use trouble::Troubles;

use super::device::{Device, read_bytes};
use super::rings::{Request, Trouble};

const DEVICE_ID: u32 = 2;
const QUEUE_SIZE: u16 = 256;
/// Most data descriptors of a request: the others are its header and its status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Data of a request is moved in pieces of this size.
const BOUNCE_BYTES: usize = 128 << 10;

/// Byte offsets in the configuration space, 5.2.4.
const CONFIG_CAPACITY: usize = 0;
const CONFIG_SEG_MAX: usize = 12;
const CONFIG_BLK_SIZE: usize = 20;
const CONFIG_WRITEBACK: usize = 32;
const CONFIG_BYTES: usize = 36;

crate::counters::counters! {
    /// What a disk has done.
    pub struct BlockStats {
        /// Reads carried out.
        reads,
        /// Bytes that they read.
        bytes_read,
        /// Writes carried out.
        writes,
        /// Bytes that they wrote.
        bytes_written,
        /// Times that the image was made durable.
        flushes,
        /// Requests that ended with an error.
        errors,
    }
    live pub(super) struct Counters;
}

/// A disk, as a kind of virtio device.
pub struct Block {
    disk: Box<dyn Disk>,
    mode: DiskMode,
    sectors: u64,
    /// What the guest had better write at a time.
    block_bytes: u64,
    is_shared: bool,
    serial: [u8; VIRTIO_BLK_ID_BYTES as usize],
    features: AtomicU64,
    /// The driver has asked for a write-back cache.
    is_writeback: AtomicBool,
    /// A flush has failed.
    is_unsound: AtomicBool,
    bounce: Mutex<Box<[u8]>>,
    counters: Counters,
    troubles: Troubles,
}

impl std::fmt::Debug for Block {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Block").field("sectors", &self.sectors).finish_non_exhaustive()
    }
}

impl Block {
    /// A disk whose content is the raw image, or the block device, at `path`, locked as long as this
    /// lives. `serial` is what the guest can ask for, cut off after 20 bytes.
    ///
    /// # Errors
    /// [`DiskError`], one sentence for each thing that can be wrong with an image.
    pub fn open(
        path: &Path,
        mode: DiskMode,
        contents: Contents,
        serial: &str,
    ) -> Result<Self, DiskError> {
        let Opened { disk, bytes, sector_bytes, is_shared } = FileDisk::open(path, mode, contents)?;
        let block = Self::on(Box::new(disk), bytes, mode, serial);
        Ok(Self { block_bytes: sector_bytes, is_shared, ..block })
    }

    /// The same on a disk of another kind, of so many bytes.
    pub(crate) fn on(disk: Box<dyn Disk>, bytes: u64, mode: DiskMode, serial: &str) -> Self {
        let mut padded = [0; VIRTIO_BLK_ID_BYTES as usize];
        for (to, from) in padded.iter_mut().zip(serial.bytes()) {
            *to = from;
        }
        Self {
            disk,
            mode,
            sectors: bytes / SECTOR_BYTES,
            block_bytes: SECTOR_BYTES,
            is_shared: false,
            serial: padded,
            features: AtomicU64::new(0),
            is_writeback: AtomicBool::new(false),
            is_unsound: AtomicBool::new(false),
            bounce: Mutex::new(vec![0; BOUNCE_BYTES].into_boxed_slice()),
            counters: Counters::default(),
            troubles: Troubles::default(),
        }
    }

    /// Whether it is a device that something else on this host may write to, such as a file system that
    /// is mounted: what the guest reads may be half written.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        self.is_shared
    }

    /// What the host refused so far, in the order in which each cause was first seen.
    #[must_use]
    pub fn troubles(&self) -> Vec<DiskTrouble> {
        self.troubles.list()
    }

    /// What it has done.
    #[must_use]
    pub fn stats(&self) -> BlockStats {
        self.counters.snapshot()
    }

    fn has(&self, feature: u32) -> bool {
        self.features.load(Ordering::Relaxed) >> feature & 1 != 0
    }

    /// Whether writes need not be durable when they are acknowledged (5.2.5.1, 5.2.6.2).
    fn is_writeback(&self) -> bool {
        if self.has(VIRTIO_BLK_F_CONFIG_WCE) {
            self.is_writeback.load(Ordering::Relaxed)
        } else {
            self.has(VIRTIO_BLK_F_FLUSH)
        }
    }
}

impl Device for Block {
    fn id(&self) -> u32 {
        DEVICE_ID
    }

    fn features(&self) -> u64 {
        let always = 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE;
        match self.mode {
            DiskMode::ReadOnly => always | 1 << VIRTIO_BLK_F_RO,
            DiskMode::ReadWrite => always | 1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_CONFIG_WCE,
        }
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut space = [0; CONFIG_BYTES];
        space[CONFIG_CAPACITY..][..8].copy_from_slice(&self.sectors.to_le_bytes());
        space[CONFIG_SEG_MAX..][..4].copy_from_slice(&SEG_MAX.to_le_bytes());
        let block = u32::try_from(self.block_bytes).unwrap_or(u32::MAX);
        space[CONFIG_BLK_SIZE..][..4].copy_from_slice(&block.to_le_bytes());
        space[CONFIG_WRITEBACK] = self.is_writeback().into();
        read_bytes(&space, offset, data);
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        if offset == CONFIG_WRITEBACK as u64 && self.has(VIRTIO_BLK_F_CONFIG_WCE) {
            let [value] = data else { return };
            self.is_writeback.store(*value != 0, Ordering::Relaxed);
        }
    }

    fn negotiated(&self, features: u64) {
        self.features.store(features, Ordering::Relaxed);
        // 5.2.5.1: without a way to flush there is no write-back cache to begin with.
        self.is_writeback.store(self.has(VIRTIO_BLK_F_FLUSH), Ordering::Relaxed);
    }

    fn reset(&self) {
        self.features.store(0, Ordering::Relaxed);
        self.is_writeback.store(false, Ordering::Relaxed);
    }

    fn serve(&self, _queue: usize, request: &Request<'_>) -> Result<u32, Trouble> {
        request::serve(self, request)
    }
}
