//! Which frame a page may be in.
//!
//! Shadow page tables can point anywhere, so any page may be in any frame. A memslot that *is* the
//! guest's memory cannot: there the frame of guest page `gfn` is frame `gfn`, always. With
//! [`Placement::Identity`] the frame table and the memfd are as large as the guest's memory, and
//! what is rationed is the number of frames in use. What this guarantees:
//!
//! - a frame that holds no page takes up no memory: it is punched out of the memfd under its page
//!   lock, before the page's entry names another place and before its unit of the ration is given
//!   back (invariant I5 holds in bytes of the memfd);
//! - so the end of every mapping of a frame that loses its page is the punch itself, and a read-only
//!   mapping may stand until then: the frame never holds anything but this one page.
//!
//! What needs another frame for the same guest page, or one frame for several, is refused.

use super::free_list;
use crate::host_mm::error::MmError;

/// Which frame a page may be in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Placement {
    /// In any.
    #[default]
    Anywhere,
    /// In the one that has the number of its guest page. There is one memory object only.
    Identity {
        /// Bytes of the guest's memory, and of the memfd: a multiple of 4096.
        guest_bytes: u64,
    },
}

impl Placement {
    /// Bytes of the memfd, and number of frames, with so much memory to ration.
    pub(in crate::host_mm) fn extent(self, host_memory_bytes: u64) -> Result<(u64, u32), MmError> {
        let rationed = free_list::count(host_memory_bytes)?;
        match self {
            Self::Anywhere => Ok((host_memory_bytes, rationed)),
            Self::Identity { guest_bytes } => Ok((guest_bytes, free_list::count(guest_bytes)?)),
        }
    }
}
