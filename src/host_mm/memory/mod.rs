//! The memory of a guest, as whoever runs it has it.

pub(in crate::host_mm) mod object;
pub(in crate::host_mm) mod owner;
