//! What ends a guest whose memory is a window.

use crate::addr::Gfn;
use crate::host_mm::MmError;
use crate::host_mm::swap::SwapError;
use crate::sys::uffd::UffdError;
use crate::sys::uffd_window::InstallError;

/// Something that cannot be resolved. Threads that wait for the page go on waiting until the
/// [`DirectMmu`](crate::direct_mmu::DirectMmu) is dropped: its owner is to end the guest.
#[derive(Debug, thiserror::Error)]
pub enum DirectError {
    /// The page cannot be had.
    #[error("guest frame {gfn} cannot be brought in: {source}")]
    Page {
        /// The page.
        gfn: Gfn,
        /// Why.
        source: MmError,
    },
    /// The page is in its frame and cannot be mapped.
    #[error("guest frame {gfn} cannot be mapped into the window: {source}")]
    Install {
        /// The page.
        gfn: Gfn,
        /// Why.
        source: InstallError,
    },
    /// Faults cannot be read any more.
    #[error("page faults of the guest's memory are lost: {source}")]
    Events {
        /// Why.
        #[from]
        source: UffdError,
    },
    /// A removed range could not be made zero.
    #[error("{count} guest frames from {first} were removed, but cannot be freed: {source}")]
    Remove {
        /// First page.
        first: Gfn,
        /// Pages.
        count: u64,
        /// Why.
        source: MmError,
    },
    /// The guest has no memory there any more.
    #[error(
        "{count} guest frames from {first} were {how} in this process: no guest can go on without"
    )]
    Lost {
        /// First page.
        first: Gfn,
        /// Pages.
        count: u64,
        /// What happened to them.
        how: &'static str,
    },
    /// A fault of Gnomon's own.
    #[error("a thread that pages the guest's memory panicked, {thread}: this is a bug in Gnomon")]
    Panicked {
        /// Which.
        thread: &'static str,
    },
    /// A touch where nothing but a moved part of the window can be.
    #[error("a touch of {address:#x}, where a part of the guest's memory was moved to")]
    Stray {
        /// The address.
        address: usize,
    },
}

impl DirectError {
    /// Whether a page came back from swap as another one than was written there.
    #[must_use]
    pub fn is_corruption(&self) -> bool {
        matches!(self, Self::Page { source: MmError::Swap(SwapError::Checksum { .. }), .. })
    }
}
