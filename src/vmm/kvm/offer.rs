//! What KVM says about itself, in full, for whoever wants to tell a user what is missing.

use super::cpuid;
use super::device::{KvmDevice, KvmError};

/// What KVM offers. Whether it works is another matter: see [`HostTraits`](crate::vmm::HostTraits).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvmOffer {
    /// Every capability that Gnomon needs, and whether it is there.
    pub capabilities: Vec<(&'static str, bool)>,
    /// Most vCPUs of one VM.
    pub max_vcpus: usize,
    /// Width of a machine address in bits.
    pub phys_bits: u32,
    /// Whether guests have no-execute pages.
    pub no_execute: bool,
}

impl KvmOffer {
    /// Asks KVM.
    ///
    /// # Errors
    /// [`KvmError`], if the device cannot be opened or does not say.
    pub fn ask() -> Result<Self, KvmError> {
        let device = KvmDevice::open_unchecked()?;
        let features = cpuid::features(device.guest_cpuid()?.as_slice());
        Ok(Self {
            capabilities: device.capabilities(),
            max_vcpus: device.max_vcpus(),
            phys_bits: features.phys_bits,
            no_execute: features.nx,
        })
    }

    /// Whether KVM makes a VM with a vCPU, and has what Gnomon needs of it. Whatever is at the device's
    /// path, this is what counts.
    ///
    /// # Errors
    /// [`KvmError`]: what is missing.
    pub fn try_out() -> Result<(), KvmError> {
        let device = KvmDevice::open()?;
        device.create_vm()?.create_vcpu(0, &device.guest_cpuid()?).map(drop)
    }
}
