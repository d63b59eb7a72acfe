//! Exits of a vCPU and what follows from each.
//!
//! Guarantee: every exit either resumes the guest by the architecture's rules, or ends its VM
//! with a sentence; none is taken at the guest's word. An exit on a monitor port counts as an
//! exception only when the monitor's code made it.

use std::time::Instant;

use kvm_ioctls::{SyncReg, VcpuExit};

use crate::abi;
use crate::addr::Gva;
use crate::host_mm::MmError;
use crate::shadow_mmu::{Access, FaultOutcome, LoadRoot};
use crate::vmm::contract::hypercall::started_by;
use crate::vmm::cpu::deliver::deliver;
use crate::vmm::cpu::emulate::{
    Destination, Effect, Emulated, PortWidth, asked_behind, emulate, emulate_interrupt, low_u32,
};
use crate::vmm::cpu::exceptions::{EXCEPTION_VECTORS, Exception, Stop, has_error_code, vector};
use crate::vmm::cpu::memory::{VirtualMemory, is_usable};
use crate::vmm::cpu::{GuestCpu, gpr, is_canonical, rflags};
use crate::vmm::error::{GuestError, VmError};
use crate::vmm::kvm::device::io_error;
use crate::vmm::kvm::exit_data;
use crate::vmm::kvm::registers::{load_gpr, store_gpr};
use crate::vmm::run::bus::{Action, HypercallResult};
use crate::vmm::run::processor::Next;

use super::monitor::{ExceptionFrame, MONITOR_CS};
use super::processor::{ShadowProcessor, StartRequest};

/// Page-fault error code bits (Intel SDM Vol. 3, 5.7).
const PF_WRITE: u64 = 1 << 1;
const PF_RESERVED: u64 = 1 << 3;
const PF_FETCH: u64 = 1 << 4;

/// Length of `syscall`.
const SYSCALL_BYTES: u64 = 2;

/// An exit, detached from the vCPU that made it.
enum Exit {
    /// `out`, or a string of them: port and bytes.
    Out(u16, Vec<u8>),
    /// `out` of a single byte, as the monitor does it.
    OutByte(u16, u8),
    /// `in`: port and number of bytes wanted.
    In(u16, usize),
    Interrupted,
    Shutdown,
    InternalError,
    Failed(std::io::Error),
    Other(String),
}

impl ShadowProcessor {
    /// Runs guest code up to the next exit, and handles that.
    pub(super) fn run_to_exit(&mut self) -> Result<Next, VmError> {
        let exit = match self.fd.run() {
            Ok(VcpuExit::IoOut(port, &[byte])) => Exit::OutByte(port, byte),
            Ok(VcpuExit::IoOut(port, bytes)) => Exit::Out(port, bytes.to_vec()),
            Ok(VcpuExit::IoIn(port, bytes)) => Exit::In(port, bytes.len()),
            Ok(VcpuExit::Intr) => Exit::Interrupted,
            Ok(VcpuExit::Shutdown) => Exit::Shutdown,
            Ok(VcpuExit::InternalError) => Exit::InternalError,
            Ok(exit) => Exit::Other(format!("{exit:?}")),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => Exit::Interrupted,
            Err(error) => Exit::Failed(io_error(error)),
        };
        self.seat.count(|counts| counts.exits.add(1));
        match exit {
            Exit::OutByte(port, byte) => match u8::try_from(port) {
                Ok(vector) if self.is_in_monitor() => self.exception(vector),
                _ => self.guest_out(port, &[byte]),
            },
            Exit::Out(port, bytes) => self.guest_out(port, &bytes),
            Exit::In(port, bytes) => self.guest_in(port, bytes),
            Exit::Interrupted => Ok(Next::Reenter),
            Exit::Shutdown => Err(self.guest_error(GuestError::Shutdown)),
            Exit::InternalError => {
                let suberror = exit_data::internal_suberror(&mut self.fd);
                let real = self.fd.sync_regs_mut();
                let exit = format!(
                    "internal error {suberror} with selector {:#x} at real RIP {:#x}, RSP {:#x}, CR2 {:#x}",
                    real.sregs.cs.selector, real.regs.rip, real.regs.rsp, real.sregs.cr2
                );
                Err(self.guest_error(GuestError::UnexpectedExit { exit }))
            }
            Exit::Failed(error) => Err(self.guest_error(GuestError::Run(error))),
            Exit::Other(exit) => Err(self.guest_error(GuestError::UnexpectedExit { exit })),
        }
    }

    /// Bytes of one element of the port exit at hand.
    fn port_element(&mut self) -> Result<usize, VmError> {
        let bytes = exit_data::port_element(&mut self.fd);
        match PortWidth::from_bytes(bytes) {
            Some(width) => Ok(width.bytes()),
            None => {
                let exit = format!("port access of {bytes} bytes");
                Err(self.guest_error(GuestError::UnexpectedExit { exit }))
            }
        }
    }

    /// Whether the exit at hand was made by the monitor's code at CPL 0.
    fn is_in_monitor(&mut self) -> bool {
        let regs = self.fd.sync_regs_mut();
        let is_cpl0 = regs.sregs.cs.selector == MONITOR_CS;
        let rip = regs.regs.rip;
        is_cpl0 && self.space.monitor.holds_code(rip)
    }

    // Port accesses that the I/O bitmap lets through.

    fn guest_out(&mut self, port: u16, bytes: &[u8]) -> Result<Next, VmError> {
        self.seat.count(|counts| counts.port_exits.add(1));
        self.guard.reset();
        let element = self.port_element()?;
        for chunk in bytes.chunks_exact(element) {
            let action = self.seat.bus().port_out(self.seat.index(), port, chunk);
            match self.follow_real(action)? {
                Next::Resume => {}
                next => return Ok(next),
            }
        }
        Ok(Next::Resume)
    }

    fn guest_in(&mut self, port: u16, bytes: usize) -> Result<Next, VmError> {
        self.seat.count(|counts| counts.port_exits.add(1));
        self.guard.reset();
        let element = self.port_element()?;
        let mut answer = vec![0; bytes];
        for data in answer.chunks_exact_mut(element) {
            let action = self.seat.bus().port_in(self.seat.index(), port, data);
            match self.follow_real(action)? {
                Next::Resume => {}
                next => return Ok(next),
            }
        }
        exit_data::answer_port_read(&mut self.fd, &answer);
        Ok(Next::Resume)
    }

    /// Does what the bus says is to follow an access of the vCPU itself.
    fn follow_real(&mut self, action: Action) -> Result<Next, VmError> {
        let registers = load_gpr(&self.fd.sync_regs_mut().regs);
        match self.follow(action, &registers)? {
            None => {}
            Some(HypercallResult::End(outcome)) => return Ok(Next::End(outcome)),
            Some(HypercallResult::Value(value)) => {
                self.fd.sync_regs_mut().regs.rax = value;
                self.fd.set_sync_dirty_reg(SyncReg::Register);
            }
        }
        Ok(Next::Resume)
    }

    /// The same after an access that was emulated.
    fn follow_emulated(&mut self, action: Action) -> Result<Next, VmError> {
        match self.follow(action, &self.cpu.gpr)? {
            None => {}
            Some(HypercallResult::End(outcome)) => return Ok(Next::End(outcome)),
            Some(HypercallResult::Value(value)) => self.cpu.gpr[gpr::RAX] = value,
        }
        Ok(Next::Resume)
    }

    /// What follows an access, for a hypercall that `registers` hold, too; `None` for nothing.
    fn follow(
        &self,
        action: Action,
        registers: &[u64; 16],
    ) -> Result<Option<HypercallResult>, VmError> {
        match action {
            Action::Continue => Ok(None),
            Action::End(outcome) => Ok(Some(HypercallResult::End(outcome))),
            Action::Refuse(source) => Err(self.guest_error(source)),
            Action::Hypercall => {
                self.seat.count(|counts| counts.hypercalls.add(1));
                let start = |index, rip, argument| {
                    let cpu = started_by(&self.cpu, rip, argument);
                    self.seat.start(index, StartRequest { cpu, real: None })
                };
                Ok(Some(self.seat.bus().hypercall(self.seat.index(), registers, &start)))
            }
        }
    }

    // Exceptions.

    fn exception(&mut self, vector: u8) -> Result<Next, VmError> {
        let rsp = self.fd.sync_regs_mut().regs.rsp;
        let frame = match self.stack.read() {
            Ok(frame) if rsp == self.stack.expected_rsp(vector) && frame.cs & 3 == 3 => frame,
            _ => return Err(self.guest_error(GuestError::MonitorFault { vector, rsp })),
        };
        self.last_rip = frame.rip;
        if vector == vector::PF {
            return self.page_fault(&frame);
        }
        self.guard.reset();
        match vector {
            vector::GP => return self.general_protection(&frame),
            vector::UD => return self.undefined(&frame),
            vector::BP | vector::OF => return self.asked(&frame, vector),
            vector::AC if frame.rflags & rflags::AC != 0 => return self.forget_alignment(&frame),
            EXCEPTION_VECTORS.. => {
                let exit = format!("interrupt vector {vector}, which nothing raises");
                return Err(self.guest_error(GuestError::UnexpectedExit { exit }));
            }
            _ => {}
        }
        let exception = if has_error_code(vector) {
            Exception::with_code(vector, low_u32(frame.error_code))
        } else {
            Exception::plain(vector)
        };
        self.inject_from(&frame, exception)
    }

    /// #UD: an `int n` that this host refuses so, or the guest's own fault.
    fn undefined(&mut self, frame: &ExceptionFrame) -> Result<Next, VmError> {
        let before = self.load_guest(frame);
        let next = match emulate_interrupt(&mut self.cpu, self.space.shadow.as_ref()) {
            Some(done) => self.complete(done, &before)?,
            None => {
                self.deliver(Exception::plain(vector::UD))?;
                Next::Resume
            }
        };
        self.store_guest(&before)?;
        Ok(next)
    }

    /// What only an instruction raises: `int3`, or `int n` where the host lets it through.
    fn asked(&mut self, frame: &ExceptionFrame, vector: u8) -> Result<Next, VmError> {
        let before = self.load_guest(frame);
        let exception = asked_behind(&self.cpu, self.space.shadow.as_ref(), vector);
        self.deliver(exception)?;
        self.store_guest(&before)?;
        Ok(Next::Resume)
    }

    /// The guest is a kernel, whose accesses are never checked for alignment. Some hosts have their
    /// own CR0.AM set while it runs: without AC the access is let through.
    fn forget_alignment(&mut self, frame: &ExceptionFrame) -> Result<Next, VmError> {
        let before = self.load_guest(frame);
        self.cpu.rflags &= !rflags::AC;
        self.store_guest(&before)?;
        Ok(Next::Resume)
    }

    fn page_fault(&mut self, frame: &ExceptionFrame) -> Result<Next, VmError> {
        let begin = Instant::now();
        let gva = self.fd.sync_regs_mut().sregs.cr2;
        if gva == self.space.monitor.syscall_landing() && frame.rip == gva {
            return self.stray_syscall(frame);
        }
        if gva >= abi::GVA_LIMIT {
            return self.inject_from(frame, Exception::general_protection(0));
        }
        if frame.error_code & PF_RESERVED != 0 {
            let error =
                GuestError::ReservedBits { gva: Gva::new(gva), error_code: frame.error_code };
            return Err(self.guest_error(error));
        }
        let access = if frame.error_code & PF_FETCH != 0 {
            Access::Execute
        } else if frame.error_code & PF_WRITE != 0 {
            Access::Write
        } else {
            Access::Read
        };
        let Some((_, root)) = self.root else {
            return Ok(Next::Reenter);
        };
        match self.space.shadow.fault(&self.cpu.paging(), root, Gva::new(gva), access)? {
            FaultOutcome::Fixed => {
                self.recycles = 0;
                self.latency.record(access, begin.elapsed());
                self.seat.count(|counts| match access {
                    Access::Read => counts.read_faults.add(1),
                    Access::Write => counts.write_faults.add(1),
                    Access::Execute => counts.execute_faults.add(1),
                });
                match self.guard.fixed(frame.rip, gva, access) {
                    Ok(()) => Ok(Next::Resume),
                    Err(error) => Err(self.guest_error(error)),
                }
            }
            FaultOutcome::GuestFault { error_code } => {
                self.guard.reset();
                self.inject_from(frame, Exception::page_fault(gva, error_code))
            }
            FaultOutcome::OutsideRam { gpa } => {
                Err(self.guest_error(GuestError::OutsideRam { gpa }))
            }
            FaultOutcome::NeedsRecycle => Ok(Next::Outside),
        }
    }

    /// A `syscall` that this host let through although EFER.SCE is clear: the guest gets the #UD
    /// that it should have raised, at its address; RCX and R11 are lost. A guest that jumps to the
    /// landing itself gets the same, at an address of its choice.
    fn stray_syscall(&mut self, frame: &ExceptionFrame) -> Result<Next, VmError> {
        let registers = load_gpr(&self.fd.sync_regs_mut().regs);
        let at_syscall = ExceptionFrame {
            rip: registers[gpr::RCX].wrapping_sub(SYSCALL_BYTES),
            rflags: (registers[gpr::R11] & rflags::GUEST) | rflags::ALWAYS,
            ..*frame
        };
        self.last_rip = at_syscall.rip;
        if !is_usable(at_syscall.rip, 1) {
            return self.inject_from(frame, Exception::general_protection(0));
        }
        self.inject_from(&at_syscall, Exception::plain(vector::UD))
    }

    /// Delivers an exception that the guest raised at `frame`.
    fn inject_from(
        &mut self,
        frame: &ExceptionFrame,
        exception: Exception,
    ) -> Result<Next, VmError> {
        let before = self.load_guest(frame);
        self.deliver(exception)?;
        self.store_guest(&before)?;
        Ok(Next::Resume)
    }

    /// #GP: a privileged instruction to emulate, or the guest's own fault.
    fn general_protection(&mut self, frame: &ExceptionFrame) -> Result<Next, VmError> {
        let before = self.load_guest(frame);
        let emulated =
            emulate(&mut self.cpu, self.space.shadow.as_ref(), low_u32(frame.error_code));
        let next = match emulated {
            Ok(done) => self.complete(done, &before)?,
            Err(stop) => {
                self.inject_or_fail(stop)?;
                Next::Resume
            }
        };
        self.store_guest(&before)?;
        Ok(next)
    }

    /// Does what remains of an emulated instruction, in whose place the state was `before`.
    fn complete(&mut self, done: Emulated, before: &GuestCpu) -> Result<Next, VmError> {
        self.seat.count(|counts| counts.emulated.add(1));
        let next = match self.carry_out(done.effect)? {
            Ok(next) => next,
            Err(stop) => {
                self.cpu = before.clone();
                self.inject_or_fail(stop)?;
                return Ok(Next::Resume);
            }
        };
        if done.single_step && matches!(next, Next::Resume | Next::Outside) {
            self.deliver(Exception::plain(vector::DB))?;
        }
        Ok(next)
    }

    fn inject_or_fail(&mut self, stop: Stop) -> Result<(), VmError> {
        match stop {
            Stop::Inject(exception) => self.deliver(exception),
            Stop::Guest(error) => Err(self.guest_error(error)),
            Stop::Host(error) => Err(error.into()),
        }
    }

    fn deliver(&mut self, exception: Exception) -> Result<(), VmError> {
        match deliver(&mut self.cpu, self.space.shadow.as_ref(), exception) {
            Ok(delivered) => {
                self.seat.count(|counts| {
                    counts.injected.add(1);
                    if delivered == vector::PF {
                        counts.guest_page_faults.add(1);
                    }
                });
                Ok(())
            }
            Err(Stop::Host(error)) => Err(error.into()),
            Err(Stop::Guest(error)) => Err(self.guest_error(error)),
            // `deliver` never asks for another one; were it to, the guest would have none left.
            Err(Stop::Inject(_)) => Err(self.guest_error(GuestError::Shutdown)),
        }
    }

    /// Does outside the guest's registers what an emulated instruction asks for. With the inner error
    /// it has not been executed after all.
    fn carry_out(&mut self, effect: Effect) -> Result<Result<Next, Stop>, VmError> {
        match effect {
            Effect::None => {}
            Effect::LoadRoot => return self.load_root().map(Ok),
            Effect::FlushPage(gva) => {
                if let Some((_, root)) = self.root {
                    self.space.shadow.invlpg(root, gva).map_err(MmError::from)?;
                }
            }
            Effect::Halt => return Ok(Ok(Next::Park)),
            Effect::Cpuid { leaf, subleaf } => {
                self.space.cpuid.complete(&mut self.cpu, leaf, subleaf);
            }
            Effect::Interrupt { vector, rip } => self.deliver(Exception::asked(vector, rip))?,
            Effect::PortRead { port, width, into } => {
                let mut value = [0; 4];
                let bytes = &mut value[..width.bytes()];
                let action = self.seat.bus().port_in(self.seat.index(), port, bytes);
                match self.follow_emulated(action)? {
                    Next::Resume => {}
                    next => return Ok(Ok(next)),
                }
                match into {
                    Destination::Accumulator => {
                        self.cpu.complete_port_read(width, u32::from_le_bytes(value));
                    }
                    Destination::Memory(gva) => {
                        let bytes = &value[..width.bytes()];
                        let paging = self.cpu.paging();
                        // It was checked; only another vCPU's change in between makes it fail.
                        if let Err(error) = self.space.shadow.write(&paging, gva, bytes) {
                            return Ok(Err(error.into()));
                        }
                    }
                }
            }
            Effect::PortWrite { port, width, value } => {
                let bytes = &value.to_le_bytes()[..width.bytes()];
                let action = self.seat.bus().port_out(self.seat.index(), port, bytes);
                return self.follow_emulated(action).map(Ok);
            }
        }
        Ok(Ok(Next::Resume))
    }

    fn load_root(&mut self) -> Result<Next, VmError> {
        match self.space.shadow.load_root(&self.cpu.paging()).map_err(MmError::from)? {
            LoadRoot::Root(root) => {
                if let Some((_, current)) = &mut self.root {
                    *current = root;
                }
                self.set_real_root(root)?;
                Ok(Next::Resume)
            }
            LoadRoot::NeedsRecycle => {
                // The old root must not be taken for the new CR3's.
                self.root = None;
                Ok(Next::Outside)
            }
        }
    }

    // The guest's registers while its exception is handled.

    /// Brings `cpu` up to date with the exception frame and the real registers; returns a copy.
    fn load_guest(&mut self, frame: &ExceptionFrame) -> GuestCpu {
        let real = self.fd.sync_regs_mut();
        self.cpu.gpr = load_gpr(&real.regs);
        self.cpu.fs_base = real.sregs.fs.base;
        self.cpu.gs_base = real.sregs.gs.base;
        self.cpu.gpr[gpr::RSP] = frame.rsp;
        self.cpu.rip = frame.rip;
        self.cpu.rflags = frame.rflags | rflags::ALWAYS;
        self.cpu.clone()
    }

    /// Carries what changed since `before` over to the exception frame and the real registers.
    fn store_guest(&mut self, before: &GuestCpu) -> Result<(), VmError> {
        let cpu = &self.cpu;
        // The monitor's `iretq` must not fault: that needs a canonical RIP, and the guest may
        // have run off the end of the address space.
        if !is_canonical(cpu.rip) {
            let exit = format!("jump to the non-canonical address {:#x}", cpu.rip);
            return Err(self.guest_error(GuestError::UnexpectedExit { exit }));
        }
        let rsp = cpu.gpr[gpr::RSP];
        if self.stack.write(cpu.rip, cpu.rflags, rsp).is_err() {
            return Err(self.guest_error(GuestError::MonitorFault { vector: vector::GP, rsp }));
        }
        let others_changed =
            (0..16).any(|index| index != gpr::RSP && cpu.gpr[index] != before.gpr[index]);
        if others_changed {
            store_gpr(&mut self.fd.sync_regs_mut().regs, &cpu.gpr);
            self.fd.set_sync_dirty_reg(SyncReg::Register);
        }
        let has_new_bases = (cpu.fs_base, cpu.gs_base) != (before.fs_base, before.gs_base);
        let controls = (cpu.real_cr0(), cpu.real_cr4());
        if has_new_bases || controls != (before.real_cr0(), before.real_cr4()) {
            let sregs = &mut self.fd.sync_regs_mut().sregs;
            sregs.fs.base = cpu.fs_base;
            sregs.gs.base = cpu.gs_base;
            (sregs.cr0, sregs.cr4) = controls;
            self.fd.set_sync_dirty_reg(SyncReg::SystemRegister);
        }
        Ok(())
    }
}
