//! Getting a vCPU out of `KVM_RUN`.
//!
//! Guarantee: after [`Kick::kick`] the target thread leaves `KVM_RUN`, and every later `KVM_RUN`
//! returns at once, until that thread itself says [`Kick::rearm`]. Nothing is lost between the
//! thread's last check and its `KVM_RUN`: `immediate_exit` is set first, the signal comes second
//! (api.rst, `immediate_exit`).

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;

use crate::addr::PAGE_SIZE;
use crate::sync::{Mutex, lock};
use crate::sys::signal::{KICK, KickSignal, KickTarget};
use crate::vmm::kvm::device::KvmError;

/// What a [`Gate`](super::gate::Gate) needs of a vCPU.
pub(in crate::vmm) trait Kick: Send + Sync {
    /// Makes the vCPU leave guest mode, and keeps it out until [`Self::rearm`].
    fn kick(&self);
    /// Called by the vCPU's own thread while it is out: the kicks so far are answered.
    fn rearm(&self);
    /// The calling thread is the vCPU's from now on: it is the one to get out.
    fn attach(&self) {}
    /// The calling thread, which was the vCPU's, is about to end: it must not be touched any more.
    fn detach(&self) {}
}

/// A second mapping of the first page of a vCPU's `kvm_run`, through which any thread may set
/// `immediate_exit`. It has its own lifetime: it stays valid after the vCPU is gone.
struct RunPage {
    start: NonNull<u8>,
}

// SAFETY: the page is only accessed through the atomic byte that `immediate_exit` returns.
#[allow(unsafe_code)]
unsafe impl Send for RunPage {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Sync for RunPage {}

impl RunPage {
    #[allow(unsafe_code)]
    fn map(vcpu: &VcpuFd) -> io::Result<Self> {
        // SAFETY: a fresh shared mapping at an address of the kernel's choice; it touches no
        // memory of ours. The vCPU's descriptor holds at least one page (`kvm_run` itself).
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGE_SIZE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        NonNull::new(start.cast()).map(|start| Self { start }).ok_or_else(io::Error::last_os_error)
    }

    #[allow(unsafe_code)]
    fn immediate_exit(&self) -> &AtomicU8 {
        let offset = std::mem::offset_of!(kvm_run, immediate_exit);
        // SAFETY: (1) in bounds: the field lies in the first bytes of the mapped page; (2) alive:
        // the mapping lives as long as `self`; (3) shared only with the kernel, which reads it
        // with READ_ONCE, and with the vCPU thread's own mapping, which never touches this byte
        // (`rearm` goes through here, too).
        unsafe { AtomicU8::from_ptr(self.start.as_ptr().add(offset)) }
    }
}

impl Drop for RunPage {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: `start` is the start of our own mapping of one page, and no reference into it
        // outlives `self`.
        unsafe { libc::munmap(self.start.as_ptr().cast(), PAGE_SIZE) };
    }
}

/// Kicks one vCPU thread.
pub(in crate::vmm) struct Kicker {
    page: RunPage,
    signal: KickSignal,
    /// The vCPU's thread while it lives.
    thread: Mutex<Option<KickTarget>>,
}

impl Kicker {
    /// A kicker for `vcpu`. Installs the signal handler once per process.
    pub(in crate::vmm) fn of(vcpu: &VcpuFd) -> Result<Self, KvmError> {
        let made = || {
            let signal = KickSignal::install()?;
            Ok(Self { page: RunPage::map(vcpu)?, signal, thread: Mutex::new(None) })
        };
        made().map_err(|source| KvmError::Request { request: "mmap of kvm_run", source })
    }

    /// The kernel's id of the vCPU's thread while it lives.
    pub(in crate::vmm) fn thread_id(&self) -> Option<libc::pid_t> {
        lock(&self.thread).map(KickTarget::thread_id)
    }
}

impl Kick for Kicker {
    fn kick(&self) {
        // Release: what the kicker decided before is visible to whoever sees the flag.
        self.page.immediate_exit().store(1, Ordering::Release);
        // The lock is held over the signal: the thread clears its entry under it before it ends.
        if let Some(thread) = *lock(&self.thread) {
            // A failure says that the thread has ended.
            let _ = thread.kick();
        }
    }

    fn rearm(&self) {
        self.page.immediate_exit().store(0, Ordering::Release);
    }

    fn attach(&self) {
        unblock_signal();
        *lock(&self.thread) = Some(self.signal.this_thread());
    }

    fn detach(&self) {
        *lock(&self.thread) = None;
    }
}

/// A vCPU thread inherits its creator's signal mask, which may block the signal.
fn unblock_signal() {
    // SAFETY: `set` is initialised by `sigemptyset` before use, and changing the calling thread's
    // own mask affects no memory.
    #[allow(unsafe_code)]
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, KICK);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut());
    }
}
