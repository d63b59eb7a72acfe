//! A Linux guest as a machine that runs: memory, kernel, devices and vCPUs put together.

use std::io::Write;
use std::sync::{Arc, Weak};
use std::time::Duration;

use kvm_bindings::kvm_sregs;

use crate::addr::Gpa;
use crate::direct_mmu::{DirectConfig, DirectMmu};
use crate::host_mm::{HostMm, MemoryObject};
use crate::virtio::{Device, MmioTransport};
use crate::vmm::direct::{PlainConfig, PlainMachine};
use crate::vmm::error::{GuestError, VmError};
use crate::vmm::kvm::registers::Registers;
use crate::vmm::run::outcome::Outcome;
use crate::vmm::run::processor::Space;
use crate::vmm::run::stats::VcpuCounts;
use crate::vmm::shadow::HostTraits;

use super::board::Board;
use super::kernel::Entry;
use super::layout::{SERIAL_IRQ, virtio_place};
use super::line::Line;
use super::{LinuxError, LinuxImage, layout, load, registers};

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
        check_host(HostTraits::of_this_host())?;
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
        let outcome = self.machine.wait(timeout)?;
        Some(as_it_was_meant(outcome, reset_flag(&self.object)))
    }

    /// Tells the guest that its clock went on without it: after the process was stopped.
    pub fn tell_of_pause(&self) {
        self.machine.interrupt();
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
        self.machine.counts()
    }

    /// Why devices need a reset, or last needed one: a sentence for each.
    #[must_use]
    pub fn device_failures(&self) -> Vec<String> {
        self.board.devices().iter().filter_map(MmioTransport::failure).collect()
    }

    /// Compares the reverse map with what the window maps and the devices have translations of
    /// (invariant I3): a sentence for each difference. Once the machine is over: the
    /// devices end with this.
    #[must_use]
    pub fn check_reverse_map(&self) -> Vec<String> {
        self.stop_devices();
        let mut found = self.machine.space().check_reverse_map();
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

/// Refuses a host that would emulate the kernel, as far as it goes. One that cannot be probed is not
/// refused: whatever is wrong with it will be said when the machine is made.
fn check_host(traits: Option<HostTraits>) -> Result<(), LinuxError> {
    match traits.and_then(|traits| traits.against_stock_kernels()) {
        Some(why) => Err(LinuxError::Host { why }),
        None => Ok(()),
    }
}

/// A triple fault is one of the ways in which a kernel resets the machine (`reboot=t`, and the last that
/// Linux tries). It is told from one that was not meant by the PC's reset flag, which a kernel sets just
/// before, whichever way it takes: the processor's state is gone by then.
fn as_it_was_meant(outcome: Outcome, reset_flag: Option<u16>) -> Outcome {
    let is_asked = matches!(reset_flag, Some(layout::RESET_COLD | layout::RESET_WARM));
    match outcome {
        Outcome::Failed(VmError::Guest { source: GuestError::Shutdown, .. }) if is_asked => {
            Outcome::Rebooted
        }
        other => other,
    }
}

/// The reset flag; `None` if it cannot be read, as that of a guest whose swap has failed.
fn reset_flag(object: &MemoryObject) -> Option<u16> {
    let mut flag = [0; 2];
    object.read(Gpa::new(layout::RESET_FLAG), &mut flag).ok()?;
    Some(u16::from_le_bytes(flag))
}

fn first_registers(entry: Entry) -> Registers {
    let mut sregs: kvm_sregs = Registers::long_mode().sregs;
    let regs = registers::at_entry(entry, &mut sregs);
    Registers { regs, sregs }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn traits(ring0_native: bool, is_pvm: bool) -> HostTraits {
        HostTraits {
            accessed_returns: true,
            dirty_returns: true,
            clear_takes_effect: true,
            zap_revokes: true,
            ring0_native,
            is_pvm,
        }
    }

    #[test]
    fn a_triple_fault_is_a_reset_if_the_guest_has_said_so_before() {
        let object = super::super::tests::guest();
        let kernel = super::super::header::tests::bzimage();
        let image =
            LinuxImage { kernel: &kernel, initrd: None, cmdline: b"", vcpus: 1, devices: 0 };
        load(&object, &image).unwrap();
        let failed = |source| Outcome::Failed(VmError::Guest { vcpu: 0, rip: 0xfff0, source });
        let meant = |source| as_it_was_meant(failed(source), reset_flag(&object));
        assert!(matches!(meant(GuestError::Shutdown), Outcome::Failed(_)), "nothing was said");
        for (value, is_reset) in [(0u16, true), (0x1234, true), (0xffff, false), (0x1235, false)] {
            object.write(Gpa::new(0x472), &value.to_le_bytes()).unwrap();
            let outcome = meant(GuestError::Shutdown);
            assert_eq!(matches!(outcome, Outcome::Rebooted), is_reset, "{value:#x}: {outcome:?}");
            let other = meant(GuestError::OutsideRam { gpa: Gpa::new(0) });
            assert!(matches!(other, Outcome::Failed(_)), "{other:?}");
        }
    }

    #[test]
    fn a_host_that_emulates_ring_0_is_refused_and_says_why() {
        assert!(check_host(None).is_ok());
        assert!(check_host(Some(traits(true, false))).is_ok());
        assert!(check_host(Some(traits(true, true))).is_ok(), "a PVM with VMX or SVM beneath");
        for (is_pvm, why) in [(true, "is PVM (kvm_pvm)"), (false, "neither VMX nor SVM")] {
            let said = check_host(Some(traits(false, is_pvm))).unwrap_err().to_string();
            assert!(said.starts_with("this host cannot run stock Linux kernels: "), "{said}");
            assert!(said.contains(why) && said.contains("use a host with VMX or SVM"), "{said}");
        }
    }
}
