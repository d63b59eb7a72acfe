//! The contract's side of the bus: its ports, its DMA device's thread, its hypercalls.
//!
//! Guarantee: every port access is answered, of whatever width, and no address beside memory is there:
//! a guest that reaches for one ends its VM. The device's thread is the machine's own: it is waited for
//! with the vCPUs, and a host that fails under it ends the VM as it does under one of them.

use std::sync::Arc;
use std::thread::JoinHandle;

use crate::addr::Gpa;
use crate::sys::Patience;
use crate::vmm::cpu::emulate::PortWidth;
use crate::vmm::error::{GuestError, VmError};
use crate::vmm::run::bus::{Action, Bus, HypercallResult, StartVcpu};
use crate::vmm::run::core::Ender;

use super::hypercall::hypercall;
use super::services::Services;

/// See the module's documentation.
pub(in crate::vmm) struct AbiBus {
    services: Arc<Services>,
}

impl AbiBus {
    /// The bus behind which there are these services.
    pub(in crate::vmm) fn new(services: Arc<Services>) -> Self {
        Self { services }
    }
}

impl Bus for AbiBus {
    fn port_in(&self, _vcpu: usize, port: u16, data: &mut [u8]) -> Action {
        if let Some(width) = PortWidth::from_bytes(data.len()) {
            let value = self.services.bus.read(port, width).to_le_bytes();
            data.copy_from_slice(&value[..data.len()]);
        }
        Action::Continue
    }

    fn port_out(&self, _vcpu: usize, port: u16, data: &[u8]) -> Action {
        let Some(width) = PortWidth::from_bytes(data.len()) else {
            return Action::Continue;
        };
        let mut value = [0; 4];
        value[..data.len()].copy_from_slice(data);
        self.services.bus.write(port, width, u32::from_le_bytes(value))
    }

    fn mmio_read(&self, _vcpu: usize, gpa: Gpa, _data: &mut [u8]) -> Action {
        Action::Refuse(GuestError::OutsideRam { gpa })
    }

    fn mmio_write(&self, _vcpu: usize, gpa: Gpa, _data: &[u8]) -> Action {
        Action::Refuse(GuestError::OutsideRam { gpa })
    }

    fn hypercall(
        &self,
        vcpu: usize,
        registers: &[u64; 16],
        start: &StartVcpu<'_>,
    ) -> HypercallResult {
        hypercall(&self.services, vcpu, registers, start)
    }

    fn start(&self, ender: Ender) -> Result<Vec<JoinHandle<()>>, VmError> {
        self.services.start_device(move |outcome| ender.end(outcome)).map(|thread| vec![thread])
    }

    fn over(&self) {
        self.services.bus.dma().stop();
    }

    fn wait_until_over(&self, patience: &mut Option<Patience>) -> bool {
        self.services.bus.dma().wait_until_over(patience)
    }
}
