//! The threads of vCPUs, whatever machine they belong to.
//!
//! Guarantee: however the body of a vCPU's thread ends, by an error or a panic too, that is an outcome
//! of its machine.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::JoinHandle;

use crate::vmm::error::VmError;

use super::outcome::Outcome;

/// Starts a vCPU's thread.
///
/// # Errors
/// [`VmError::Thread`].
pub(in crate::vmm) fn spawn_vcpu(
    index: usize,
    body: impl FnOnce() + Send + 'static,
) -> Result<JoinHandle<()>, VmError> {
    let thread = std::thread::Builder::new().name(format!("vcpu{index}"));
    thread.spawn(body).map_err(|source| VmError::Thread { vcpu: index, source })
}

/// Lives a vCPU's life; the outcome if it brought one about.
pub(in crate::vmm) fn outcome_of(
    index: usize,
    live: impl FnOnce() -> Result<Option<Outcome>, VmError>,
) -> Option<Outcome> {
    match catch_unwind(AssertUnwindSafe(live)) {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(error)) => Some(Outcome::Failed(error)),
        Err(panic) => {
            let message = panic_message(panic.as_ref());
            Some(Outcome::Failed(VmError::Panicked { vcpu: index, message }))
        }
    }
}

pub(in crate::vmm) fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().map(str::to_owned);
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".to_owned())
}
