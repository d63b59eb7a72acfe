//! Guest memory that keeps a log of the accesses, and a host that may fail under one of them.

use std::cell::{Cell, RefCell};

use crate::host_mm::MmError;
use crate::shadow_mmu::{Access, PagingContext};
use crate::vmm::cpu::fake_memory::FakeMemory;
use crate::vmm::cpu::memory::{AccessError, VirtualMemory};

/// An access that was made.
#[derive(Clone, Debug)]
pub(super) struct Made {
    pub(super) access: Access,
    pub(super) gva: u64,
    pub(super) len: usize,
    /// Whether it succeeded.
    pub(super) done: bool,
}

/// See the module's documentation.
pub(super) struct LoggedMemory {
    pub(super) memory: FakeMemory,
    log: RefCell<Vec<Made>>,
    /// Accesses until the host fails; none for a host that does not.
    left: Cell<Option<u8>>,
}

impl LoggedMemory {
    pub(super) fn new(memory: FakeMemory, host_fails_after: Option<u8>) -> Self {
        Self { memory, log: RefCell::default(), left: Cell::new(host_fails_after) }
    }

    /// The accesses since the last call.
    pub(super) fn take_log(&self) -> Vec<Made> {
        self.log.take()
    }

    fn make(
        &self,
        access: Access,
        gva: u64,
        len: usize,
        make: impl FnOnce() -> Result<(), AccessError>,
    ) -> Result<(), AccessError> {
        let result = match self.left.get() {
            Some(0) => {
                let source = std::io::Error::from_raw_os_error(5);
                Err(AccessError::Host(MmError::Host { what: "fuzzed memory", source }))
            }
            left => {
                self.left.set(left.map(|left| left - 1));
                make()
            }
        };
        self.log.borrow_mut().push(Made { access, gva, len, done: result.is_ok() });
        result
    }
}

impl VirtualMemory for LoggedMemory {
    fn read(
        &self,
        paging: &PagingContext,
        gva: u64,
        buf: &mut [u8],
        access: Access,
    ) -> Result<(), AccessError> {
        self.make(access, gva, buf.len(), || self.memory.read(paging, gva, buf, access))
    }

    fn write(&self, paging: &PagingContext, gva: u64, buf: &[u8]) -> Result<(), AccessError> {
        self.make(Access::Write, gva, buf.len(), || self.memory.write(paging, gva, buf))
    }

    fn check_write(&self, paging: &PagingContext, gva: u64, len: usize) -> Result<(), AccessError> {
        self.make(Access::Read, gva, len, || self.memory.check_write(paging, gva, len))
    }
}
