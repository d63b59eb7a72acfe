//! Errors that are the host's limits: which, for the end of a sentence, and whether an error is one.
//!
//! Guarantee: what the host cannot give is told from what is broken by the kernel's error alone, wherever
//! in a chain of causes it stands; a limit is named as [`limits::behind`](super::limits::behind) says.

use std::error::Error;
use std::io;

use nix::errno::Errno;

use super::limits::{HostLimits, behind};
use crate::host_mm::InjectionPlan;
use crate::vmm::VmError;

/// The limits that may be behind an error, as the rest of its sentence; empty if there are none.
pub(super) fn of(error: &(dyn Error + 'static)) -> String {
    errno_of(error).map_or_else(String::new, |errno| {
        let behind = behind(errno, &HostLimits::at_worst(), 0);
        behind.map_or_else(String::new, |sentence| format!("; {sentence}"))
    })
}

/// What an error has to say of the host, if it is that the host has no more of something: memory,
/// threads, open files, room in a file system. Nothing is wrong then with the guest, nor with what runs
/// it. Never where errors are made on purpose.
pub(super) fn host_limit<E: Error + 'static>(error: &E, plan: &InjectionPlan) -> Option<String> {
    let error: &(dyn Error + 'static) = error;
    let is_limit = match errno_of(error)? {
        Errno::ENOMEM | Errno::EMFILE | Errno::ENFILE => true,
        Errno::ENOSPC | Errno::EDQUOT | Errno::EFBIG => true,
        // Of a thread that cannot be had; what a vCPU meets is another matter.
        Errno::EAGAIN => !matches!(error.downcast_ref(), Some(VmError::Guest { .. })),
        _ => false,
    };
    (is_limit && !plan.may_fail()).then(|| format!("{error}{}", of(error)))
}

fn errno_of(error: &(dyn Error + 'static)) -> Option<Errno> {
    anyhow::Chain::new(error).find_map(|cause| {
        let of_io = cause.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error);
        of_io.map(Errno::from_raw).or_else(|| cause.downcast_ref::<Errno>().copied())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::{Gfn, SwapSlot};
    use crate::cli::inject::parse_injection;
    use crate::direct_mmu::DirectError;
    use crate::host_mm::MmError;
    use crate::host_mm::swap::{SwapError, SwapOp};
    use crate::sys::uffd::UffdError;
    use crate::sys::uffd_window::InstallError;
    use crate::vmm::linux::LinuxError;
    use crate::vmm::{GuestError, MapError};

    fn os(errno: i32) -> io::Error {
        io::Error::from_raw_os_error(errno)
    }

    #[test]
    fn the_errno_is_found_under_the_sentences() {
        let error = MmError::Host { what: "a mapping", source: os(libc::EMFILE) };
        assert_eq!(errno_of(&VmError::Host(error)), Some(Errno::EMFILE));
        assert_eq!(errno_of(&os(libc::EIO)), Some(Errno::EIO));
        for source in [os(libc::EMFILE), os(libc::ENOMEM)] {
            let errno = source.raw_os_error().map(Errno::from_raw);
            let mapped = MapError { what: "pinned window", bytes: 4096, source };
            assert_eq!(errno_of(&VmError::from(mapped)), errno);
        }
        let copied = VmError::Copy { what: "pinned window", source: os(libc::ENOMEM) };
        assert_eq!(errno_of(&copied), Some(Errno::ENOMEM));
        let staging = LinuxError::Staging { bytes: 4096, source: os(libc::ENOMEM) };
        assert_eq!(errno_of(&VmError::from(staging)), Some(Errno::ENOMEM));
        assert_eq!(errno_of(&VmError::NotInTime), None);
    }

    #[test]
    fn what_the_host_cannot_give_is_told_from_what_is_broken() {
        let plan = InjectionPlan::default();
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
        let full = SwapError::NoSpace { slot, source: os(libc::ENOSPC) };
        let of_window = |error| VmError::Paging(Box::new(error));
        let gfn = Gfn::new(1);
        let page = |errno| {
            let source = MmError::Host { what: "it", source: os(errno) };
            of_window(DirectError::Page { gfn, source })
        };
        let install = |errno| {
            let source = InstallError::Refused(Errno::from_raw(errno));
            of_window(DirectError::Install { gfn, source })
        };
        let events = |errno| of_window(UffdError::Read(Errno::from_raw(errno)).into());
        for error in [
            VmError::Thread { vcpu: 1, source: os(libc::EAGAIN) },
            host(libc::ENOMEM),
            host(libc::EMFILE),
            VmError::Host(full.into()),
            of_swap(libc::EFBIG),
            of_guest(libc::ENOMEM),
            page(libc::ENOMEM),
            install(libc::ENOMEM),
            events(libc::ENOMEM),
        ] {
            let said = host_limit(&error, &plan).unwrap_or_else(|| panic!("{error}"));
            assert!(said.starts_with(&error.to_string()), "{said}");
        }
        for error in [
            host(libc::EFAULT),
            of_swap(libc::EIO),
            of_guest(libc::EAGAIN),
            of_guest(libc::EFAULT),
            page(libc::EFAULT),
            install(libc::EINVAL),
            events(libc::EBADF),
            VmError::NotRunning,
        ] {
            assert_eq!(host_limit(&error, &plan), None);
        }
        // What was asked for is no limit.
        let items = vec![parse_injection("swap-write=ENOSPC@1").unwrap()];
        let plan = InjectionPlan { items, ..plan };
        assert_eq!(host_limit(&of_swap(libc::ENOSPC), &plan), None);
    }
}
