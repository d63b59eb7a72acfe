//! Which limit of this process may be behind an error, for the end of its sentence.
//!
//! Guarantee: a limit is named only if the process has one, and if the kernel's error is one that it
//! gives where the limit is reached.

use std::io;

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit};

use super::values::{human_bytes, human_count};

/// A limit as shells set it.
struct Limit {
    resource: Resource,
    /// What the kernel says where it is reached.
    errors: &'static [Errno],
    /// What is limited, and the shell's command to change it.
    what: &'static str,
    command: &'static str,
    is_bytes: bool,
}

const LIMITS: [Limit; 4] = [
    Limit {
        resource: Resource::RLIMIT_AS,
        // A thread whose stack finds no room is EAGAIN.
        errors: &[Errno::ENOMEM, Errno::EAGAIN],
        what: "of address space",
        command: "ulimit -v",
        is_bytes: true,
    },
    Limit {
        resource: Resource::RLIMIT_NPROC,
        errors: &[Errno::EAGAIN],
        what: "threads of its user",
        command: "ulimit -u",
        is_bytes: false,
    },
    Limit {
        resource: Resource::RLIMIT_NOFILE,
        errors: &[Errno::EMFILE],
        what: "open files",
        command: "ulimit -n",
        is_bytes: false,
    },
    Limit {
        resource: Resource::RLIMIT_FSIZE,
        errors: &[Errno::EFBIG],
        what: "in one file",
        command: "ulimit -f",
        is_bytes: true,
    },
];

/// The limits that may be behind an error, as the rest of its sentence; empty if there are none.
pub(super) fn of(error: &anyhow::Error) -> String {
    errno_of(error).map_or_else(String::new, |errno| {
        let limit = |resource| getrlimit(resource).ok().map(|(soft, _)| soft);
        sentence(errno, limit)
    })
}

fn errno_of(error: &anyhow::Error) -> Option<Errno> {
    error.chain().find_map(|cause| {
        let of_io = cause.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error);
        of_io.map(Errno::from_raw).or_else(|| cause.downcast_ref::<Errno>().copied())
    })
}

fn sentence(errno: Errno, soft: impl Fn(Resource) -> Option<u64>) -> String {
    let reached = LIMITS.iter().filter(|limit| limit.errors.contains(&errno)).filter_map(|limit| {
        let most = soft(limit.resource).filter(|&most| most != libc::RLIM_INFINITY)?;
        let most = if limit.is_bytes { human_bytes(most) } else { human_count(most) };
        Some(format!("{most} {} ({})", limit.what, limit.command))
    });
    let reached: Vec<String> = reached.collect();
    match reached.is_empty() {
        true => String::new(),
        false => {
            format!("; this process may have {}: raise what is too little", reached.join(" and "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host_mm::MmError;

    #[test]
    fn a_limit_is_named_where_it_may_be_behind_the_error() {
        let soft = |resource| match resource {
            Resource::RLIMIT_AS => Some(64 << 20),
            Resource::RLIMIT_NOFILE => Some(12),
            Resource::RLIMIT_NPROC => Some(libc::RLIM_INFINITY),
            _ => None,
        };
        let address_space = "; this process may have 64 MiB of address space (ulimit -v): raise";
        assert!(sentence(Errno::EAGAIN, soft).starts_with(address_space));
        assert!(sentence(Errno::ENOMEM, soft).starts_with(address_space));
        assert!(sentence(Errno::EMFILE, soft).contains("12 open files (ulimit -n)"));
        assert_eq!(sentence(Errno::EFBIG, soft), "", "it has none");
        assert_eq!(sentence(Errno::EIO, soft), "", "no limit says so");
    }

    #[test]
    fn the_errno_is_found_under_the_sentences() {
        let source = io::Error::from_raw_os_error(libc::EMFILE);
        let error = anyhow::Error::from(MmError::Host { what: "a mapping", source });
        assert_eq!(errno_of(&error), Some(Errno::EMFILE));
        assert_eq!(errno_of(&anyhow::anyhow!("nothing")), None);
    }
}
