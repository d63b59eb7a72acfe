//! One command of the DMA device: read, checked, carried out, answered.
//!
//! Guarantee: whatever a descriptor holds, serving it takes bounded time and memory, touches
//! nothing outside the guest's RAM, and ends with a status in it. It is read once: what the guest
//! changes in it afterwards has no effect.

use std::mem::{offset_of, size_of};

use crate::abi::{self, DmaDescriptor};
use crate::addr::Gpa;
use crate::host_mm::MmError;
use crate::iotlb::Iotlb;

/// The memory that a device works on.
pub(in crate::vmm) trait DmaMemory: Send + Sync {
    /// Bytes of it, from address 0.
    fn bytes(&self) -> u64;
    /// Copies bytes out.
    fn read(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), MmError>;
    /// Copies bytes in.
    fn write(&self, gpa: Gpa, buf: &[u8]) -> Result<(), MmError>;
    /// Stores an aligned word after all that was written before.
    fn store(&self, gpa: Gpa, word: u32) -> Result<(), MmError>;
}

impl DmaMemory for Iotlb {
    fn bytes(&self) -> u64 {
        self.bytes()
    }

    fn read(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), MmError> {
        self.read(gpa, buf)
    }

    fn write(&self, gpa: Gpa, buf: &[u8]) -> Result<(), MmError> {
        self.write(gpa, buf)
    }

    fn store(&self, gpa: Gpa, word: u32) -> Result<(), MmError> {
        self.store(gpa, word)
    }
}

/// Why a descriptor is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refusal {
    Command,
    Length,
    OutsideRam,
    Overlap,
}

impl Refusal {
    fn result(self) -> u64 {
        match self {
            Self::Command => abi::DMA_BAD_COMMAND,
            Self::Length => abi::DMA_BAD_LENGTH,
            Self::OutsideRam => abi::DMA_OUTSIDE_RAM,
            Self::Overlap => abi::DMA_OVERLAP,
        }
    }
}

/// A checked command; the ranges that it needs are RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Command {
    Copy { source: Gpa, destination: Gpa },
    Fill { destination: Gpa, pattern: u64 },
    Checksum { source: Gpa },
}

/// Bytes of a descriptor up to its result.
const READ: usize = offset_of!(DmaDescriptor, result);

fn word(raw: &[u8; READ], offset: usize) -> u64 {
    let mut bytes = [0; size_of::<u64>()];
    bytes.copy_from_slice(&raw[offset..offset + size_of::<u64>()]);
    u64::from_le_bytes(bytes)
}

/// The command of a descriptor and its number of bytes.
fn check(raw: &[u8; READ], ram_bytes: u64) -> Result<(Command, usize), Refusal> {
    // The upper half of the first word is the status, which is the device's.
    let command = u32::try_from(word(raw, 0) & u64::from(u32::MAX)).unwrap_or(0);
    let source = word(raw, offset_of!(DmaDescriptor, source));
    let destination = word(raw, offset_of!(DmaDescriptor, destination));
    let bytes = word(raw, offset_of!(DmaDescriptor, bytes));
    let pattern = word(raw, offset_of!(DmaDescriptor, pattern));
    if ![abi::DMA_COPY, abi::DMA_FILL, abi::DMA_CHECKSUM].contains(&command) {
        return Err(Refusal::Command);
    }
    let len = match usize::try_from(bytes) {
        Ok(len) if (1..=abi::DMA_MAX_BYTES).contains(&bytes) => len,
        _ => return Err(Refusal::Length),
    };
    let ram = |at: u64| match at.checked_add(bytes) {
        Some(end) if end <= ram_bytes => Ok(Gpa::new(at)),
        _ => Err(Refusal::OutsideRam),
    };
    let command = match command {
        abi::DMA_COPY => {
            let copy = Command::Copy { source: ram(source)?, destination: ram(destination)? };
            if source.abs_diff(destination) < bytes {
                return Err(Refusal::Overlap);
            }
            copy
        }
        abi::DMA_FILL => Command::Fill { destination: ram(destination)?, pattern },
        _ => Command::Checksum { source: ram(source)? },
    };
    Ok((command, len))
}

/// What became of a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Served {
    /// Carried out, on so many bytes.
    Done(u64),
    /// Refused.
    Refused,
}

/// Serves descriptors, one after the other.
#[derive(Default)]
pub(super) struct Engine {
    /// What is on its way; at most [`abi::DMA_MAX_BYTES`].
    buffer: Vec<u8>,
}

impl Engine {
    /// Serves the descriptor at `at`, all of which is RAM.
    ///
    /// # Errors
    /// If the host has no frame for a page or cannot read it back: the guest cannot go on.
    pub(super) fn serve(&mut self, memory: &dyn DmaMemory, at: Gpa) -> Result<Served, MmError> {
        let mut raw = [0; READ];
        memory.read(at, &mut raw)?;
        let (status, result, served) = match check(&raw, memory.bytes()) {
            Ok((command, len)) => {
                let result = self.carry_out(memory, command, len)?;
                (abi::DMA_DONE, result, Served::Done(len as u64))
            }
            Err(refusal) => (abi::DMA_ERROR, refusal.result(), Served::Refused),
        };
        let place = |offset| Gpa::new(at.as_u64() + offset as u64);
        memory.write(place(offset_of!(DmaDescriptor, result)), &result.to_le_bytes())?;
        memory.store(place(offset_of!(DmaDescriptor, status)), status)?;
        Ok(served)
    }

    fn carry_out(
        &mut self,
        memory: &dyn DmaMemory,
        command: Command,
        len: usize,
    ) -> Result<u64, MmError> {
        self.buffer.clear();
        match command {
            Command::Copy { source, destination } => {
                self.buffer.resize(len, 0);
                memory.read(source, &mut self.buffer)?;
                memory.write(destination, &self.buffer)?;
                Ok(0)
            }
            Command::Fill { destination, pattern } => {
                self.buffer.extend(pattern.to_le_bytes().iter().cycle().take(len));
                memory.write(destination, &self.buffer)?;
                Ok(0)
            }
            Command::Checksum { source } => {
                self.buffer.resize(len, 0);
                memory.read(source, &mut self.buffer)?;
                Ok(checksum(&self.buffer))
            }
        }
    }
}

fn checksum(bytes: &[u8]) -> u64 {
    bytes.chunks(size_of::<u64>()).fold(0, |sum, chunk| {
        let mut word = [0; size_of::<u64>()];
        word[..chunk.len()].copy_from_slice(chunk);
        abi::dma_checksum(sum, u64::from_le_bytes(word))
    })
}

#[cfg(test)]
#[path = "command_tests.rs"]
mod tests;
