//! What can go wrong in host memory management.

use std::io;

use crate::addr::{Gfn, Gpa, Pfn};
use crate::export_rmap::RevokeError;
use crate::host_mm::swap::SwapError;
use crate::sys::uffd::UffdError;

/// An operation on guest or host memory failed. Whatever the error, no content is lost: the page is
/// where it was.
#[derive(Debug, thiserror::Error)]
pub enum MmError {
    /// The size of host memory is not one that frames can have.
    #[error("host memory of {bytes} bytes {why}")]
    BadHostMemory {
        /// Bytes asked for.
        bytes: u64,
        /// What is wrong with them, as the rest of a sentence.
        why: String,
    },
    /// The address lies outside the guest's memory.
    #[error(
        "guest-physical {gpa} + {len} bytes is outside the guest's memory of {memory_bytes} bytes"
    )]
    OutsideMemory {
        /// First byte.
        gpa: Gpa,
        /// Bytes from there.
        len: u64,
        /// The guest's memory.
        memory_bytes: u64,
    },
    /// Nothing could be evicted.
    #[error("no frame could be freed for guest frame {gfn}: {why}")]
    OutOfFrames {
        /// The page that needed a frame.
        gfn: Gfn,
        /// Why reclaim found none.
        why: String,
    },
    /// The ranges cannot change places.
    #[error("pages cannot be remapped: {why}")]
    BadRemap {
        /// What is wrong with them, as the rest of a sentence.
        why: String,
    },
    /// Reading or writing swap failed.
    #[error(transparent)]
    Swap(#[from] SwapError),
    /// A client could not revoke its translations.
    #[error(transparent)]
    Revoke(#[from] RevokeError),
    /// The host refused memory.
    #[error(
        "the host refused {what}: {source}; free some of what it is short of, or raise this process's \
         limits (`gnomon doctor` tells them)"
    )]
    Host {
        /// What was asked for.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The frames' memory could not be accessed; the mapping is smaller than the frame table.
    #[error("frame {pfn} is outside the host view: {why}; this is a bug in Gnomon")]
    View {
        /// The frame.
        pfn: Pfn,
        /// What the access said.
        why: String,
    },
    /// More memory objects than the frame table's owner field can number.
    #[error("no more memory objects: there are {} of them; end VMs first", u16::MAX)]
    TooManyObjects,
    /// The build has no notifier, and what was asked for would have to tell export clients.
    #[error("{what} needs the export notifier: build with the feature `export-notifier`")]
    NoNotifier {
        /// What was asked for.
        what: &'static str,
    },
    /// With [`Placement::Identity`](crate::host_mm::Placement::Identity), what would need another
    /// frame for the same guest page, or one frame for several.
    #[error(
        "{what} needs frames that any page may be in, but here each guest page has a frame of its \
         own: use a host memory of placement `anywhere`"
    )]
    FixedFrames {
        /// What was asked for.
        what: &'static str,
    },
    /// More shared pages than there are numbers for.
    #[error("no more shared pages: all numbers are used up; end VMs that were cloned first")]
    TooManyShared,
    /// userfaultfd could not be set up.
    #[error(transparent)]
    Uffd(#[from] UffdError),
}

/// That the clients can be told.
pub(super) fn require_notifier(what: &'static str) -> Result<(), MmError> {
    if cfg!(feature = "export-notifier") { Ok(()) } else { Err(MmError::NoNotifier { what }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_of_the_host_says_what_to_do() {
        let source = io::Error::from_raw_os_error(libc::EIO);
        let said = MmError::Host { what: "a thread", source }.to_string();
        let begin = "the host refused a thread: Input/output error (os error 5); free";
        assert!(said.starts_with(begin), "{said}");
    }
}
