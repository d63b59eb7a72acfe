//! Checks of the DMA device.

use super::{Checked, expect};
use crate::dma::{self, Answer, BUFFER_PAGES, Command, DmaUnit};
use crate::machine::Machine;
use crate::memory::PAGE_BYTES;
use crate::oracle::WORDS;
use gnomon_abi as abi;

/// Words of the buffer.
const BUFFER_WORDS: usize = BUFFER_PAGES as usize * WORDS;
/// First word of its second half.
const HALF: usize = BUFFER_WORDS / 2;
/// Its bytes.
const BUFFER_BYTES: u64 = BUFFER_PAGES * PAGE_BYTES;
/// How often to look whether the device is idle.
const MOST_LOOKS: u32 = 100_000;
const DONE: Answer = Answer { status: abi::DMA_DONE, result: 0 };

/// A word that tells its place.
fn word(index: usize) -> u64 {
    (index as u64 + 1).wrapping_mul(0x0101_0205_0810_2040)
}

/// The buffer's words.
fn buffer(unit: &DmaUnit) -> *mut u64 {
    unit.buffer() as *mut u64
}

fn fill(unit: &DmaUnit) {
    for index in 0..BUFFER_WORDS {
        // SAFETY: the buffer is the unit's, and the device is idle.
        unsafe { buffer(unit).add(index).write_volatile(word(index)) };
    }
}

/// The byte at an offset of the buffer.
fn byte(unit: &DmaUnit, offset: u64) -> u8 {
    // SAFETY: as in `fill`; callers stay in the buffer.
    unsafe { ((unit.buffer() + offset) as *const u8).read_volatile() }
}

fn filled_byte(offset: u64) -> u8 {
    word(offset as usize / 8).to_le_bytes()[offset as usize % 8]
}

fn answered(what: &'static str, expected: Answer, found: Answer) -> Checked {
    expect(what, expected.status.into(), found.status.into())?;
    expect(what, expected.result, found.result)
}

pub(super) fn copy(machine: &Machine) -> Checked {
    let unit = &machine.dma[0];
    fill(unit);
    let half = BUFFER_BYTES / 2;
    // Odd addresses, and page boundaries at other offsets in the two.
    let (from, to, bytes) = (3, half + 1001, PAGE_BYTES + 5);
    let command = Command {
        command: abi::DMA_COPY,
        source: unit.buffer() + from,
        destination: unit.buffer() + to,
        bytes,
        pattern: 0,
    };
    answered("answer to a copy", DONE, unit.run(&command))?;
    for offset in 0..BUFFER_BYTES {
        let expected = match offset.checked_sub(to) {
            Some(inside) if inside < bytes => filled_byte(from + inside),
            _ => filled_byte(offset),
        };
        expect("byte after a copy", expected.into(), byte(unit, offset).into())?;
    }
    Ok(())
}

pub(super) fn fill_pattern(machine: &Machine) -> Checked {
    let unit = &machine.dma[0];
    fill(unit);
    let (to, bytes, pattern) = (PAGE_BYTES - 7, PAGE_BYTES + 9, 0x8877_6655_4433_2211_u64);
    let command = Command {
        command: abi::DMA_FILL,
        source: 0,
        destination: unit.buffer() + to,
        bytes,
        pattern,
    };
    answered("answer to a fill", DONE, unit.run(&command))?;
    for offset in 0..BUFFER_BYTES {
        let expected = match offset.checked_sub(to) {
            Some(inside) if inside < bytes => pattern.to_le_bytes()[inside as usize % 8],
            _ => filled_byte(offset),
        };
        expect("byte after a fill", expected.into(), byte(unit, offset).into())?;
    }
    Ok(())
}

pub(super) fn checksum(machine: &Machine) -> Checked {
    let unit = &machine.dma[0];
    fill(unit);
    let mut command = Command {
        command: abi::DMA_CHECKSUM,
        source: unit.buffer(),
        destination: 0,
        bytes: BUFFER_BYTES,
        pattern: 0,
    };
    // SAFETY: the buffer is the unit's, and the device is idle.
    let expected = unsafe { dma::checksum(buffer(unit), BUFFER_WORDS) };
    let done = |result| Answer { status: abi::DMA_DONE, result };
    answered("checksum of the buffer", done(expected), unit.run(&command))?;
    // Another order of the same words is another sum.
    // SAFETY: as above.
    unsafe {
        buffer(unit).write_volatile(word(HALF));
        buffer(unit).add(HALF).write_volatile(word(0));
    }
    expect("equal checksums", 0, u64::from(unit.run(&command).result == expected))?;
    command.bytes = 3;
    command.source += 8;
    let short = abi::dma_checksum(0, word(1) & 0xff_ffff);
    answered("checksum of three bytes", done(short), unit.run(&command))
}

pub(super) fn errors(machine: &Machine) -> Checked {
    let unit = &machine.dma[0];
    fill(unit);
    let ram = machine.control.memory_bytes;
    let good = Command {
        command: abi::DMA_COPY,
        source: unit.buffer(),
        destination: unit.buffer() + PAGE_BYTES,
        bytes: PAGE_BYTES,
        pattern: 0,
    };
    let cases = [
        (Command { command: 0, ..good }, abi::DMA_BAD_COMMAND),
        (Command { command: 99, ..good }, abi::DMA_BAD_COMMAND),
        (Command { bytes: 0, ..good }, abi::DMA_BAD_LENGTH),
        (Command { bytes: abi::DMA_MAX_BYTES + 1, ..good }, abi::DMA_BAD_LENGTH),
        (Command { source: ram - 1, ..good }, abi::DMA_OUTSIDE_RAM),
        (Command { destination: u64::MAX, ..good }, abi::DMA_OUTSIDE_RAM),
        (Command { destination: abi::WINDOW_GPA, ..good }, abi::DMA_OUTSIDE_RAM),
        (Command { destination: unit.buffer() + 1, ..good }, abi::DMA_OVERLAP),
    ];
    for (command, reason) in cases {
        let expected = Answer { status: abi::DMA_ERROR, result: reason };
        answered("answer to a bad descriptor", expected, unit.run(&command))?;
    }
    for offset in 0..BUFFER_BYTES {
        let found = byte(unit, offset).into();
        expect("byte after errors", filled_byte(offset).into(), found)?;
    }
    // A doorbell for nothing is not heard, and the device goes on.
    crate::x86::ring_dma(u32::MAX);
    answered("answer after errors", DONE, unit.run(&good))?;
    // The last one counts as unfinished for a moment after its status.
    let left = (0..MOST_LOOKS).map(|_| crate::x86::in32(abi::PORT_DMA)).find(|left| *left == 0);
    expect("unfinished descriptors", 0, left.map_or(1, u64::from))
}
