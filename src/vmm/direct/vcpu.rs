//! A vCPU of a plain machine: its thread, its exits.
//!
//! Guarantee: every `KVM_RUN` is inside the gate, so a stop gets the thread out within one exit; and
//! however the thread ends, by an error or a panic too, the machine ends and its waiters are told. A vCPU
//! that a signal took out of the guest tells it so when it goes back (`KVM_KVMCLOCK_CTRL`).

use std::sync::Arc;

use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::addr::Gpa;
use crate::vmm::error::{GuestError, VmError};
use crate::vmm::kvm::device::io_error;
use crate::vmm::kvm::exit_data;
use crate::vmm::kvm::registers::{Registers, load_gpr};
use crate::vmm::run::bus::{Action, HypercallResult};
use crate::vmm::run::kick::Kicker;
use crate::vmm::run::outcome::Outcome;
use crate::vmm::run::stats::LiveCounts;
use crate::vmm::run::threads::outcome_of;

use super::machine::{Begin, Shared};

/// What follows an exit.
enum Next {
    Resume,
    /// The same, by way of the gate.
    Reenter,
    /// The guest halted this vCPU, and nothing but another start wakes it.
    Park,
    End(Outcome),
}

/// Why a vCPU left its loop.
enum Left {
    Stopped,
    Parked,
    Ended(Outcome),
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

/// A vCPU; owned by its thread once that runs.
pub(super) struct Vcpu {
    pub(super) index: usize,
    pub(super) fd: VcpuFd,
    pub(super) shared: Arc<Shared>,
    /// A signal has come since it was last in the guest, maybe one that stopped the process for long.
    pub(super) was_interrupted: bool,
}

impl Vcpu {
    /// The thread's body.
    pub(super) fn thread(mut self, kicker: &Kicker) {
        let _registration = kicker.register();
        let shared = Arc::clone(&self.shared);
        let index = self.index;
        if let Some(outcome) = outcome_of(index, || self.live()) {
            shared.end(outcome);
        }
        drop(self);
        shared.roster.exited(index);
    }

    /// Runs until the machine is over; returns the outcome if this vCPU brought it about.
    fn live(&mut self) -> Result<Option<Outcome>, VmError> {
        let shared = Arc::clone(&self.shared);
        while let Some(begin) = shared.roster.wait_for_start(self.index) {
            if let Begin::At(registers) = begin {
                registers.set(&self.fd)?;
            }
            match self.run()? {
                Left::Stopped => break,
                Left::Ended(outcome) => return Ok(Some(outcome)),
                Left::Parked => {
                    if shared.roster.park(self.index) {
                        return Ok(Some(Outcome::Halted));
                    }
                }
            }
        }
        Ok(None)
    }

    fn run(&mut self) -> Result<Left, VmError> {
        let shared = Arc::clone(&self.shared);
        // Nobody holds this gate, so whoever is refused is to stop.
        while let Ok(_pass) = shared.gate.enter(self.index) {
            if std::mem::take(&mut self.was_interrupted) {
                self.tell_of_pause();
            }
            let next = loop {
                match self.step()? {
                    Next::Resume => {}
                    next => break next,
                }
            };
            match next {
                Next::Resume | Next::Reenter => {}
                Next::Park => return Ok(Left::Parked),
                Next::End(outcome) => return Ok(Left::Ended(outcome)),
            }
        }
        Ok(Left::Stopped)
    }

    /// Tells the guest that its clock may have gone on without it, so that no watchdog of its own counts
    /// that time as its.
    fn tell_of_pause(&self) {
        // Refused (EINVAL) where the guest does not use KVM's clock.
        let _ = self.fd.kvmclock_ctrl();
    }

    /// Runs guest code up to the next exit, and handles that.
    fn step(&mut self) -> Result<Next, VmError> {
        let exit = self.run_to_exit();
        self.counts(|counts| counts.exits.add(1));
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

    fn run_to_exit(&mut self) -> Exit {
        let bus = &*self.shared.bus;
        match self.fd.run() {
            Ok(VcpuExit::IoOut(port, bytes)) => Exit::Out(port, bytes.to_vec()),
            Ok(VcpuExit::IoIn(port, bytes)) => Exit::In(port, bytes.len()),
            Ok(VcpuExit::MmioRead(gpa, data)) => {
                Exit::Done(bus.mmio_read(self.index, Gpa::new(gpa), data))
            }
            Ok(VcpuExit::MmioWrite(gpa, data)) => {
                Exit::Done(bus.mmio_write(self.index, Gpa::new(gpa), data))
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
        self.counts(|counts| counts.port_exits.add(1));
        let element = self.port_element();
        for data in bytes.chunks(element) {
            let action = self.shared.bus.port_out(self.index, port, data);
            match self.follow(action)? {
                Next::Resume => {}
                next => return Ok(next),
            }
        }
        Ok(Next::Resume)
    }

    fn port_in(&mut self, port: u16, bytes: usize) -> Action {
        self.counts(|counts| counts.port_exits.add(1));
        let element = self.port_element();
        let mut answer = vec![0; bytes];
        for data in answer.chunks_mut(element) {
            match self.shared.bus.port_in(self.index, port, data) {
                Action::Continue => {}
                other => return other,
            }
        }
        exit_data::answer_port_read(&mut self.fd, &answer);
        Action::Continue
    }

    fn hypercall(&mut self) -> Result<Next, VmError> {
        self.counts(|counts| counts.hypercalls.add(1));
        let caller = Registers::of(&self.fd)?;
        let shared = Arc::clone(&self.shared);
        let start = |index, rip, argument| {
            let registers = started_by(&caller, rip, argument);
            shared.roster.start(index, Begin::At(Box::new(registers)))
        };
        match shared.bus.hypercall(self.index, &load_gpr(&caller.regs), &start) {
            HypercallResult::End(outcome) => Ok(Next::End(outcome)),
            HypercallResult::Value(value) => {
                let regs = kvm_bindings::kvm_regs { rax: value, ..caller.regs };
                self.fd
                    .set_regs(&regs)
                    .map_err(crate::vmm::kvm::device::KvmError::request("KVM_SET_REGS"))?;
                Ok(Next::Resume)
            }
        }
    }

    fn counts(&self, update: impl FnOnce(&LiveCounts)) {
        if let Some(counts) = self.shared.counts.get(self.index) {
            update(counts);
        }
    }

    fn guest_error(&self, source: GuestError) -> VmError {
        // A vCPU whose registers cannot be read is nowhere.
        let rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
        VmError::Guest { vcpu: self.index, rip, source }
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
