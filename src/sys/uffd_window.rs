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
use std::os::fd::AsFd;
use std::os::raw::c_void;
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll, ppoll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::time::TimeSpec;
use vm_memory::MmapRegion;

use crate::PAGE_SIZE;
use crate::uffd::{Features, UffdError, negotiate, open_for_kernel_faults, uffd_features};
use crate::uffd_call::{Message, RegisterMode, Uffd};

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
    Refused(#[source] Errno),
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
        let uffd = Uffd::new(descriptor);
        let window = Self { uffd, region, range, features: offered, interrupt };
        let (bytes, address) = (window.range.len(), window.at(window.range.start));
        if window.range.end > window.region.size() || bytes == 0 {
            return Err(UffdError::SetUp(Errno::EINVAL));
        }
        let mode = RegisterMode::MISSING | RegisterMode::MINOR | RegisterMode::WRITE_PROTECT;
        window.uffd.register(address, bytes, mode).map_err(|reason| UffdError::Register {
            address: address.addr(),
            bytes,
            reason,
        })?;
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
        let mut told = Vec::with_capacity(BATCH);
        self.uffd.read::<BATCH>(&mut told).map_err(UffdError::Read)?;
        for message in &told {
            events.push(self.decode(message)?);
        }
        Ok(())
    }

    fn decode(&self, message: &Message) -> Result<WindowEvent, UffdError> {
        let base = self.region.as_ptr().addr();
        let offset = |address: usize| address.wrapping_sub(base) & !(PAGE_SIZE - 1);
        // A message may be about more than the window.
        let part = |start: usize, end: usize| {
            let inside = |address: usize| {
                address.saturating_sub(base).clamp(self.range.start, self.range.end)
            };
            (inside(start), inside(end) - inside(start).min(inside(end)))
        };
        Ok(match *message {
            Message::Fault { address, .. } if !self.range.contains(&offset(address)) => {
                WindowEvent::Stray { address }
            }
            Message::Fault { address, write, protected, .. } => {
                WindowEvent::Fault { offset: offset(address), write, protected }
            }
            Message::Removed { start, end } => {
                let (offset, len) = part(start, end);
                WindowEvent::Removed { offset, len }
            }
            Message::Unmapped { start, end } => {
                let (offset, len) = part(start, end);
                WindowEvent::Unmapped { offset, len }
            }
            Message::Moved { from, len } => {
                let (offset, len) = part(from, from.saturating_add(len));
                WindowEvent::Moved { offset, len }
            }
            Message::Other(_) => {
                return Err(UffdError::UnexpectedEvent(format!("{message:?}")));
            }
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
        let start = self.checked(offset, len)?;
        // SAFETY: the range is one of the window's, which this value keeps mapped.
        let (mapped, result) = unsafe { self.uffd.map(start, len, protected) };
        match (result, usize::try_from(mapped)) {
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
        let start = self.checked(offset, len)?;
        // SAFETY: the range is one of the window's, which this value keeps mapped.
        Ok(unsafe { self.uffd.write_protect(start, len, protect) }?)
    }

    /// Wakes who waits for pages of the range, to look again.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn wake(&self, offset: usize, len: usize) -> Result<(), InstallError> {
        Ok(self.uffd.wake(self.checked(offset, len)?, len)?)
    }

    /// Gives the range up: who waits goes on, and touches are the kernel's from now on. Events that
    /// are due are still read.
    ///
    /// # Errors
    /// What the kernel says; a range that is not registered any more is no error.
    pub fn unregister(&self) -> Result<(), InstallError> {
        Ok(self.uffd.unregister(self.at(self.range.start), self.range.len())?)
    }

    fn at(&self, offset: usize) -> *mut c_void {
        self.region.as_ptr().wrapping_add(offset).cast()
    }

    /// Where the range begins, if it is whole pages of the window.
    fn checked(&self, offset: usize, len: usize) -> Result<*mut c_void, InstallError> {
        let inside = offset >= self.range.start
            && offset.checked_add(len).is_some_and(|end| end <= self.range.end);
        if !inside || !offset.is_multiple_of(PAGE_SIZE) || !len.is_multiple_of(PAGE_SIZE) {
            return Err(InstallError::Refused(Errno::EINVAL));
        }
        Ok(self.at(offset))
    }
}

#[cfg(test)]
#[path = "uffd_window_tests.rs"]
mod tests;
