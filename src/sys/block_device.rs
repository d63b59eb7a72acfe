//! Block devices: what their files do not say by themselves.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use nix::errno::Errno;

/// Bytes of the smallest piece of the device that can be written (`BLKSSZGET`).
///
/// # Errors
/// `ENOTTY` if it is no block device.
pub fn sector_bytes(device: &File) -> io::Result<u64> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the request writes an int to where the pointer leads, a local variable of that type.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), libc::BLKSSZGET, &raw mut bytes) };
    Errno::result(result)?;
    u64::try_from(bytes).map_err(io::Error::other)
}
