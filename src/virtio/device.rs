//! What a kind of device has to say to the transport.

use super::rings::{Request, Trouble};

/// A kind of device, behind the registers that all kinds have in common. Configuration is read and
/// written by vCPU threads, requests are served by the device's own.
pub trait Device: Send + Sync {
    /// Device ID, VIRTIO 1.2 chapter 5.
    fn id(&self) -> u32;

    /// Feature bits of this kind that are offered.
    fn features(&self) -> u64;

    /// Most entries that each queue can have: powers of two.
    fn queue_sizes(&self) -> &[u16];

    /// Reads from the configuration space: any offset, any length. What it does not have is zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes to the configuration space: any offset, any length.
    fn write_config(&self, offset: u64, data: &[u8]);

    /// The driver has accepted these of all features.
    fn negotiated(&self, features: u64);

    /// The driver has reset the device.
    fn reset(&self);

    /// Serves one buffer of a queue; returns the number of bytes that it wrote to it, from its first
    /// byte on.
    ///
    /// # Errors
    /// `Trouble`: the buffer is not given back.
    fn serve(&self, queue: usize, request: &Request<'_>) -> Result<u32, Trouble>;
}

/// Reads from the bytes of a configuration space.
pub(super) fn read_bytes(space: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let Ok(offset) = usize::try_from(offset) else { return };
    if let Some(rest) = space.get(offset..) {
        let len = rest.len().min(data.len());
        data[..len].copy_from_slice(&rest[..len]);
    }
}
