//! The calls on a userfaultfd's descriptor and the messages that it reads (`ioctl_userfaultfd(2)`,
//! `linux/userfaultfd.h`), with the errnos as they are.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::raw::c_void;

use bitflags::bitflags;
use linux_raw_sys::general as abi;
use linux_raw_sys::ioctl as requests;
use nix::errno::Errno;

use crate::PAGE_SIZE;

/// `USERFAULTFD_IOC_NEW`, which linux-raw-sys lacks: `_IO(0xAA, 0x00)`, on `/dev/userfaultfd`.
pub(super) const USERFAULTFD_IOC_NEW: u32 = 0xaa00;
/// `UFFDIO_CONTINUE_MODE_WP`, which it lacks, too (Linux 6.4).
const UFFDIO_CONTINUE_MODE_WP: u64 = 1 << 1;
const UFFDIO_WRITEPROTECT_MODE_WP: u64 = 1 << 0;

// Of the same header: `_IOWR(0xAA, 0x3F, struct uffdio_api)`, and the size of a message.
const _: () = assert!(requests::UFFDIO_API == 0xc018_aa3f);
const _: () = assert!(size_of::<abi::uffd_msg>() == MESSAGE_BYTES);

const MESSAGE_BYTES: usize = 32;

bitflags! {
    /// The faults that are handled.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) struct RegisterMode: u64 {
        const MISSING = abi::UFFDIO_REGISTER_MODE_MISSING as u64;
        const MINOR = abi::UFFDIO_REGISTER_MODE_MINOR as u64;
        const WRITE_PROTECT = abi::UFFDIO_REGISTER_MODE_WP as u64;
    }
}

/// What a userfaultfd tells. Addresses are the process's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Message {
    /// Somebody waits for a page.
    Fault {
        address: usize,
        write: bool,
        /// The page is mapped, but write-protected.
        protected: bool,
        /// Kernel id of the thread that waits, if that was asked for.
        thread: i32,
    },
    /// `mremap`.
    Moved { from: usize, len: usize },
    /// `madvise(MADV_REMOVE or MADV_DONTNEED)`.
    Removed { start: usize, end: usize },
    /// `munmap`.
    Unmapped { start: usize, end: usize },
    /// Of a kind that nobody has asked for.
    Other(u8),
}

impl Message {
    /// `struct uffd_msg`: the kind in the first byte, what belongs to it from the eighth on.
    fn parse(bytes: &[u8; MESSAGE_BYTES]) -> Self {
        let word = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            u64::from_ne_bytes(word)
        };
        // Addresses and lengths in this process's own memory.
        let address = |at| usize::try_from(word(at)).unwrap_or(usize::MAX);
        match u32::from(bytes[0]) {
            abi::UFFD_EVENT_PAGEFAULT => {
                let is_set = |flag: u32| word(8) & u64::from(flag) != 0;
                let [a, b, c, d] = [bytes[24], bytes[25], bytes[26], bytes[27]];
                Self::Fault {
                    address: address(16),
                    write: is_set(abi::UFFD_PAGEFAULT_FLAG_WRITE),
                    protected: is_set(abi::UFFD_PAGEFAULT_FLAG_WP),
                    thread: i32::from_ne_bytes([a, b, c, d]),
                }
            }
            abi::UFFD_EVENT_REMAP => Self::Moved { from: address(8), len: address(24) },
            abi::UFFD_EVENT_REMOVE => Self::Removed { start: address(8), end: address(16) },
            abi::UFFD_EVENT_UNMAP => Self::Unmapped { start: address(8), end: address(16) },
            _ => Self::Other(bytes[0]),
        }
    }
}

/// A userfaultfd whose features were negotiated, and which does not block. Closing it lets everybody go
/// on who waits.
#[derive(Debug)]
pub(super) struct Uffd(OwnedFd);

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Uffd {
    pub(super) fn new(descriptor: OwnedFd) -> Self {
        Self(descriptor)
    }

    /// `UFFDIO_REGISTER`: from now on these faults of the range come here.
    pub(super) fn register(
        &self,
        start: *mut c_void,
        bytes: usize,
        mode: RegisterMode,
    ) -> Result<(), Errno> {
        let range = range(start, bytes);
        let mut register = abi::uffdio_register { range, mode: mode.bits(), ioctls: 0 };
        // SAFETY: the request reads and writes this structure. Faults of the range wait from then on,
        // and no content changes.
        unsafe { self.ioctl(requests::UFFDIO_REGISTER, &raw mut register) }
    }

    /// `UFFDIO_UNREGISTER`.
    pub(super) fn unregister(&self, start: *mut c_void, bytes: usize) -> Result<(), Errno> {
        let mut range = range(start, bytes);
        // SAFETY: the request reads this structure; no content changes.
        unsafe { self.ioctl(requests::UFFDIO_UNREGISTER, &raw mut range) }
    }

    /// `UFFDIO_WAKE`.
    pub(super) fn wake(&self, start: *mut c_void, bytes: usize) -> Result<(), Errno> {
        let mut range = range(start, bytes);
        // SAFETY: the request reads this structure; no content changes.
        unsafe { self.ioctl(requests::UFFDIO_WAKE, &raw mut range) }
    }

    /// `UFFDIO_ZEROPAGE` of one page, which wakes its waiters.
    ///
    /// # Safety
    /// The page is memory that the caller may fill where it is a hole.
    pub(super) unsafe fn zero_page(&self, page: *mut c_void) -> Result<(), Errno> {
        let range = range(page, PAGE_SIZE);
        let mut zero = abi::uffdio_zeropage { range, mode: 0, zeropage: 0 };
        // SAFETY: the request reads and writes this structure, and fills a hole that may be filled.
        unsafe { self.ioctl(requests::UFFDIO_ZEROPAGE, &raw mut zero) }
    }

    /// `UFFDIO_COPY` of one page, which wakes its waiters.
    ///
    /// # Safety
    /// As [`zero_page`](Self::zero_page).
    pub(super) unsafe fn copy_page(
        &self,
        page: *mut c_void,
        content: &[u8; PAGE_SIZE],
    ) -> Result<(), Errno> {
        let mut copy = abi::uffdio_copy {
            dst: page.addr() as u64,
            src: content.as_ptr().addr() as u64,
            len: PAGE_SIZE as u64,
            mode: 0,
            copy: 0,
        };
        // SAFETY: the request reads and writes this structure. The source is one page, valid for reads;
        // the destination is a hole that may be filled.
        unsafe { self.ioctl(requests::UFFDIO_COPY, &raw mut copy) }
    }

    /// `UFFDIO_CONTINUE`: maps what the file has. The bytes mapped, whatever the result: they may be a
    /// part.
    ///
    /// # Safety
    /// The range is memory that the caller keeps mapped.
    pub(super) unsafe fn map(
        &self,
        start: *mut c_void,
        bytes: usize,
        protected: bool,
    ) -> (u64, Result<(), Errno>) {
        let mode = if protected { UFFDIO_CONTINUE_MODE_WP } else { 0 };
        let mut map = abi::uffdio_continue { range: range(start, bytes), mode, mapped: 0 };
        // SAFETY: the request reads and writes this structure. It changes page tables of a range that
        // stays mapped, so that they point to the pages of the file that the mapping stands for: no
        // content changes.
        let result = unsafe { self.ioctl(requests::UFFDIO_CONTINUE, &raw mut map) };
        (u64::try_from(map.mapped).unwrap_or(0), result)
    }

    /// `UFFDIO_WRITEPROTECT`.
    ///
    /// # Safety
    /// As [`map`](Self::map).
    pub(super) unsafe fn write_protect(
        &self,
        start: *mut c_void,
        bytes: usize,
        protect: bool,
    ) -> Result<(), Errno> {
        let mode = if protect { UFFDIO_WRITEPROTECT_MODE_WP } else { 0 };
        let mut argument = abi::uffdio_writeprotect { range: range(start, bytes), mode };
        // SAFETY: the request reads this structure. It changes rights in page tables of a range that
        // stays mapped; a write that loses its right waits.
        unsafe { self.ioctl(requests::UFFDIO_WRITEPROTECT, &raw mut argument) }
    }

    /// Reads what has been told, up to `N` messages, without waiting: none if there is nothing, or if a
    /// signal came.
    pub(super) fn read<const N: usize>(&self, messages: &mut Vec<Message>) -> Result<(), Errno> {
        let mut bytes = [[0; MESSAGE_BYTES]; N];
        let count = match nix::unistd::read(&self.0, bytes.as_flattened_mut()) {
            Ok(count) => count / MESSAGE_BYTES,
            Err(Errno::EAGAIN | Errno::EINTR) => 0,
            Err(errno) => return Err(errno),
        };
        messages.extend(bytes[..count].iter().map(Message::parse));
        Ok(())
    }

    /// # Safety
    /// The argument is valid, of the type of this request, and the request may do what it does.
    unsafe fn ioctl<T>(&self, request: u32, argument: *mut T) -> Result<(), Errno> {
        // SAFETY: by the contract of this function.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), request.into(), argument) };
        Errno::result(result).map(drop)
    }
}

fn range(start: *mut c_void, bytes: usize) -> abi::uffdio_range {
    abi::uffdio_range { start: start.addr() as u64, len: bytes as u64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u32, words: [u64; 3]) -> Message {
        let mut bytes = [0; MESSAGE_BYTES];
        bytes[0] = u8::try_from(kind).unwrap();
        for (at, word) in (8..).step_by(8).zip(words) {
            bytes[at..at + 8].copy_from_slice(&word.to_ne_bytes());
        }
        Message::parse(&bytes)
    }

    #[test]
    fn messages_are_read_as_the_kernel_writes_them() {
        let fault = |flags: u32| message(abi::UFFD_EVENT_PAGEFAULT, [flags.into(), 0x7000, 42]);
        let read = Message::Fault { address: 0x7000, write: false, protected: false, thread: 42 };
        let write = Message::Fault { address: 0x7000, write: true, protected: false, thread: 42 };
        let guarded = Message::Fault { address: 0x7000, write: true, protected: true, thread: 42 };
        assert_eq!(fault(0), read);
        assert_eq!(fault(abi::UFFD_PAGEFAULT_FLAG_MINOR), read);
        assert_eq!(fault(abi::UFFD_PAGEFAULT_FLAG_WRITE), write);
        assert_eq!(fault(abi::UFFD_PAGEFAULT_FLAG_WRITE | abi::UFFD_PAGEFAULT_FLAG_WP), guarded);
        let words = [0x1000, 0x3000, 0x2000];
        let told = |kind| message(kind, words);
        assert_eq!(told(abi::UFFD_EVENT_REMAP), Message::Moved { from: 0x1000, len: 0x2000 });
        assert_eq!(told(abi::UFFD_EVENT_REMOVE), Message::Removed { start: 0x1000, end: 0x3000 });
        assert_eq!(told(abi::UFFD_EVENT_UNMAP), Message::Unmapped { start: 0x1000, end: 0x3000 });
        assert_eq!(told(abi::UFFD_EVENT_FORK), Message::Other(0x13));
    }
}
