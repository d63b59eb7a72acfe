//! The pages of memory objects: where each is, whether it was written, and the shared ones that several
//! guest pages name.
//!
//! Guarantee: a page is in one place, which its entry names. Nothing here moves a page.

pub(in crate::host_mm) mod commons;
pub(in crate::host_mm) mod dirty_bits;
pub(in crate::host_mm) mod pages;
