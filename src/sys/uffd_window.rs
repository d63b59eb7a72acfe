//! A window: memory of a file that is mapped once more, and whose page-table entries this process
//! installs, protects and loses itself (`userfaultfd` with missing, minor and write-protect faults).
//!
//! Guarantee: while a [`Window`] is open, no thread and no vCPU gets to a page of its range that
//! [`install`](Window::install) did not map, nor writes one that it mapped write-protected; it waits,
//! and the fault is [read](Window::read) here. Nor does anyone in this process remove, unmap or move
//! a part of the range without that being read.
//!
//! The errnos that the protocol above must tell apart become values of [`InstallError`].

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, IntoRawFd};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll, ppoll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::time::TimeSpec;
use userfaultfd::{Event, EventBuffer, FaultKind, ReadWrite, RegisterMode, Uffd};
use userfaultfd_sys as abi;
use vm_memory::MmapRegion;

use crate::addr::PAGE_SIZE;
use crate::sys::uffd::{Features, UffdError, negotiate, open_for_kernel_faults, uffd_features};

/// Messages read in one call.
const BATCH: usize = 32;

/// What happened to a window. Offsets and lengths are bytes of the region, multiples of 4096.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WindowEvent {
    /// Somebody waits for a page.
    Fault {
        /// The page.
        offset: usize,
        /// Whether it is to be written.
        write: bool,
        /// Whether the page is mapped, but write-protected.
        protected: bool,
    },
    /// Somebody waits at an address outside the region: a part of the window was moved there.
    Stray {
        /// The address.
        address: usize,
    },
    /// `madvise(MADV_REMOVE)`, or `MADV_DONTNEED`, which the kernel does not tell from it: the content
    /// is about to go. Whoever called waits until this was read, and not longer.
    Removed {
        /// First byte.
        offset: usize,
        /// Bytes.
        len: usize,
    },
    /// `munmap`, or something else mapped over it.
    Unmapped {
        /// First byte.
        offset: usize,
        /// Bytes.
        len: usize,
    },
    /// `mremap`.
    Moved {
        /// First byte.
        offset: usize,
        /// Bytes.
        len: usize,
    },
}

/// Why the kernel did not change a window's page tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InstallError {
    /// `EEXIST`: the page is mapped already. Nobody was woken.
    #[error("the page is mapped already")]
    Mapped,
    /// `EAGAIN`: a removal is under way whose event has not been read. Read it, and try again.
    #[error("an event is to be read first")]
    Changing,
    /// `EFAULT`: the file has no such page.
    #[error("the file has no such page")]
    NoPage,
    /// `ENOENT`: the range is not (or no longer) a part of the window.
    #[error("the range is no part of the window any more")]
    NotRegistered,
    /// Anything else.
    #[error("the kernel refused: {0}")]
    Refused(Errno),
}

impl From<Errno> for InstallError {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::EEXIST => Self::Mapped,
            Errno::EAGAIN => Self::Changing,
            Errno::EFAULT => Self::NoPage,
            Errno::ENOENT => Self::NotRegistered,
            other => Self::Refused(other),
        }
    }
}

/// A range of a region, registered for all kinds of faults. Dropping it lets everybody go on who
/// waits for a page or for an event to be read.
#[derive(Debug)]
pub struct Window {
    // Closed first: the kernel then forgets the range before it is unmapped.
    uffd: Uffd,
    region: Arc<MmapRegion>,
    range: Range<usize>,
    features: Features,
    interrupt: EventFd,
}

impl Window {
    /// What every kernel must have.
    const NEEDED: Features = Features::MISSING_SHMEM
        .union(Features::MINOR_SHMEM)
        .union(Features::WRITE_PROTECT)
        .union(Features::WRITE_PROTECT_SHMEM)
        .union(Features::EVENT_REMOVE)
        .union(Features::EVENT_UNMAP)
        .union(Features::EVENT_REMAP);

    /// Registers a range of bytes of the region, which must map a memfd, with a userfaultfd of its
    /// own. `mask` are the features that may be used if the kernel has them.
    ///
    /// # Errors
    /// [`UffdError::NotPermitted`] and [`UffdError::NoSuchCall`] say what to do;
    /// [`UffdError::MissingFeatures`] before Linux 5.19; [`UffdError::Register`] for memory of
    /// another kind, or registered already.
    pub fn open(
        region: Arc<MmapRegion>,
        range: Range<usize>,
        mask: Features,
    ) -> Result<Self, UffdError> {
        let offered = uffd_features()? & mask;
        let missing = Self::NEEDED.difference(offered);
        if !missing.is_empty() {
            return Err(UffdError::MissingFeatures { missing, offered });
        }
        let descriptor = open_for_kernel_faults()?;
        negotiate(&descriptor, Self::NEEDED)?;
        let interrupt = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(UffdError::SetUp)?;
        // SAFETY: the descriptor is a userfaultfd with its features negotiated, and is handed over.
        let uffd = unsafe { Uffd::from_raw_fd(descriptor.into_raw_fd()) };
        let window = Self { uffd, region, range, features: offered, interrupt };
        let (bytes, address) = (window.range.len(), window.at(window.range.start));
        if window.range.end > window.region.size() || bytes == 0 {
            return Err(UffdError::SetUp(Errno::EINVAL));
        }
        let mode = RegisterMode::MISSING | RegisterMode::MINOR | RegisterMode::WRITE_PROTECT;
        window
            .uffd
            .register_with_mode(address, bytes, mode)
            .map_err(|reason| UffdError::Register { address: address.addr(), bytes, reason })?;
        Ok(window)
    }

    /// Whether a page can be installed write-protected in one step (`UFFDIO_CONTINUE_MODE_WP`). It
    /// has no feature bit; it came in Linux 6.4, as the one looked at did.
    #[must_use]
    pub const fn protects_at_install(&self) -> bool {
        self.features.contains(Features::WRITE_PROTECT_UNPOPULATED)
    }

    /// The bytes of the region that this window is.
    #[must_use]
    pub fn range(&self) -> Range<usize> {
        self.range.clone()
    }

    /// Reads what has happened, up to a batch of it, without waiting.
    ///
    /// # Errors
    /// [`UffdError::Read`]; [`UffdError::UnexpectedEvent`].
    pub fn read(&self, events: &mut Vec<WindowEvent>) -> Result<(), UffdError> {
        let mut buffer = EventBuffer::new(BATCH);
        let read = match self.uffd.read_events(&mut buffer) {
            Err(userfaultfd::Error::SystemError(errno)) if errno as i32 == libc::EINTR => {
                return Ok(());
            }
            other => other.map_err(UffdError::Read)?,
        };
        for event in read {
            events.push(self.decode(&event.map_err(UffdError::Read)?)?);
        }
        Ok(())
    }

    fn decode(&self, event: &Event) -> Result<WindowEvent, UffdError> {
        let offset = |address: *mut libc::c_void| {
            address.addr().wrapping_sub(self.region.as_ptr().addr()) & !(PAGE_SIZE - 1)
        };
        // An event may be about more than the window.
        let part = |start: *mut libc::c_void, end: usize| {
            let base = self.region.as_ptr().addr();
            let inside = |address: usize| {
                address.saturating_sub(base).clamp(self.range.start, self.range.end)
            };
            (inside(start.addr()), inside(end) - inside(start.addr()).min(inside(end)))
        };
        Ok(match event {
            Event::Pagefault { addr, .. } if !self.range.contains(&offset(*addr)) => {
                WindowEvent::Stray { address: addr.addr() }
            }
            Event::Pagefault { kind, rw, addr, .. } => WindowEvent::Fault {
                offset: offset(*addr),
                write: *rw == ReadWrite::Write,
                protected: *kind == FaultKind::WriteProtected,
            },
            Event::Remove { start, end } => {
                let (offset, len) = part(*start, end.addr());
                WindowEvent::Removed { offset, len }
            }
            Event::Unmap { start, end } => {
                let (offset, len) = part(*start, end.addr());
                WindowEvent::Unmapped { offset, len }
            }
            Event::Remap { from, len, .. } => {
                let (offset, len) = part(*from, from.addr().saturating_add(*len));
                WindowEvent::Moved { offset, len }
            }
            Event::Fork { .. } => return Err(UffdError::UnexpectedEvent(format!("{event:?}"))),
        })
    }

    /// Sleeps until there is something to read, an [`interrupt`](Self::interrupt) is due, or the
    /// time is up. Whether there is something to read.
    ///
    /// # Errors
    /// [`UffdError::Wait`].
    pub fn wait(&self, time: Option<Duration>) -> Result<bool, UffdError> {
        let mut fds = [
            PollFd::new(self.uffd.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.interrupt.as_fd(), PollFlags::POLLIN),
        ];
        // In nanoseconds, as `poll` has only milliseconds.
        match ppoll(&mut fds, time.map(TimeSpec::from), None) {
            Ok(_) => {}
            Err(Errno::EINTR) => return Ok(false),
            Err(errno) => return Err(UffdError::Wait(errno)),
        }
        let is_set = |fd: &PollFd<'_>| fd.any().unwrap_or(false);
        if is_set(&fds[1]) {
            // One interrupt, one wake-up; that another reader was faster is no error.
            let _ = self.interrupt.read();
        }
        Ok(is_set(&fds[0]))
    }

    /// Whether there is something to read, now.
    #[must_use]
    pub fn is_due(&self) -> bool {
        let mut fds = [PollFd::new(self.uffd.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// Ends one [`wait`](Self::wait), running or to come.
    ///
    /// # Errors
    /// The errno of the write to an eventfd; an interrupt that is already due is no error.
    pub fn interrupt(&self) -> io::Result<()> {
        match self.interrupt.write(1) {
            Ok(_) | Err(Errno::EAGAIN) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Maps pages that the file has (`UFFDIO_CONTINUE`), write-protected or not, and wakes who waits
    /// for them. Returns the number of bytes mapped, which may be less than `len` but not 0: what
    /// kept the rest from being mapped is not told.
    ///
    /// # Errors
    /// What kept the first page from being mapped.
    pub fn install(
        &self,
        offset: usize,
        len: usize,
        protected: bool,
    ) -> Result<usize, InstallError> {
        let mode = if protected { abi::UFFDIO_CONTINUE_MODE_WP } else { 0 };
        let mut argument =
            abi::uffdio_continue { range: self.checked(offset, len)?, mode, mapped: 0 };
        // SAFETY: the argument is the structure that this ioctl reads and writes. It changes page
        // tables of the range, which this value keeps mapped, so that they point to the pages of the
        // file that the mapping stands for: no content changes.
        let result = unsafe { self.ioctl(abi::UFFDIO_CONTINUE, &raw mut argument) };
        match (result, usize::try_from(argument.mapped)) {
            (Ok(()), _) => Ok(len),
            // The errno of a part is EAGAIN, too.
            (Err(_), Ok(mapped)) if mapped > 0 => Ok(mapped),
            (Err(errno), _) => Err(errno.into()),
        }
    }

    /// Makes mapped pages read-only, or (`protect` false) writable again, which wakes who waits for
    /// them (`UFFDIO_WRITEPROTECT`). Pages that are not mapped stay so.
    ///
    /// # Errors
    /// [`InstallError::Changing`], and what else the kernel says: a part may have been changed.
    pub fn write_protect(
        &self,
        offset: usize,
        len: usize,
        protect: bool,
    ) -> Result<(), InstallError> {
        let mode = if protect { abi::UFFDIO_WRITEPROTECT_MODE_WP } else { 0 };
        let mut argument = abi::uffdio_writeprotect { range: self.checked(offset, len)?, mode };
        // SAFETY: the argument is the structure that this ioctl reads. It changes rights in page
        // tables of the range, which this value keeps mapped; a write that loses its right waits.
        Ok(unsafe { self.ioctl(abi::UFFDIO_WRITEPROTECT, &raw mut argument) }?)
    }

    /// Wakes who waits for pages of the range, to look again.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn wake(&self, offset: usize, len: usize) -> Result<(), InstallError> {
        self.checked(offset, len)?;
        self.uffd.wake(self.at(offset), len).map_err(errno_of)
    }

    /// Gives the range up: who waits goes on, and touches are the kernel's from now on. Events that
    /// are due are still read.
    ///
    /// # Errors
    /// What the kernel says; a range that is not registered any more is no error.
    pub fn unregister(&self) -> Result<(), InstallError> {
        self.uffd.unregister(self.at(self.range.start), self.range.len()).map_err(errno_of)
    }

    fn at(&self, offset: usize) -> *mut libc::c_void {
        self.region.as_ptr().wrapping_add(offset).cast()
    }

    /// The range as the kernel wants it, if it is whole pages of the window.
    fn checked(&self, offset: usize, len: usize) -> Result<abi::uffdio_range, InstallError> {
        let inside = offset >= self.range.start
            && offset.checked_add(len).is_some_and(|end| end <= self.range.end);
        if !inside || !offset.is_multiple_of(PAGE_SIZE) || !len.is_multiple_of(PAGE_SIZE) {
            return Err(InstallError::Refused(Errno::EINVAL));
        }
        Ok(abi::uffdio_range { start: self.at(offset).addr() as u64, len: len as u64 })
    }

    /// # Safety
    /// The argument is valid, of the type of this request, and the request may do what it does.
    unsafe fn ioctl<T>(&self, request: u32, argument: *mut T) -> Result<(), Errno> {
        // SAFETY: by the contract of this function.
        let result = unsafe { libc::ioctl(self.uffd.as_raw_fd(), request.into(), argument) };
        Errno::result(result).map(drop)
    }
}

fn errno_of(error: userfaultfd::Error) -> InstallError {
    match error {
        userfaultfd::Error::SystemError(errno) => Errno::from_raw(errno as i32).into(),
        _ => InstallError::Refused(Errno::EIO),
    }
}

#[cfg(test)]
#[path = "uffd_window_tests.rs"]
mod tests;
