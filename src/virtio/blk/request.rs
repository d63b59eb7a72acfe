//! One request to a disk (VIRTIO 1.2, 5.2.6).
//!
//! Data goes through a bounce buffer, a piece at a time: copied between guest memory and the buffer
//! with the page in flight, then between buffer and image with nothing of the guest's held at all. So
//! reclaim never waits for the disk, and no page is pinned while it is slow.

use std::io;
use std::sync::atomic::Ordering;

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};

use crate::sync::lock;
use crate::virtio::rings::{Request, Trouble};

use super::disk::SECTOR_BYTES;
use super::trouble::Op;
use super::{Block, DiskMode};

const HEADER: usize = 16;
const HEADER_BYTES: u64 = HEADER as u64;
const STATUS_BYTES: u64 = 1;

/// Why a request has an error status.
enum Refused {
    /// It makes no sense, or the disk has failed.
    Failed,
    /// There is no such kind of request here.
    Unsupported,
    /// There is nothing to give a status for.
    Over(Trouble),
}

impl From<Trouble> for Refused {
    fn from(trouble: Trouble) -> Self {
        match trouble {
            // A buffer that is no guest memory, or that cannot be brought in.
            Trouble::Memory(_) => Self::Failed,
            over => Self::Over(over),
        }
    }
}

/// Carries a request out and writes its status; returns the number of bytes written to its buffer.
pub(super) fn serve(block: &Block, request: &Request<'_>) -> Result<u32, Trouble> {
    let room = request.writable().bytes();
    let Some(data_bytes) = room.checked_sub(STATUS_BYTES) else {
        return Err(Trouble::Broken("a disk request has no room for its status".to_owned()));
    };
    let (status, written) = match carry_out(block, request, data_bytes) {
        Ok(written) => (VIRTIO_BLK_S_OK, written),
        Err(Refused::Failed) => (VIRTIO_BLK_S_IOERR, 0),
        Err(Refused::Unsupported) => (VIRTIO_BLK_S_UNSUPP, 0),
        Err(Refused::Over(trouble)) => return Err(trouble),
    };
    if status != VIRTIO_BLK_S_OK {
        block.counters.errors.add(1);
    }
    request.write(data_bytes, &[status.to_le_bytes()[0]]).map_err(|trouble| match trouble {
        Trouble::Memory(error) => {
            Trouble::Broken(format!("the status of a disk request cannot be written: {error}"))
        }
        other => other,
    })?;
    // What the driver may rely on is from the first byte on, without a gap (2.7.8.2).
    let whole = if written == data_bytes { room } else { written };
    Ok(u32::try_from(whole).unwrap_or(u32::MAX))
}

/// Returns the number of bytes of data that were written to the buffer.
fn carry_out(block: &Block, request: &Request<'_>, data_bytes: u64) -> Result<u64, Refused> {
    let mut header = [0; HEADER];
    if request.fault().is_some() || request.read(0, &mut header)? < header.len() {
        return Err(Refused::Failed);
    }
    let [a, b, c, d, _, _, _, _, sector @ ..] = header;
    let kind = u32::from_le_bytes([a, b, c, d]);
    let sector = u64::from_le_bytes(sector);
    match kind {
        VIRTIO_BLK_T_IN => read(block, request, sector, data_bytes),
        VIRTIO_BLK_T_OUT => write(block, request, sector).map(|()| 0),
        VIRTIO_BLK_T_FLUSH => flush(block).map(|()| 0),
        VIRTIO_BLK_T_GET_ID => {
            let len = usize::try_from(data_bytes).unwrap_or(usize::MAX).min(block.serial.len());
            Ok(request.write(0, &block.serial[..len])? as u64)
        }
        _ => Err(Refused::Unsupported),
    }
}

/// Byte offset of a transfer, checked to be whole sectors of the disk.
fn position(block: &Block, sector: u64, bytes: u64) -> Result<u64, Refused> {
    let end = sector.checked_add(bytes / SECTOR_BYTES).ok_or(Refused::Failed)?;
    if !bytes.is_multiple_of(SECTOR_BYTES) || end > block.sectors {
        return Err(Refused::Failed);
    }
    // At most the disk's size.
    Ok(sector * SECTOR_BYTES)
}

fn read(block: &Block, request: &Request<'_>, sector: u64, bytes: u64) -> Result<u64, Refused> {
    let start = position(block, sector, bytes)?;
    let mut bounce = lock(&block.bounce);
    let mut done = 0;
    while done < bytes {
        let piece = piece(&mut bounce, bytes - done);
        block.disk.read_exact_at(piece, start + done).map_err(failed(block, Op::Read))?;
        request.write(done, piece)?;
        done += piece.len() as u64;
    }
    block.counters.reads.add(1);
    block.counters.bytes_read.add(bytes);
    Ok(bytes)
}

fn write(block: &Block, request: &Request<'_>, sector: u64) -> Result<(), Refused> {
    if block.mode == DiskMode::ReadOnly {
        return Err(Refused::Failed);
    }
    let bytes = request.readable().bytes() - HEADER_BYTES;
    let start = position(block, sector, bytes)?;
    let mut bounce = lock(&block.bounce);
    let mut done = 0;
    while done < bytes {
        let piece = piece(&mut bounce, bytes - done);
        request.read(HEADER_BYTES + done, piece)?;
        block.disk.write_all_at(piece, start + done).map_err(failed(block, Op::Write))?;
        done += piece.len() as u64;
    }
    block.counters.writes.add(1);
    block.counters.bytes_written.add(bytes);
    // 5.2.6.2: without a write-back cache, what is acknowledged is durable.
    if block.is_writeback() { Ok(()) } else { flush(block) }
}

fn flush(block: &Block) -> Result<(), Refused> {
    if block.mode == DiskMode::ReadOnly {
        return Ok(());
    }
    if block.is_unsound.load(Ordering::Relaxed) {
        block.troubles.again(Op::Flush);
        return Err(Refused::Failed);
    }
    block.disk.sync().map_err(|error| {
        block.is_unsound.store(true, Ordering::Relaxed);
        failed(block, Op::Flush)(error)
    })?;
    block.counters.flushes.add(1);
    Ok(())
}

/// The guest is told that it failed, the user why.
fn failed(block: &Block, op: Op) -> impl Fn(io::Error) -> Refused {
    move |error| {
        block.troubles.add(op, &error);
        Refused::Failed
    }
}

/// As much of the bounce buffer as is wanted.
fn piece(bounce: &mut [u8], wanted: u64) -> &mut [u8] {
    let len = usize::try_from(wanted).unwrap_or(usize::MAX).min(bounce.len());
    &mut bounce[..len]
}
