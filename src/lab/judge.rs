//! What an error says of a run: that the host has no more of something, that what was asked for came to pass,
//! or that something is broken.
//!
//! Guarantee: what the host cannot give is told from what is broken by the kernel's error alone, wherever
//! in a chain of causes it stands; and an error that was injected is never taken for the host's.

use std::error::Error;
use std::io;

use nix::errno::Errno;

use crate::export_rmap::lab::With;
use crate::host_mm::hooks::{SWAP_READ, SWAP_WRITE};
use crate::host_mm::swap::{SwapError, SwapOp};
use crate::host_mm::{InjectionPlan, MmError};
use crate::vmm::VmError;

/// The limits that may be behind an error, as the rest of its sentence; empty if there are none.
pub type Advice = fn(&(dyn Error + 'static)) -> String;

/// See the module's documentation.
#[derive(Clone, Debug)]
pub struct Judge {
    injected: InjectionPlan,
    advice: Advice,
}

impl Judge {
    /// Of a run into which this is injected.
    #[must_use]
    pub fn new(injected: InjectionPlan, advice: Advice) -> Self {
        Self { injected, advice }
    }

    /// What an error has to say of the host, if it is that the host has no more of something: memory,
    /// threads, open files, room in a file system. Nothing is wrong then with the guest, nor with what runs
    /// it. Never where errors are made on purpose.
    pub(super) fn host_limit<E: Error + 'static>(&self, error: &E) -> Option<String> {
        let error: &(dyn Error + 'static) = error;
        let is_limit = match errno_of(error)? {
            Errno::ENOMEM | Errno::EMFILE | Errno::ENFILE => true,
            Errno::ENOSPC | Errno::EDQUOT | Errno::EFBIG => true,
            // Of a thread that cannot be had; what a vCPU meets is another matter.
            Errno::EAGAIN => !matches!(error.downcast_ref(), Some(VmError::Guest { .. })),
            _ => false,
        };
        (is_limit && !self.injected.may_fail()).then(|| format!("{error}{}", (self.advice)(error)))
    }

    /// Whether an error is one that a run has to live with: nothing is wrong.
    pub(super) fn is_expected(&self, error: &MmError) -> bool {
        is_lack_of_swap(error) || self.is_injected(error)
    }

    /// Whether swap failed as it was told to: the page stayed where it was, and that is what was asked
    /// for.
    fn is_injected(&self, error: &MmError) -> bool {
        let MmError::Swap(SwapError::Io { op, source, .. }) = error else {
            return false;
        };
        let is_it = |errno| source.raw_os_error() == Some(errno as i32);
        self.injected.items.iter().any(|item| match (item.fault.kind, item.fault.with) {
            (SWAP_WRITE, With::Errno(errno)) => *op == SwapOp::Write && is_it(errno),
            (SWAP_READ, With::Errno(errno)) => *op == SwapOp::Read && is_it(errno),
            _ => false,
        })
    }
}

/// Whether swap was just too small for what was asked: the page stayed, nothing is wrong.
fn is_lack_of_swap(error: &MmError) -> bool {
    matches!(error, MmError::Swap(SwapError::Full { .. } | SwapError::NoSpace { .. }))
}

/// The kernel's error in an error's chain of causes, if there is one.
#[must_use]
pub fn errno_of(error: &(dyn Error + 'static)) -> Option<Errno> {
    let mut next = Some(error);
    while let Some(cause) = next {
        let of_io = cause.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error);
        let errno = of_io.map(Errno::from_raw).or_else(|| cause.downcast_ref::<Errno>().copied());
        if errno.is_some() {
            return errno;
        }
        next = cause.source();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::{Gfn, SwapSlot};
    use crate::direct_mmu::DirectError;
    use crate::host_mm::{Injection, When};
    use crate::sys::uffd::UffdError;
    use crate::sys::uffd_window::InstallError;
    use crate::vmm::linux::LinuxError;
    use crate::vmm::{GuestError, MapError};

    fn os(errno: Errno) -> io::Error {
        errno.into()
    }

    fn judge(items: Vec<Injection>) -> Judge {
        Judge::new(InjectionPlan { items, ..InjectionPlan::default() }, |_| {
            "; free some".to_owned()
        })
    }

    #[test]
    fn the_errno_is_found_under_the_sentences() {
        let error = MmError::Host { what: "a mapping", source: os(Errno::EMFILE) };
        assert_eq!(errno_of(&VmError::Host(error)), Some(Errno::EMFILE));
        assert_eq!(errno_of(&os(Errno::EIO)), Some(Errno::EIO));
        for errno in [Errno::EMFILE, Errno::ENOMEM] {
            let mapped = MapError { what: "pinned window", bytes: 4096, source: os(errno) };
            assert_eq!(errno_of(&VmError::from(mapped)), Some(errno));
        }
        let copied = VmError::Copy { what: "pinned window", source: os(Errno::ENOMEM) };
        assert_eq!(errno_of(&copied), Some(Errno::ENOMEM));
        let staging = LinuxError::Staging { bytes: 4096, source: os(Errno::ENOMEM) };
        assert_eq!(errno_of(&VmError::from(staging)), Some(Errno::ENOMEM));
        assert_eq!(errno_of(&VmError::NotInTime), None);
    }

    #[test]
    fn what_the_host_cannot_give_is_told_from_what_is_broken() {
        let slot = SwapSlot::new(1).unwrap();
        let host = |errno| VmError::Host(MmError::Host { what: "it", source: os(errno) });
        let of_swap = |errno| {
            let op = SwapOp::Write;
            VmError::Host(SwapError::Io { op, slot, source: os(errno) }.into())
        };
        let of_guest = |errno| {
            let source = GuestError::Run(os(errno));
            VmError::Guest { vcpu: 0, rip: 0, source }
        };
        let full = SwapError::NoSpace { slot, source: os(Errno::ENOSPC) };
        let of_window = |error| VmError::Paging(Box::new(error));
        let gfn = Gfn::new(1);
        let page = |errno| {
            let source = MmError::Host { what: "it", source: os(errno) };
            of_window(DirectError::Page { gfn, source })
        };
        let install =
            |errno| of_window(DirectError::Install { gfn, source: InstallError::Refused(errno) });
        let events = |errno| of_window(UffdError::Read(errno).into());
        for error in [
            VmError::Thread { vcpu: 1, source: os(Errno::EAGAIN) },
            host(Errno::ENOMEM),
            host(Errno::EMFILE),
            VmError::Host(full.into()),
            of_swap(Errno::EFBIG),
            of_guest(Errno::ENOMEM),
            page(Errno::ENOMEM),
            install(Errno::ENOMEM),
            events(Errno::ENOMEM),
        ] {
            let said = judge(Vec::new()).host_limit(&error);
            assert_eq!(said, Some(format!("{error}; free some")));
        }
        for error in [
            host(Errno::EFAULT),
            of_swap(Errno::EIO),
            of_guest(Errno::EAGAIN),
            of_guest(Errno::EFAULT),
            page(Errno::EFAULT),
            install(Errno::EINVAL),
            events(Errno::EBADF),
            VmError::NotRunning,
        ] {
            assert_eq!(judge(Vec::new()).host_limit(&error), None);
        }
        // What was asked for is no limit.
        let item = Injection { fault: SWAP_WRITE.failing(Errno::ENOSPC), when: When::ALWAYS };
        assert_eq!(judge(vec![item]).host_limit(&of_swap(Errno::ENOSPC)), None);
    }

    #[test]
    fn only_the_failure_that_was_injected_is_expected() {
        let slot = SwapSlot::new(0).unwrap();
        let failed = |op, errno| MmError::Swap(SwapError::Io { op, slot, source: os(errno) });
        let item = Injection { fault: SWAP_WRITE.failing(Errno::EIO), when: When::ALWAYS };
        let injected = judge(vec![item]);
        assert!(injected.is_expected(&failed(SwapOp::Write, Errno::EIO)));
        assert!(!injected.is_expected(&failed(SwapOp::Write, Errno::ENOMEM)));
        assert!(!injected.is_expected(&failed(SwapOp::Read, Errno::EIO)));
        assert!(!injected.is_expected(&MmError::TooManyObjects));
        assert!(!judge(Vec::new()).is_expected(&failed(SwapOp::Write, Errno::EIO)));
        assert!(judge(Vec::new()).is_expected(&MmError::Swap(SwapError::Full { slots: 1 })));
    }
}
