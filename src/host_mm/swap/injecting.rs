//! Swap that goes wrong: around a back end whole operations fail, under the file single system
//! calls do.

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use nix::errno::Errno;

use super::SwapBackend;
use crate::addr::{PAGE_SIZE, SwapSlot};
use crate::host_mm::inject::{HostFault, Injector};

/// A back end whose reads and writes fail as the items say.
pub(super) struct InjectingBackend {
    inner: Box<dyn SwapBackend>,
    injector: Arc<Injector>,
}

impl InjectingBackend {
    /// The back end itself, if no item concerns it.
    pub(super) fn around(
        inner: Box<dyn SwapBackend>,
        injector: &Arc<Injector>,
    ) -> Box<dyn SwapBackend> {
        let is_concerned =
            |fault| matches!(fault, HostFault::SwapRead(_) | HostFault::SwapWrite(_));
        if !injector.has(is_concerned) {
            return inner;
        }
        Box::new(Self { inner, injector: injector.clone() })
    }

    /// Leaves the first half of the first page written, as a disk might.
    fn tear(&self, first: SwapSlot, pages: &[u8]) -> io::Result<()> {
        let mut torn = [0; PAGE_SIZE];
        self.inner.read(first, &mut torn)?;
        let half = pages.len().min(PAGE_SIZE / 2);
        torn[..half].copy_from_slice(&pages[..half]);
        self.inner.write(first, &torn)
    }
}

fn read_fault(fault: HostFault) -> Option<Errno> {
    if let HostFault::SwapRead(errno) = fault { Some(errno) } else { None }
}

fn write_fault(fault: HostFault) -> Option<Errno> {
    if let HostFault::SwapWrite(errno) = fault { Some(errno) } else { None }
}

impl SwapBackend for InjectingBackend {
    fn read(&self, slot: SwapSlot, page: &mut [u8; PAGE_SIZE]) -> io::Result<()> {
        match self.injector.strike(read_fault) {
            Some(errno) => Err(errno.into()),
            None => self.inner.read(slot, page),
        }
    }

    fn write(&self, first: SwapSlot, pages: &[u8]) -> io::Result<()> {
        match self.injector.strike(write_fault) {
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
pub(in crate::host_mm) struct InjectingFile<F> {
    inner: F,
    injector: Arc<Injector>,
}

impl<F> InjectingFile<F> {
    pub(in crate::host_mm) fn new(inner: F, injector: Arc<Injector>) -> Self {
        Self { inner, injector }
    }
}

/// One system call each; the loops around them are std's, the same as for a file without faults.
impl<F: FileExt> FileExt for InjectingFile<F> {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.injector.interrupted_or(|| self.inner.read_at(buf, offset))
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize> {
        let part = if self.injector.strikes(HostFault::ShortWrite) {
            // Not whole pages, not whole sectors; never nothing, which would mean the end.
            &buf[..(buf.len() / 3).max(1).min(buf.len())]
        } else {
            buf
        };
        self.injector.interrupted_or(|| self.inner.write_at(part, offset))
    }
}
