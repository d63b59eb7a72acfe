//! Memory of the host that a VM has from its beginning to its end.
//!
//! Guarantee: it costs nothing until it is touched, and it stays while anything holds it.

use std::io;
use std::sync::Arc;

use vm_memory::MmapRegion;

use crate::sys::{memory, small_pages};

/// Host memory for one of the pinned slots could not be mapped.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot map {bytes} bytes for the {what}: {source}; choose less memory, or raise this process's limits (`gnomon doctor` tells them)"
)]
pub struct MapError {
    /// Which slot.
    pub what: &'static str,
    /// Its size.
    pub bytes: u64,
    /// The operating system's reason.
    pub source: io::Error,
}

/// Maps `bytes` of anonymous memory, which costs nothing until it is touched.
pub(in crate::vmm) fn map_pinned(
    what: &'static str,
    bytes: u64,
) -> Result<Arc<MmapRegion>, MapError> {
    let refused = |source| MapError { what, bytes, source };
    let size = usize::try_from(bytes).map_err(|error| refused(io::Error::other(error)))?;
    let region = MmapRegion::build(
        None,
        size,
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
    );
    region.map(Arc::new).map_err(|error| refused(memory::mapping_error(error)))
}

/// Maps `bytes` of a file that lives in memory only, shared: a part of the mapping can be zapped,
/// which takes it away from every vCPU, and the content stays.
pub(in crate::vmm) fn map_shared(
    what: &'static str,
    bytes: u64,
) -> Result<Arc<MmapRegion>, MapError> {
    let map = || small_pages::map(memory::create_memfd("gnomon-window", bytes)?, bytes);
    map().map(Arc::new).map_err(|source| MapError { what, bytes, source })
}
