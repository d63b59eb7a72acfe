//! Raw system calls behind safe functions: nothing in here trusts its caller with memory safety,
//! and nothing above it needs `unsafe` for what it offers.
//!
//! Each function returns the kernel's errno in an [`std::io::Error`] (or an error enum that carries
//! it); what to do about it is the caller's decision.

#![allow(
    unsafe_code,
    reason = "the wrappers of raw system calls; each block argues why its call is sound"
)]

pub mod block_device;
#[cfg(test)]
#[cfg_attr(not(feature = "export-notifier"), allow(dead_code))]
pub(crate) mod foreign;
#[cfg(test)]
pub(crate) mod generous;
pub mod heap;
pub mod job_control;
pub mod memory;
pub mod names;
pub mod pagemap;
#[cfg(all(any(test, feature = "fuzzing"), feature = "export-notifier"))]
pub(crate) mod recording;
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
