//! Page faults handled in this process (`userfaultfd`), including those that KVM takes on behalf of
//! a vCPU.
//!
//! Guarantee of [`Tripwire`]: while it is armed, no thread and no vCPU gets to a page of the region
//! that the file behind it does not have; it waits, and the fault is reported with its place, until
//! it is released.
//!
//! A device file without rights falls back to the system call.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::raw::c_int;
use std::sync::Arc;

use bitflags::bitflags;
use linux_raw_sys::general as abi;
use linux_raw_sys::ioctl::UFFDIO_API;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use vm_memory::MmapRegion;

use crate::PAGE_SIZE;
use crate::uffd_call::{Message, RegisterMode, USERFAULTFD_IOC_NEW, Uffd};

const DEVICE: &str = "/dev/userfaultfd";

/// Why page faults cannot be handled here, or a step of it failed.
#[derive(Debug, thiserror::Error)]
pub enum UffdError {
    /// The kernel has no userfaultfd at all.
    #[error("this kernel has no userfaultfd: use one with CONFIG_USERFAULTFD")]
    NoSuchCall,
    /// Neither way to open one that sees kernel-mode faults is allowed.
    #[error(
        "no userfaultfd for kernel-mode faults: {DEVICE}: {device}, system call: {call}; run as \
         root or with CAP_SYS_PTRACE, or get read and write rights on {DEVICE}, or set sysctl \
         vm.unprivileged_userfaultfd=1"
    )]
    NotPermitted {
        /// Why the device did not work.
        device: io::Error,
        /// Why the system call did not work.
        call: Errno,
    },
    /// The kernel's userfaultfd is too old.
    #[error(
        "this kernel's userfaultfd lacks {missing:?} (it has {offered:?}): use a newer kernel, or do \
         without what needs it (--paging direct, --paranoid)"
    )]
    MissingFeatures {
        /// What is needed and not there.
        missing: Features,
        /// What is there.
        offered: Features,
    },
    /// The negotiation of features failed.
    #[error("cannot set up the userfaultfd: {0}")]
    SetUp(#[source] Errno),
    /// The region cannot be registered.
    #[error("cannot register {bytes:#x} bytes at {address:#x} with userfaultfd: {reason}")]
    Register {
        /// Address of the region in this process.
        address: usize,
        /// Bytes of the region.
        bytes: usize,
        /// What the kernel said.
        #[source]
        reason: Errno,
    },
    /// Waiting for faults failed.
    #[error("cannot wait for page faults: {0}")]
    Wait(#[source] Errno),
    /// Reading a fault failed.
    #[error("cannot read a page fault: {0}")]
    Read(#[source] Errno),
    /// An event that was not asked for.
    #[error("unexpected userfaultfd event {0}")]
    UnexpectedEvent(String),
    /// A fault could not be released.
    #[error("cannot release the fault at offset {offset:#x} of the region: {errno}")]
    Release {
        /// Byte offset in the region.
        offset: usize,
        /// What the kernel said; `EINVAL` also for an offset that is no page of the region.
        #[source]
        errno: Errno,
    },
}

bitflags! {
    /// What a kernel's userfaultfd can do (`UFFD_FEATURE_*`; ioctl_userfaultfd(2)).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Features: u64 {
        /// Write-protect faults on private memory (Linux 5.7).
        const WRITE_PROTECT = abi::UFFD_FEATURE_PAGEFAULT_FLAG_WP as u64;
        /// Fork events (4.11).
        const EVENT_FORK = abi::UFFD_FEATURE_EVENT_FORK as u64;
        /// `mremap` events (4.11).
        const EVENT_REMAP = abi::UFFD_FEATURE_EVENT_REMAP as u64;
        /// `madvise` events (4.11).
        const EVENT_REMOVE = abi::UFFD_FEATURE_EVENT_REMOVE as u64;
        /// Missing faults on huge-page files (4.11).
        const MISSING_HUGETLBFS = abi::UFFD_FEATURE_MISSING_HUGETLBFS as u64;
        /// Missing faults on shared memory (4.11).
        const MISSING_SHMEM = abi::UFFD_FEATURE_MISSING_SHMEM as u64;
        /// `munmap` events (4.11).
        const EVENT_UNMAP = abi::UFFD_FEATURE_EVENT_UNMAP as u64;
        /// SIGBUS instead of events (4.14).
        const SIGBUS = abi::UFFD_FEATURE_SIGBUS as u64;
        /// Faults name the thread (4.14).
        const THREAD_ID = abi::UFFD_FEATURE_THREAD_ID as u64;
        /// Minor faults on huge-page files (5.13).
        const MINOR_HUGETLBFS = abi::UFFD_FEATURE_MINOR_HUGETLBFS as u64;
        /// Minor faults on shared memory (5.14).
        const MINOR_SHMEM = abi::UFFD_FEATURE_MINOR_SHMEM as u64;
        /// Addresses not rounded to the page (5.18).
        const EXACT_ADDRESS = abi::UFFD_FEATURE_EXACT_ADDRESS as u64;
        /// Write-protect faults on shared memory (5.19).
        const WRITE_PROTECT_SHMEM = abi::UFFD_FEATURE_WP_HUGETLBFS_SHMEM as u64;
        /// Write protection of pages that are not there (6.4).
        const WRITE_PROTECT_UNPOPULATED = abi::UFFD_FEATURE_WP_UNPOPULATED as u64;
        /// Pages that raise SIGBUS (6.6).
        const POISON = abi::UFFD_FEATURE_POISON as u64;
        /// Write-protect faults that resolve themselves (6.7).
        const WRITE_PROTECT_ASYNC = abi::UFFD_FEATURE_WP_ASYNC as u64;
        /// Moving pages (6.8).
        const MOVE = abi::UFFD_FEATURE_MOVE as u64;
        /// Later kernels know more.
        const _ = !0;
    }
}

/// What this kernel's userfaultfd can do, asked without any privilege.
///
/// # Errors
///
/// [`UffdError::NoSuchCall`], or [`UffdError::NotPermitted`] where even a descriptor for user-mode
/// faults is refused.
pub fn uffd_features() -> Result<Features, UffdError> {
    let descriptor = match open_by_call(abi::UFFD_USER_MODE_ONLY.cast_signed()) {
        // A kernel before 5.11 does not know the flag.
        Err(Errno::EINVAL) => open_by_call(0),
        other => other,
    };
    let descriptor = match descriptor {
        Ok(descriptor) => descriptor,
        Err(_) => open_for_kernel_faults()?,
    };
    negotiate(&descriptor, Features::empty())
}

/// Opens a userfaultfd that handles faults from kernel mode too (KVM's are).
pub(super) fn open_for_kernel_faults() -> Result<OwnedFd, UffdError> {
    // Rights on the device are given per user or group, so it goes first.
    let device = match open_by_device() {
        Ok(descriptor) => return Ok(descriptor),
        Err(error) => error,
    };
    match open_by_call(0) {
        Ok(descriptor) => Ok(descriptor),
        Err(Errno::ENOSYS) => Err(UffdError::NoSuchCall),
        Err(call) => Err(UffdError::NotPermitted { device, call }),
    }
}

fn open_by_device() -> io::Result<OwnedFd> {
    let device = OpenOptions::new().read(true).write(true).open(DEVICE)?;
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: USERFAULTFD_IOC_NEW takes an integer and touches no memory of ours.
    let raw = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW.into(), flags) };
    let raw = Errno::result(raw)?;
    // SAFETY: the call succeeded, so this is a new descriptor that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

fn open_by_call(extra_flags: c_int) -> Result<OwnedFd, Errno> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | extra_flags;
    // SAFETY: userfaultfd takes an integer and touches no memory of ours.
    let raw = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    let raw = c_int::try_from(Errno::result(raw)?).map_err(|_| Errno::EBADF)?;
    // SAFETY: the call succeeded, so this is a new descriptor that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// `UFFDIO_API`: enables `wanted` and returns what the kernel offers.
pub(super) fn negotiate(descriptor: &OwnedFd, wanted: Features) -> Result<Features, UffdError> {
    let mut api = abi::uffdio_api { api: abi::UFFD_API.into(), features: wanted.bits(), ioctls: 0 };
    // SAFETY: the ioctl reads and writes one uffdio_api, which `api` is, valid for the call.
    let result = unsafe { libc::ioctl(descriptor.as_raw_fd(), UFFDIO_API.into(), &raw mut api) };
    Errno::result(result).map_err(UffdError::SetUp)?;
    Ok(Features::from_bits_retain(api.features))
}

/// A touch of a page that the file does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Byte offset of the page in the region.
    pub offset: usize,
    /// Whether the touch was a write.
    pub write: bool,
    /// Kernel id of the thread that waits; for a vCPU its thread in `KVM_RUN`.
    pub thread: libc::pid_t,
}

/// Catches every touch of a hole in a shared memory region. Dropping it lets the waiting threads go
/// on (they then get a page of zeros from the kernel as if it had never been there).
///
/// A thread that touches a hole sleeps until another one releases the fault: the thread that calls
/// [`next`](Self::next) must not touch the region itself.
#[derive(Debug)]
pub struct Tripwire {
    // Closed first: the kernel then forgets the region before it is unmapped.
    uffd: Uffd,
    region: Arc<MmapRegion>,
    interrupt: EventFd,
}

impl Tripwire {
    /// Registers the whole region, which must map a memfd (or another file in shared memory).
    ///
    /// # Errors
    ///
    /// [`UffdError::NotPermitted`] and [`UffdError::NoSuchCall`] say what to do;
    /// [`UffdError::MissingFeatures`] before Linux 4.14; [`UffdError::Register`] for memory of
    /// another kind, or registered already.
    pub fn arm(region: Arc<MmapRegion>) -> Result<Self, UffdError> {
        let needed = Features::MISSING_SHMEM | Features::THREAD_ID;
        let offered = uffd_features()?;
        if !offered.contains(needed) {
            return Err(UffdError::MissingFeatures {
                missing: needed.difference(offered),
                offered,
            });
        }
        let descriptor = open_for_kernel_faults()?;
        negotiate(&descriptor, needed)?;
        let interrupt = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(UffdError::SetUp)?;
        let (address, bytes) = (region.as_ptr(), region.size());
        let uffd = Uffd::new(descriptor);
        uffd.register(address.cast(), bytes, RegisterMode::MISSING)
            .map_err(|reason| UffdError::Register { address: address.addr(), bytes, reason })?;
        Ok(Self { uffd, region, interrupt })
    }

    /// Waits for the next fault; `None` after [`interrupt`](Self::interrupt), once no fault is left
    /// to report.
    ///
    /// # Errors
    ///
    /// [`UffdError::Wait`], [`UffdError::Read`], [`UffdError::UnexpectedEvent`].
    pub fn next(&self) -> Result<Option<Fault>, UffdError> {
        loop {
            let mut told = Vec::new();
            self.uffd.read::<1>(&mut told).map_err(UffdError::Read)?;
            if let Some(message) = told.first() {
                return self.decode(message).map(Some);
            }
            match self.interrupt.read() {
                Ok(_) => return Ok(None),
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                Err(errno) => return Err(UffdError::Wait(errno)),
            }
            let mut fds = [
                PollFd::new(self.uffd.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.interrupt.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(UffdError::Wait(errno)),
            }
        }
    }

    /// Makes one call of [`next`](Self::next), running or to come, return `None`.
    ///
    /// # Errors
    ///
    /// The errno of the write to an eventfd; a call that is already due is no error.
    pub fn interrupt(&self) -> io::Result<()> {
        match self.interrupt.write(1) {
            Ok(_) | Err(Errno::EAGAIN) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Fills the page at byte `offset` with zeros and lets its waiters go on.
    ///
    /// # Errors
    ///
    /// [`UffdError::Release`]; a page that has been filled meanwhile is no error.
    pub fn release_zero(&self, offset: usize) -> Result<(), UffdError> {
        let page = self.page(offset)?;
        // SAFETY: the page lies inside the region, which this value keeps mapped. The call fills a
        // hole and never changes a page that is there; in shared memory that is a write like any
        // other party's.
        match unsafe { self.uffd.zero_page(page) } {
            Ok(()) => Ok(()),
            Err(errno) => self.settle(offset, errno),
        }
    }

    /// Fills the page at byte `offset` with `content` and lets its waiters go on.
    ///
    /// # Errors
    ///
    /// [`UffdError::Release`]; a page that has been filled meanwhile (with whatever) is no error.
    pub fn release_copy(&self, offset: usize, content: &[u8; PAGE_SIZE]) -> Result<(), UffdError> {
        let page = self.page(offset)?;
        // SAFETY: as in `release_zero`.
        match unsafe { self.uffd.copy_page(page, content) } {
            Ok(()) => Ok(()),
            Err(errno) => self.settle(offset, errno),
        }
    }

    /// The end of a release that the kernel refused: EEXIST means that the page is there, but wakes
    /// nobody.
    fn settle(&self, offset: usize, errno: Errno) -> Result<(), UffdError> {
        if errno != Errno::EEXIST {
            return Err(UffdError::Release { offset, errno });
        }
        let woken = self.uffd.wake(self.page(offset)?, PAGE_SIZE);
        woken.map_err(|errno| UffdError::Release { offset, errno })
    }

    /// Address of the page at byte `offset`, which must be one of the region's.
    fn page(&self, offset: usize) -> Result<*mut libc::c_void, UffdError> {
        if !offset.is_multiple_of(PAGE_SIZE) || offset >= self.region.size() {
            return Err(UffdError::Release { offset, errno: Errno::EINVAL });
        }
        Ok(self.region.as_ptr().wrapping_add(offset).cast())
    }

    fn decode(&self, message: &Message) -> Result<Fault, UffdError> {
        match *message {
            Message::Fault { address, write, thread, .. } => {
                let offset = address.wrapping_sub(self.region.as_ptr().addr());
                Ok(Fault { offset: offset & !(PAGE_SIZE - 1), write, thread })
            }
            other => Err(UffdError::UnexpectedEvent(format!("{other:?}"))),
        }
    }
}

#[cfg(test)]
#[path = "uffd_tests.rs"]
mod tests;
