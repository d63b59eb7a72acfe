//! What can go wrong with swap.

use std::fmt;
use std::io;
use std::path::PathBuf;

use super::Slot;

/// Which way a page was going.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SwapOp {
    /// From swap.
    Read,
    /// To swap.
    Write,
}

impl fmt::Display for SwapOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
        })
    }
}

/// A swap operation failed.
#[derive(Debug, thiserror::Error)]
pub enum SwapError {
    /// Every slot is in use.
    #[error("swap is full: all {slots} slots of 4 KiB are in use; start with more swap")]
    Full {
        /// How many there are.
        slots: u32,
    },
    /// The file system behind swap (or the user's quota) is full.
    #[error(
        "cannot write swap slot {slot}: the file system of the swap file is full ({source}); free \
         space there, or put swap elsewhere"
    )]
    NoSpace {
        /// The first slot of the write.
        slot: Slot,
        /// `ENOSPC` or `EDQUOT`.
        source: io::Error,
    },
    /// The operating system could not read or write.
    #[error(
        "cannot {op} swap slot {slot}: {source}; look into the kernel's log for what ails the storage, \
         and put swap elsewhere"
    )]
    Io {
        /// Which of the two.
        op: SwapOp,
        /// The (first) slot.
        slot: Slot,
        /// With the errno.
        source: io::Error,
    },
    /// The swap file is shorter than it was made.
    #[error(
        "cannot read swap slot {slot}: another program has cut the swap file short, and what was there \
         is lost; start again, and let nothing else write to the swap file"
    )]
    CutShort {
        /// The slot.
        slot: Slot,
    },
    /// A slot does not hold the page that should be there.
    #[error(
        "swap slot {slot} does not hold what page {owner_tag:#x} wrote there: checksum \
         {found:#018x}, expected {}; put swap on storage that gives back what was written, and let \
         nothing else write there",
        Expected(.expected)
    )]
    Checksum {
        /// The slot.
        slot: Slot,
        /// Who read it.
        owner_tag: u64,
        /// Checksum of what was written; `None` if nothing was, or a write failed.
        expected: Option<u64>,
        /// Checksum of what was read.
        found: u64,
    },
    /// A free slot was used or freed.
    #[error("swap slot {slot} is not in use")]
    NotInUse {
        /// The slot.
        slot: Slot,
    },
    /// A run was given a different number of pages.
    #[error("{tags} owner tags and {bytes} bytes do not make {slots} pages")]
    WrongLength {
        /// Slots in the run.
        slots: usize,
        /// Tags given.
        tags: usize,
        /// Bytes given.
        bytes: usize,
    },
    /// Swap could not be set up.
    #[error(transparent)]
    Open(#[from] SwapOpenError),
}

struct Expected<'a>(&'a Option<u64>);

impl fmt::Display for Expected<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(sum) => write!(f, "{sum:#018x}"),
            None => f.write_str("none: nothing was written"),
        }
    }
}

impl SwapError {
    /// Gives a full file system, and a file that ends too early, their own sentences.
    pub(super) fn from_io(op: SwapOp, slot: Slot, source: io::Error) -> Self {
        match source.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) if op == SwapOp::Write => {
                Self::NoSpace { slot, source }
            }
            None if op == SwapOp::Read && source.kind() == io::ErrorKind::UnexpectedEof => {
                Self::CutShort { slot }
            }
            _ => Self::Io { op, slot, source },
        }
    }
}

/// A swap file could not be made. Nothing is left behind.
#[derive(Debug, thiserror::Error)]
pub enum SwapOpenError {
    /// More slots than can be numbered.
    #[error("swap of {bytes} bytes is above the maximum of {max_bytes} bytes; choose less")]
    TooLarge {
        /// Bytes asked for.
        bytes: u64,
        /// Most bytes.
        max_bytes: u64,
    },
    /// The swap file is there already.
    #[error(
        "swap file {} exists already; a swap file is made anew, without a name, so nothing may be \
         there: name another place, or remove this one if nothing uses it",
        .path.display()
    )]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// The file could not be made.
    #[error(
        "cannot create swap file {}: {source}; name a place in a directory that exists and that this \
         user may write to",
        .path.display()
    )]
    Create {
        /// The file.
        path: PathBuf,
        /// With the errno.
        source: io::Error,
    },
    /// The temporary file could not be made.
    #[error(
        "cannot create a swap file in directory {}: {source}; name a directory that exists and that \
         this user may write to",
        .dir.display()
    )]
    CreateTemporary {
        /// The directory.
        dir: PathBuf,
        /// With the errno.
        source: io::Error,
    },
    /// The file could not get its size.
    #[error(
        "cannot give the swap file a size of {bytes} bytes: {source}; choose less swap, or put it on \
         another file system"
    )]
    Resize {
        /// The size.
        bytes: u64,
        /// With the errno.
        source: io::Error,
    },
    /// The process may not write files of that size.
    #[error(
        "a swap file of {bytes} bytes is above this process's limit of {limit_bytes} bytes a file \
         (ulimit -f); raise that, or choose less swap"
    )]
    FileSizeLimit {
        /// The size.
        bytes: u64,
        /// `RLIMIT_FSIZE`.
        limit_bytes: u64,
    },
}
