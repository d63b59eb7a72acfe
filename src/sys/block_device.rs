//! Block devices: what their files do not say by themselves.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use nix::errno::Errno;

/// `BLKROGET`, which the C library's bindings lack.
const GET_READ_ONLY: libc::Ioctl = 0x125e;

/// Bytes of the smallest piece of the device that can be written (`BLKSSZGET`).
///
/// # Errors
/// `ENOTTY` if it is no block device.
pub fn sector_bytes(device: &File) -> io::Result<u64> {
    u64::try_from(ask(device, libc::BLKSSZGET)?).map_err(io::Error::other)
}

/// Whether the device takes no writes; it can be opened for writing all the same.
///
/// # Errors
/// `ENOTTY` if it is no block device.
pub fn is_read_only(device: &File) -> io::Result<bool> {
    Ok(ask(device, GET_READ_ONLY)? != 0)
}

/// The answer to a request that has a number as its answer.
fn ask(device: &File, request: libc::Ioctl) -> io::Result<libc::c_int> {
    let mut answer: libc::c_int = 0;
    // SAFETY: the two requests that this module makes write an int to where the pointer leads, a local
    // variable of that type; files that are no block devices refuse them.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), request, &raw mut answer) };
    Errno::result(result)?;
    Ok(answer)
}
