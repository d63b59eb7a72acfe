//! Guest memory for unit tests and fuzzing: a flat range without translation, with holes.

use std::cell::RefCell;
use std::collections::HashSet;

use crate::addr::{Gpa, Gva, PAGE_SIZE_U64};
use crate::shadow_mmu::{Access, PagingContext};

use super::memory::{AccessError, VirtualMemory, is_usable};

/// Bytes of the flat range, from 0.
const BYTES: usize = 0x10_000;

/// See the module's documentation.
pub(crate) struct FakeMemory {
    bytes: RefCell<Vec<u8>>,
    missing: HashSet<u64>,
    read_only: HashSet<u64>,
}

impl FakeMemory {
    pub(crate) fn new() -> Self {
        Self {
            bytes: RefCell::new(vec![0; BYTES]),
            missing: HashSet::new(),
            read_only: HashSet::new(),
        }
    }

    /// Takes the page of `gva` away.
    pub(crate) fn unmap(&mut self, gva: u64) {
        self.missing.insert(gva / PAGE_SIZE_U64);
    }

    /// Makes the page of `gva` read-only.
    pub(crate) fn protect(&mut self, gva: u64) {
        self.read_only.insert(gva / PAGE_SIZE_U64);
    }

    pub(crate) fn put(&self, gva: u64, bytes: &[u8]) {
        let start = usize::try_from(gva).unwrap();
        self.bytes.borrow_mut()[start..start + bytes.len()].copy_from_slice(bytes);
    }

    pub(crate) fn put_words(&self, gva: u64, words: &[u64]) {
        for (address, word) in (gva..).step_by(8).zip(words) {
            self.put(address, &word.to_le_bytes());
        }
    }

    pub(crate) fn words<const N: usize>(&self, gva: u64) -> [u64; N] {
        let bytes = self.bytes.borrow();
        std::array::from_fn(|index| {
            let start = usize::try_from(gva).unwrap() + index * 8;
            u64::from_le_bytes(bytes[start..start + 8].try_into().unwrap())
        })
    }

    /// The bytes from `gva` on that code can be fetched from, at most `most`.
    pub(crate) fn fetchable(&self, gva: u64, most: u64) -> Vec<u8> {
        let bytes = self.bytes.borrow();
        (gva..gva.saturating_add(most))
            .map_while(|at| self.check(at, 1, Access::Execute).ok())
            .map(|at| bytes[at])
            .collect()
    }

    fn check(&self, gva: u64, len: usize, access: Access) -> Result<usize, AccessError> {
        if !is_usable(gva, len) {
            return Err(AccessError::BeyondLimit);
        }
        let code = match access {
            Access::Read => 0,
            Access::Write => 2,
            Access::Execute => 0x10,
        };
        for at in gva..gva + len as u64 {
            let page = at / PAGE_SIZE_U64;
            if self.missing.contains(&page) {
                return Err(AccessError::PageFault { gva: Gva::new(at), error_code: code });
            }
            if access == Access::Write && self.read_only.contains(&page) {
                return Err(AccessError::PageFault { gva: Gva::new(at), error_code: code | 1 });
            }
        }
        match usize::try_from(gva) {
            Ok(start) if start + len <= BYTES => Ok(start),
            _ => Err(AccessError::OutsideRam { gpa: Gpa::new(gva) }),
        }
    }
}

impl VirtualMemory for FakeMemory {
    fn read(
        &self,
        _: &PagingContext,
        gva: u64,
        buf: &mut [u8],
        access: Access,
    ) -> Result<(), AccessError> {
        let start = self.check(gva, buf.len(), access)?;
        buf.copy_from_slice(&self.bytes.borrow()[start..start + buf.len()]);
        Ok(())
    }

    fn write(&self, _: &PagingContext, gva: u64, buf: &[u8]) -> Result<(), AccessError> {
        let start = self.check(gva, buf.len(), Access::Write)?;
        self.bytes.borrow_mut()[start..start + buf.len()].copy_from_slice(buf);
        Ok(())
    }

    fn check_write(&self, _: &PagingContext, gva: u64, len: usize) -> Result<(), AccessError> {
        self.check(gva, len, Access::Write).map(|_| ())
    }
}
