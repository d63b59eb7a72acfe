//! A processor of a plain machine: its exits.
//!
//! Guarantee: every exit resumes the guest by what the bus answers, or ends the machine with a sentence. A
//! vCPU that a signal took out of the guest tells it so when it goes back (`KVM_KVMCLOCK_CTRL`).

use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::addr::Gpa;
use crate::vmm::error::{GuestError, VmError};
use crate::vmm::kvm::device::{KvmError, io_error};
use crate::vmm::kvm::exit_data;
use crate::vmm::kvm::registers::{Registers, load_gpr};
use crate::vmm::run::bus::{Action, HypercallResult};
use crate::vmm::run::core::Seat;
use crate::vmm::run::processor::{Next, Processor};

use super::space::DirectSpace;

/// How a vCPU begins.
#[derive(Clone)]
pub enum Begin {
    /// With these registers.
    At(Box<Registers>),
    /// In the kernel, waiting for the interrupts that start a processor.
    ByInterrupt,
}

/// An exit that is handled with the vCPU's own registers or data.
enum Exit {
    Out(u16, Vec<u8>),
    In(u16, usize),
    Done(Action),
    Interrupted,
    Halt,
    Shutdown,
    InternalError,
    Unexpected(String),
    Failed(std::io::Error),
}

/// See the module's documentation.
pub struct DirectProcessor {
    fd: VcpuFd,
    seat: Seat<Begin>,
    /// A signal has come since it was last in the guest, maybe one that stopped the process for long.
    was_interrupted: bool,
}

impl Processor for DirectProcessor {
    type Start = Begin;
    type Space = DirectSpace;

    fn begin(&mut self, start: Begin) -> Result<(), VmError> {
        match start {
            Begin::At(registers) => Ok(registers.set(&self.fd)?),
            Begin::ByInterrupt => Ok(()),
        }
    }

    /// Tells the guest that its clock may have gone on without it, so that no watchdog of its own counts
    /// that time as its.
    fn enter(&mut self, _epoch: u64) -> Result<Next, VmError> {
        if std::mem::take(&mut self.was_interrupted) {
            // Refused (EINVAL) where the guest does not use KVM's clock.
            let _ = self.fd.kvmclock_ctrl();
        }
        Ok(Next::Resume)
    }

    fn step(&mut self) -> Result<Next, VmError> {
        let exit = self.run_to_exit();
        self.seat.count(|counts| counts.exits.add(1));
        let action = match exit {
            Exit::Out(port, bytes) => return self.port_out(port, &bytes),
            Exit::In(port, bytes) => self.port_in(port, bytes),
            Exit::Done(action) => action,
            Exit::Interrupted => {
                self.was_interrupted = true;
                return Ok(Next::Reenter);
            }
            Exit::Halt => return Ok(Next::Park),
            Exit::Shutdown => Action::Refuse(GuestError::Shutdown),
            Exit::InternalError => {
                let suberror = exit_data::internal_suberror(&mut self.fd);
                Action::Refuse(GuestError::UnexpectedExit {
                    exit: format!(
                        "internal error {suberror}: KVM cannot emulate what the guest executes there"
                    ),
                })
            }
            Exit::Unexpected(exit) => Action::Refuse(GuestError::UnexpectedExit { exit }),
            Exit::Failed(error) => Action::Refuse(GuestError::Run(error)),
        };
        self.follow(action)
    }
}

impl DirectProcessor {
    pub(super) fn new(fd: VcpuFd, seat: Seat<Begin>) -> Self {
        Self { fd, seat, was_interrupted: false }
    }

    fn run_to_exit(&mut self) -> Exit {
        let (bus, index) = (self.seat.bus(), self.seat.index());
        match self.fd.run() {
            Ok(VcpuExit::IoOut(port, bytes)) => Exit::Out(port, bytes.to_vec()),
            Ok(VcpuExit::IoIn(port, bytes)) => Exit::In(port, bytes.len()),
            Ok(VcpuExit::MmioRead(gpa, data)) => {
                Exit::Done(bus.mmio_read(index, Gpa::new(gpa), data))
            }
            Ok(VcpuExit::MmioWrite(gpa, data)) => {
                Exit::Done(bus.mmio_write(index, Gpa::new(gpa), data))
            }
            Ok(VcpuExit::Intr) => Exit::Interrupted,
            Ok(VcpuExit::Hlt) => Exit::Halt,
            Ok(VcpuExit::Shutdown) => Exit::Shutdown,
            Ok(VcpuExit::InternalError) => Exit::InternalError,
            Ok(VcpuExit::FailEntry(reason, processor)) => Exit::Unexpected(format!(
                "processor {processor} refused to enter the guest, for hardware reason {reason:#x}"
            )),
            Ok(exit) => Exit::Unexpected(format!("{exit:?}")),
            // EAGAIN: a processor that waits for another to start it has been woken.
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => Exit::Interrupted,
            Err(error) => Exit::Failed(io_error(error)),
        }
    }

    fn follow(&mut self, action: Action) -> Result<Next, VmError> {
        match action {
            Action::Continue => Ok(Next::Resume),
            Action::End(outcome) => Ok(Next::End(outcome)),
            Action::Refuse(source) => Err(self.guest_error(source)),
            Action::Hypercall => self.hypercall(),
        }
    }

    /// What an element of the port access at hand takes; a width that no processor has is one of 1.
    fn port_element(&mut self) -> usize {
        exit_data::port_element(&mut self.fd).max(1)
    }

    fn port_out(&mut self, port: u16, bytes: &[u8]) -> Result<Next, VmError> {
        self.seat.count(|counts| counts.port_exits.add(1));
        let element = self.port_element();
        for data in bytes.chunks(element) {
            let action = self.seat.bus().port_out(self.seat.index(), port, data);
            match self.follow(action)? {
                Next::Resume => {}
                next => return Ok(next),
            }
        }
        Ok(Next::Resume)
    }

    fn port_in(&mut self, port: u16, bytes: usize) -> Action {
        self.seat.count(|counts| counts.port_exits.add(1));
        let element = self.port_element();
        let mut answer = vec![0; bytes];
        for data in answer.chunks_mut(element) {
            match self.seat.bus().port_in(self.seat.index(), port, data) {
                Action::Continue => {}
                other => return other,
            }
        }
        exit_data::answer_port_read(&mut self.fd, &answer);
        Action::Continue
    }

    fn hypercall(&mut self) -> Result<Next, VmError> {
        self.seat.count(|counts| counts.hypercalls.add(1));
        let caller = Registers::of(&self.fd)?;
        let start = |index, rip, argument| {
            let registers = started_by(&caller, rip, argument);
            self.seat.start(index, Begin::At(Box::new(registers)))
        };
        let registers = load_gpr(&caller.regs);
        match self.seat.bus().hypercall(self.seat.index(), &registers, &start) {
            HypercallResult::End(outcome) => Ok(Next::End(outcome)),
            HypercallResult::Value(value) => {
                let regs = kvm_bindings::kvm_regs { rax: value, ..caller.regs };
                self.fd.set_regs(&regs).map_err(KvmError::request("KVM_SET_REGS"))?;
                Ok(Next::Resume)
            }
        }
    }

    fn guest_error(&self, source: GuestError) -> VmError {
        // A vCPU whose registers cannot be read is nowhere.
        let rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
        VmError::Guest { vcpu: self.seat.index(), rip, source }
    }
}

/// The state of a vCPU that `caller` starts, at CPL 0: its control registers and descriptor tables, and
/// nothing else of it.
fn started_by(caller: &Registers, rip: u64, argument: u64) -> Registers {
    let mut started = Registers::long_mode();
    (started.regs.rip, started.regs.rdi) = (rip, argument);
    let (from, to) = (&caller.sregs, &mut started.sregs);
    (to.cr0, to.cr3, to.cr4, to.efer) = (from.cr0, from.cr3, from.cr4, from.efer);
    (to.gdt, to.idt) = (from.gdt, from.idt);
    started
}
