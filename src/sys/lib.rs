//! Raw system calls behind safe functions: nothing in here trusts its caller with memory safety,
//! and nothing above it needs `unsafe` for what it offers.
//!
//! Each function returns the kernel's errno in an [`std::io::Error`] (or an error enum that carries
//! it); what to do about it is the caller's decision.
//!
//! ```
//! use gnomon_sys::memory;
//!
//! # fn main() -> std::io::Result<()> {
//! // Memory that a descriptor stands for, as guest memory is made of: it takes frames where it is touched.
//! let memory = memory::create_memfd("example", 64 << 20)?;
//! assert_eq!(memory::allocated_bytes(&memory)?, 0);
//! std::os::unix::fs::FileExt::write_all_at(&memory, b"touched", 5 << 20)?;
//! assert!(memory::allocated_bytes(&memory)? >= 4096);
//! assert!(memory::is_hole(&memory, 0)?);
//! memory::punch_hole(&memory, 5 << 20, 4096)?;
//! assert!(memory::is_hole(&memory, 5 << 20)?);
//! # Ok(())
//! # }
//! ```

#![allow(
    unsafe_code,
    reason = "the wrappers of raw system calls; each block argues why its call is sound"
)]

pub mod block_device;
#[cfg(feature = "testing")]
#[doc(hidden)]
pub mod foreign;
#[cfg(feature = "testing")]
#[doc(hidden)]
pub mod generous;
pub mod heap;
pub mod job_control;
pub mod memory;
pub mod names;
pub mod pagemap;
mod patience;
#[cfg(feature = "testing")]
#[doc(hidden)]
pub mod recording;
pub mod signal;
pub mod slice;
pub mod small_pages;
pub mod socket;
pub mod stdio;
pub mod terminal;
pub mod threads;
pub mod uffd;
mod uffd_call;
pub mod uffd_window;

pub use patience::Patience;

/// Bytes in a page of this architecture's kernel.
pub const PAGE_SIZE: usize = 4096;
/// [`PAGE_SIZE`] for arithmetic on addresses.
pub(crate) const PAGE_SIZE_U64: u64 = 4096;
