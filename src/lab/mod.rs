//! The test laboratory.

pub(crate) mod inject;
