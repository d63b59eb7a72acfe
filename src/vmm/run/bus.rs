//! What is on the other side of a machine's ports and of its addresses that are no memory.
//!
//! Guarantee: whoever runs guest code, and however, knows of what the guest reaches beside its memory
//! no more than this; and a device knows of vCPUs only their numbers and, in a hypercall, their
//! registers by number.

use std::thread::JoinHandle;

use crate::addr::Gpa;
use crate::sys::Patience;
use crate::vmm::error::{GuestError, VmError};

use super::core::Ender;
use super::outcome::Outcome;
use super::roster::StartRefused;

/// What a vCPU's accesses that leave the guest reach. Called on the vCPU's thread, which must not be
/// kept for long: a stop waits for it.
pub trait Bus: Send + Sync {
    /// `in`, of 1, 2 or 4 bytes; a string of them comes one by one.
    fn port_in(&self, vcpu: usize, port: u16, data: &mut [u8]) -> Action;
    /// `out`, likewise.
    fn port_out(&self, vcpu: usize, port: u16, data: &[u8]) -> Action;
    /// A read of 1 to 8 bytes where there is no memory.
    fn mmio_read(&self, vcpu: usize, gpa: Gpa, data: &mut [u8]) -> Action;
    /// A write, likewise.
    fn mmio_write(&self, vcpu: usize, gpa: Gpa, data: &[u8]) -> Action;

    /// Carries out the request that the caller's general registers hold, in the order in which
    /// instructions encode them, after [`Action::Hypercall`]. Others are started by `start`.
    fn hypercall(
        &self,
        _vcpu: usize,
        _registers: &[u64; 16],
        _start: &StartVcpu<'_>,
    ) -> HypercallResult {
        HypercallResult::Value(u64::MAX)
    }

    /// The machine is about to start: so are the threads that work for it beside its vCPUs. It joins them.
    ///
    /// # Errors
    /// A thread that cannot be started; the machine is then over.
    fn start(&self, _ender: Ender) -> Result<Vec<JoinHandle<()>>, VmError> {
        Ok(Vec::new())
    }

    /// The machine is over: whoever waits in a device is to go on. Called once or more, by any thread.
    fn over(&self) {}

    /// Waits until the threads of [`Self::start`] are done; false when the patience, if there is any limit
    /// to it, runs out first. The machine is over.
    fn wait_until_over(&self, _patience: &mut Option<Patience>) -> bool {
        true
    }
}

/// Starts another vCPU: its index, where it begins, and the argument that it finds in RDI. What else it
/// begins with is its caller's matter.
pub type StartVcpu<'a> = dyn Fn(usize, u64, u64) -> Result<(), StartRefused> + 'a;

/// What follows an access.
#[derive(Debug)]
pub enum Action {
    /// Back into the guest.
    Continue,
    /// [`Bus::hypercall`], whose result the guest finds in RAX. Only after `out`.
    Hypercall,
    /// The guest must not do that: its machine fails, with a sentence that names the vCPU and where
    /// it was.
    Refuse(GuestError),
    /// The machine is over.
    End(Outcome),
}

/// What a hypercall does.
pub enum HypercallResult {
    /// Goes on with this value in RAX.
    Value(u64),
    /// Ends the VM.
    End(Outcome),
}
