//! A vCPU's thread: waits for a start, runs guest code, handles its exits, parks or ends.
//!
//! Guarantee: every `KVM_RUN`, and every use of a shadow root, happens inside the gate, so a
//! pause finds the vCPU outside of both; a stop gets the thread out within one exit; and however
//! the thread ends, by an error or a panic too, the whole VM ends and its waiters are told.

use std::sync::Arc;
use std::time::Instant;

use kvm_ioctls::{SyncReg, VcpuExit, VcpuFd};

use crate::host_mm::MmError;
use crate::shadow_mmu::{LoadRoot, Root};
use crate::sync::lock;
use crate::vmm::cpu::GuestCpu;
use crate::vmm::error::{GuestError, VmError};
use crate::vmm::run::gate::{Gate, Pass, Paused, Refused};
use crate::vmm::run::kick::Kicker;
use crate::vmm::run::outcome::Outcome;
use crate::vmm::run::stats::{FaultLatency, LiveCounts};
use crate::vmm::run::threads::outcome_of;

use super::hw_regs;
use super::hw_state::RealState;
use super::monitor::MonitorStack;
use super::progress::ProgressGuard;
use super::shared::Shared;

/// How often shadow pages may run out without a single fault fixed in between.
const MAX_RECYCLES: u32 = 1000;

/// How a vCPU is to begin.
#[derive(Clone, Debug)]
pub(super) struct StartRequest {
    /// The state it begins with.
    pub(super) cpu: GuestCpu,
    /// For one that goes on from where another one was, the real processor's part of it.
    pub(super) real: Option<Box<RealState>>,
}

/// What follows an exit.
pub(super) enum Next {
    /// Back into the guest.
    Resume,
    /// The same, by way of the gate.
    Reenter,
    /// The shadow pages ran out: recycle them, then back into the guest.
    Recycle,
    /// The guest halted this vCPU.
    Park,
    /// The VM is over.
    End(Outcome),
}

/// Why a vCPU left its loop.
enum Left {
    Stopped,
    Parked,
    Ended(Outcome),
}

/// What the real registers are yet to be set from.
enum Begin {
    /// They are set.
    Done,
    /// The guest's state: the vCPU is about to start.
    Start,
    /// Another vCPU's, where this one goes on.
    GoOn(Box<RealState>),
}

/// A vCPU; owned by its thread once that runs.
pub(super) struct Vcpu {
    pub(super) index: usize,
    pub(super) fd: VcpuFd,
    pub(super) shared: Arc<Shared>,
    pub(super) stack: MonitorStack,
    /// The guest's state; its general registers, RIP and RFLAGS are current only while an
    /// exception that needs them is handled.
    pub(super) cpu: GuestCpu,
    /// The shadow root and the gate's epoch that it belongs to.
    pub(super) root: Option<(u64, Root)>,
    begin: Begin,
    pub(super) guard: ProgressGuard,
    /// Recycles since a fault was last fixed.
    pub(super) recycles: u32,
    pub(super) latency: FaultLatency,
    /// Where the guest was at the last exception, for error messages.
    pub(super) last_rip: u64,
}

impl Vcpu {
    pub(super) fn new(
        index: usize,
        fd: VcpuFd,
        shared: Arc<Shared>,
        stack: MonitorStack,
        cpu: GuestCpu,
    ) -> Self {
        Self {
            index,
            fd,
            shared,
            stack,
            cpu,
            root: None,
            begin: Begin::Start,
            guard: ProgressGuard::default(),
            recycles: 0,
            latency: FaultLatency::default(),
            last_rip: 0,
        }
    }

    /// The thread's body.
    pub(super) fn thread(mut self, kicker: &Kicker) {
        let _registration = kicker.register();
        let shared = Arc::clone(&self.shared);
        let index = self.index;
        if let Some(outcome) = outcome_of(index, || self.live()) {
            shared.end(outcome);
        }
        lock(&shared.latency).merge(&self.latency);
        drop(self);
        shared.roster.exited(index);
    }

    /// Runs until the VM is over; returns the outcome if this vCPU brought it about.
    fn live(&mut self) -> Result<Option<Outcome>, VmError> {
        let shared = Arc::clone(&self.shared);
        while let Some(request) = shared.roster.wait_for_start(self.index) {
            self.cpu = request.cpu;
            self.last_rip = self.cpu.rip;
            self.root = None;
            self.begin = request.real.map_or(Begin::Start, Begin::GoOn);
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
        loop {
            let Some(pass) = self.enter(&shared.gate)? else {
                return Ok(Left::Stopped);
            };
            let epoch = pass.epoch;
            let next = loop {
                match self.step()? {
                    Next::Resume => {}
                    next => break next,
                }
            };
            drop(pass);
            match next {
                Next::Resume | Next::Reenter => {}
                Next::Recycle => self.recycle(epoch)?,
                Next::Park => return Ok(Left::Parked),
                Next::End(outcome) => return Ok(Left::Ended(outcome)),
            }
        }
    }

    /// Gets inside the gate with a valid root in the real CR3; `None` when the VM is stopping.
    fn enter<'gate>(&mut self, gate: &'gate Gate) -> Result<Option<Pass<'gate>>, VmError> {
        loop {
            let pass = match gate.enter(self.index) {
                Ok(pass) => pass,
                Err(Refused::Stopping) => return Ok(None),
                Err(Refused::Held) => {
                    let account = self.account()?;
                    self.shared.roster.give_account(self.index, account);
                    continue;
                }
            };
            self.shared.first_entry.get_or_init(Instant::now);
            if self.root.is_some_and(|(epoch, _)| epoch == pass.epoch) {
                return Ok(Some(pass));
            }
            // No flush is due: after a recycle nothing is left, and a vCPU that begins has no past.
            match self.shared.shadow.reuse_root(&self.cpu.paging()).map_err(MmError::from)? {
                LoadRoot::Root(root) => {
                    self.root = Some((pass.epoch, root));
                    self.set_real_root(root)?;
                    return Ok(Some(pass));
                }
                LoadRoot::NeedsRecycle => {
                    let epoch = pass.epoch;
                    drop(pass);
                    self.recycle(epoch)?;
                }
            }
        }
    }

    /// How to go on from here, in this VM or in a clone of it.
    ///
    /// # Errors
    /// The outer one ends this VM; of the inner one it takes no harm.
    fn account(&mut self) -> Result<Result<StartRequest, VmError>, VmError> {
        let real = match &self.begin {
            Begin::Start => None,
            Begin::GoOn(real) => Some(real.clone()),
            Begin::Done => {
                self.settle()?;
                match RealState::of(&self.fd, &self.stack) {
                    Ok(real) => Some(Box::new(real)),
                    Err(error) => return Ok(Err(error.into())),
                }
            }
        };
        Ok(Ok(StartRequest { cpu: self.cpu.clone(), real }))
    }

    /// Has KVM complete the last exit and take the registers that were changed since. The gate has
    /// kicked this vCPU: no guest code runs.
    fn settle(&mut self) -> Result<(), VmError> {
        let exit = match self.fd.run() {
            Ok(VcpuExit::Intr) => return Ok(()),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => return Ok(()),
            Ok(exit) => format!("an exit without a run: {exit:?}"),
            Err(error) => format!("a run that was to be none failed: {error}"),
        };
        Err(self.guest_error(GuestError::UnexpectedExit { exit }))
    }

    /// Points the real CR3 at `root`; sets all other registers, too, when the vCPU begins.
    pub(super) fn set_real_root(&mut self, root: Root) -> Result<(), VmError> {
        let Some(address) = self.shared.shadow.root_machine_address(root) else {
            // Void: only a recycle makes it so, and that is kept out while this vCPU is inside.
            self.root = None;
            return Ok(());
        };
        match &self.begin {
            Begin::Start => {
                hw_regs::set_all(
                    &mut self.fd,
                    &self.shared.monitor,
                    self.index,
                    &self.cpu,
                    address,
                )?;
            }
            Begin::GoOn(real) => real.restore(&mut self.fd, &self.stack, address)?,
            Begin::Done => {
                self.fd.sync_regs_mut().sregs.cr3 = address;
                self.fd.set_sync_dirty_reg(SyncReg::SystemRegister);
            }
        }
        self.begin = Begin::Done;
        Ok(())
    }

    /// Recycles the shadow pages while no vCPU is inside, unless another did so since `epoch`.
    fn recycle(&mut self, epoch: u64) -> Result<(), VmError> {
        self.recycles += 1;
        if self.recycles > MAX_RECYCLES {
            return Err(self.guest_error(GuestError::ShadowPagesExhausted { times: self.recycles }));
        }
        match self.shared.recycle(epoch, None) {
            Paused::Done(flushed) => {
                self.counts(|counts| counts.recycles.add(1));
                Ok(flushed?)
            }
            Paused::AlreadyDone | Paused::Stopping | Paused::GivenUp => Ok(()),
        }
    }

    pub(super) fn counts(&self, update: impl FnOnce(&LiveCounts)) {
        if let Some(counts) = self.shared.counts.get(self.index) {
            update(counts);
        }
    }

    pub(super) fn guest_error(&self, source: GuestError) -> VmError {
        VmError::Guest { vcpu: self.index, rip: self.last_rip, source }
    }
}
