//! The books of host memory: which page is in which frame, found and locked, and the rules that must
//! hold, looked at where they must.
//!
//! Guarantee: whoever only looks changes no place of a page.

pub(in crate::host_mm) mod find;
pub(in crate::host_mm) mod holes;
pub(in crate::host_mm) mod lab;
pub(in crate::host_mm) mod rules;
