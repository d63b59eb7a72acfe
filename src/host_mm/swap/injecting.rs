//! Swap that goes wrong: around a back end whole operations fail, under the file single system
//! calls do.

use std::io;
use std::num::NonZeroU64;
use std::os::unix::fs::FileExt;

use super::{CorruptingBackend, FileSwap, SwapBackend};
use crate::hooks::{SHORT_WRITE, SWAP_CORRUPT, SWAP_READ, SWAP_WRITE, interrupted_or};
use gnomon_export_rmap::addr::{PAGE_SIZE, SwapSlot};
use gnomon_export_rmap::lab::Lab;

/// Sabotage corrupts one written page in so many.
const CORRUPT_EVERY: NonZeroU64 = NonZeroU64::new(16).unwrap();

/// Swap in this file, whose system calls go wrong as the items say. With its rule broken, one byte of
/// every sixteenth page written is changed on the way, which reads must catch.
pub(super) fn on_file(file: FileSwap, lab: &Lab) -> Box<dyn SwapBackend> {
    let file = file.through(|file| InjectingFile::new(file, lab.clone()));
    if lab.is_broken(SWAP_CORRUPT) {
        Box::new(CorruptingBackend::new(file, CORRUPT_EVERY))
    } else {
        Box::new(file)
    }
}

/// The back end, with reads and writes that fail, if an item says so.
pub(super) fn around(inner: Box<dyn SwapBackend>, lab: &Lab) -> Box<dyn SwapBackend> {
    if lab.has(&[SWAP_READ, SWAP_WRITE]) {
        Box::new(InjectingBackend { inner, lab: lab.clone() })
    } else {
        inner
    }
}

/// A back end whose reads and writes fail as the items say.
struct InjectingBackend {
    inner: Box<dyn SwapBackend>,
    lab: Lab,
}

impl InjectingBackend {
    /// Leaves the first half of the first page written, as a disk might.
    fn tear(&self, first: SwapSlot, pages: &[u8]) -> io::Result<()> {
        let mut torn = [0; PAGE_SIZE];
        self.inner.read(first, &mut torn)?;
        let half = pages.len().min(PAGE_SIZE / 2);
        torn[..half].copy_from_slice(&pages[..half]);
        self.inner.write(first, &torn)
    }
}

impl SwapBackend for InjectingBackend {
    fn read(&self, slot: SwapSlot, page: &mut [u8; PAGE_SIZE]) -> io::Result<()> {
        match self.lab.errno(SWAP_READ) {
            Some(errno) => Err(errno.into()),
            None => self.inner.read(slot, page),
        }
    }

    fn write(&self, first: SwapSlot, pages: &[u8]) -> io::Result<()> {
        match self.lab.errno(SWAP_WRITE) {
            Some(errno) => {
                self.tear(first, pages)?;
                Err(errno.into())
            }
            None => self.inner.write(first, pages),
        }
    }

    fn slots(&self) -> u32 {
        self.inner.slots()
    }

    fn is_in_memory(&self) -> bool {
        self.inner.is_in_memory()
    }
}

/// A file whose system calls write less than they were given, or are interrupted.
#[derive(Debug)]
pub(crate) struct InjectingFile<F> {
    inner: F,
    lab: Lab,
}

impl<F> InjectingFile<F> {
    pub(crate) fn new(inner: F, lab: Lab) -> Self {
        Self { inner, lab }
    }
}

/// One system call each; the loops around them are std's, the same as for a file without faults.
impl<F: FileExt> FileExt for InjectingFile<F> {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        interrupted_or(&self.lab, || self.inner.read_at(buf, offset))
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize> {
        let part = if self.lab.strikes(SHORT_WRITE) {
            // Not whole pages, not whole sectors; never nothing, which would mean the end.
            &buf[..(buf.len() / 3).max(1).min(buf.len())]
        } else {
            buf
        };
        interrupted_or(&self.lab, || self.inner.write_at(part, offset))
    }
}
