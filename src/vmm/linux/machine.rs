//! A Linux guest as a machine that runs: memory, kernel, devices and vCPUs put together.

use std::io::Write;
use std::sync::{Arc, Weak};
use std::time::Duration;

use kvm_bindings::kvm_sregs;

use super::board::Board;
use super::kernel::Entry;
use super::layout::{SERIAL_IRQ, virtio_place};
use super::line::Line;
use super::{LinuxImage, load, registers};
use crate::direct_mmu::{DirectConfig, DirectMmu};
use crate::host_mm::{HostMm, MemoryObject};
use crate::virtio::{Device, MmioTransport};
use crate::vmm::error::VmError;
use crate::vmm::plain::{PlainConfig, PlainMachine, Registers};
use crate::vmm::stats::VcpuCounts;
use crate::vmm::vm::Outcome;

/// A machine with a Linux guest.
pub struct LinuxVm {
    // Before the board: no vCPU runs when its devices go.
    machine: PlainMachine,
    board: Arc<Board>,
    object: Arc<MemoryObject>,
}

impl LinuxVm {
    /// Loads the image into `object`, which is fresh memory of `Placement::Identity`, and makes the
    /// machine around it, ready to start. Its serial port prints to `console`. The image's number of
    /// devices is not looked at.
    ///
    /// # Errors
    /// [`VmError::Linux`] if it is the image's fault, otherwise what the host refused.
    pub fn new(
        image: &LinuxImage<'_>,
        object: &Arc<MemoryObject>,
        paging: DirectConfig,
        devices: Vec<Arc<dyn Device>>,
        console: Box<dyn Write + Send>,
    ) -> Result<Self, VmError> {
        let image = LinuxImage { devices: devices.len(), ..*image };
        let entry = load(object, &image)?;
        let serial_line = Line::default();
        let mut lines = vec![(SERIAL_IRQ, serial_line.clone())];
        let mut transports = Vec::with_capacity(devices.len());
        for (index, device) in devices.into_iter().enumerate() {
            let line = Line::default();
            // More than there are places were refused by `load`.
            lines.extend(virtio_place(index).map(|(_, irq)| (irq, line.clone())));
            transports.push(MmioTransport::new(device, object.clone(), Arc::new(line))?);
        }
        let board = Arc::new(Board::new(console, serial_line, transports));
        let mut vcpus = vec![None; image.vcpus];
        if let Some(first) = vcpus.first_mut() {
            *first = Some(first_registers(entry));
        }
        let machine = PlainMachine::new(PlainConfig {
            object: object.clone(),
            paging,
            pinned: Vec::new(),
            vcpus,
            irqchip: true,
            bus: board.clone(),
        })?;
        for (irq, line) in lines {
            line.connect(machine.interrupt_line(irq)?);
        }
        Ok(Self { machine, board, object: object.clone() })
    }

    /// Starts the vCPUs. Starting twice does nothing.
    ///
    /// # Errors
    /// [`VmError::Thread`]; the machine is then over.
    pub fn start(&mut self) -> Result<(), VmError> {
        self.machine.start()
    }

    /// Waits until the machine is over and all its vCPU threads are done; `None` when `timeout`
    /// passes first, or when the outcome was taken by an earlier call, or it was never started.
    pub fn wait(&mut self, timeout: Option<Duration>) -> Option<Outcome> {
        self.machine.wait(timeout)
    }

    /// Ends the machine at once. Does not wait; [`Self::wait`] does.
    pub fn kill(&self) {
        self.machine.kill();
    }

    /// Has the devices touch guest memory no more, for good: for what is looked at once the machine
    /// is over. What they were in the middle of is not completed.
    pub fn stop_devices(&self) {
        self.board.devices().iter().for_each(MmioTransport::stop);
    }

    /// The keyboard, so to speak: a way to its serial port that outlives it.
    #[must_use]
    pub fn input(&self) -> LinuxInput {
        LinuxInput(Arc::downgrade(&self.board))
    }

    /// How its memory is paged.
    #[must_use]
    pub fn paging(&self) -> &DirectMmu {
        self.machine.paging()
    }

    /// Its memory as the host sees it.
    #[must_use]
    pub fn object(&self) -> &Arc<MemoryObject> {
        &self.object
    }

    /// Host memory.
    #[must_use]
    pub fn host_mm(&self) -> &Arc<HostMm> {
        self.object.host_mm()
    }

    /// What the VMM counted so far, all vCPUs together.
    #[must_use]
    pub fn counts(&self) -> VcpuCounts {
        let mut total = VcpuCounts::default();
        for counts in self.machine.vcpu_counts() {
            total.add(&counts);
        }
        total
    }

    /// Why devices need a reset, or last needed one: a sentence for each.
    #[must_use]
    pub fn device_failures(&self) -> Vec<String> {
        self.board.devices().iter().filter_map(MmioTransport::failure).collect()
    }

    /// Compares the reverse map with what the window maps and the devices have translations of
    /// (invariant I3): a sentence for each difference. Once the machine is over: background reclaim
    /// and the devices end with this.
    #[must_use]
    pub fn check_reverse_map(&self) -> Vec<String> {
        self.host_mm().stop_background_reclaim();
        self.stop_devices();
        let mut found = self
            .paging()
            .check_reverse_map()
            .unwrap_or_else(|error| vec![format!("cannot compare the window's mappings: {error}")]);
        found.extend(self.board.devices().iter().flat_map(MmioTransport::check_reverse_map));
        found
    }

    /// Bytes of console output that the console did not take.
    #[must_use]
    pub fn lost_console_bytes(&self) -> u64 {
        self.board.lost_console_bytes()
    }

    /// Accesses to ports and addresses at which there is nothing.
    #[must_use]
    pub fn unknown_accesses(&self) -> u64 {
        self.board.unknown_accesses()
    }
}

/// See [`LinuxVm::input`]. It keeps nothing of the machine alive.
#[derive(Clone)]
pub struct LinuxInput(Weak<Board>);

impl LinuxInput {
    /// Has the guest read these bytes, and waits until it has room for all of them; false if the
    /// machine is over first.
    #[must_use]
    pub fn send(&self, bytes: &[u8]) -> bool {
        self.0.upgrade().is_some_and(|board| board.send(bytes))
    }
}

fn first_registers(entry: Entry) -> Registers {
    let mut sregs: kvm_sregs = Registers::long_mode().sregs;
    let regs = registers::at_entry(entry, &mut sregs);
    Registers { regs, sregs }
}
