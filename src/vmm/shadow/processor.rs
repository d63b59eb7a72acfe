//! A processor of a VM with shadow paging: what it runs on, from its start to a clone's.
//!
//! Guarantee: a shadow root is used inside the gate only, and none that a recycle made void: the real CR3
//! holds a root of the epoch at which the gate let the vCPU in. Shadow pages that run out are recycled while
//! nobody is inside, and not for ever.

use std::sync::Arc;

use kvm_ioctls::{SyncReg, VcpuExit, VcpuFd};

use crate::host_mm::MmError;
use crate::shadow_mmu::{LoadRoot, Root};
use crate::sync::lock;
use crate::vmm::cpu::GuestCpu;
use crate::vmm::error::{GuestError, VmError};
use crate::vmm::run::core::Seat;
use crate::vmm::run::gate::Paused;
use crate::vmm::run::processor::{Next, Processor};
use crate::vmm::run::stats::FaultLatency;

use super::hw_regs;
use super::hw_state::RealState;
use super::monitor::MonitorStack;
use super::progress::ProgressGuard;
use super::space::ShadowSpace;

/// How often shadow pages may run out without a single fault fixed in between.
const MAX_RECYCLES: u32 = 1000;

/// How a vCPU is to begin.
#[derive(Clone, Debug)]
pub struct StartRequest {
    /// The state it begins with.
    pub(super) cpu: GuestCpu,
    /// For one that goes on from where another one was, the real processor's part of it.
    pub(super) real: Option<Box<RealState>>,
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

/// See the module's documentation.
pub struct ShadowProcessor {
    pub(super) fd: VcpuFd,
    pub(super) seat: Seat<StartRequest>,
    pub(super) space: Arc<ShadowSpace>,
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

impl Processor for ShadowProcessor {
    type Start = StartRequest;
    type Space = ShadowSpace;

    fn begin(&mut self, start: StartRequest) -> Result<(), VmError> {
        self.cpu = start.cpu;
        self.last_rip = self.cpu.rip;
        self.root = None;
        self.begin = start.real.map_or(Begin::Start, Begin::GoOn);
        Ok(())
    }

    /// With a valid root in the real CR3.
    fn enter(&mut self, epoch: u64) -> Result<Next, VmError> {
        if self.root.is_some_and(|(of, _)| of == epoch) {
            return Ok(Next::Resume);
        }
        // No flush is due: after a recycle nothing is left, and a vCPU that begins has no past.
        match self.space.shadow.reuse_root(&self.cpu.paging()).map_err(MmError::from)? {
            LoadRoot::Root(root) => {
                self.root = Some((epoch, root));
                self.set_real_root(root)?;
                Ok(Next::Resume)
            }
            LoadRoot::NeedsRecycle => Ok(Next::Outside),
        }
    }

    fn step(&mut self) -> Result<Next, VmError> {
        self.run_to_exit()
    }

    /// Recycles the shadow pages while no vCPU is inside, unless another did so since `epoch`.
    fn outside(&mut self, epoch: u64) -> Result<(), VmError> {
        self.recycles += 1;
        if self.recycles > MAX_RECYCLES {
            return Err(self.guest_error(GuestError::ShadowPagesExhausted { times: self.recycles }));
        }
        match self.seat.pause_all(epoch, || self.space.recycle()) {
            Paused::Done(flushed) => {
                self.seat.count(|counts| counts.recycles.add(1));
                Ok(flushed?)
            }
            Paused::AlreadyDone | Paused::Stopping | Paused::GivenUp => Ok(()),
        }
    }

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

    fn leave(self) {
        lock(&self.space.latency).merge(&self.latency);
    }
}

impl ShadowProcessor {
    pub(super) fn new(
        fd: VcpuFd,
        seat: Seat<StartRequest>,
        space: Arc<ShadowSpace>,
        stack: MonitorStack,
        cpu: GuestCpu,
    ) -> Self {
        Self {
            fd,
            seat,
            space,
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
        let Some(address) = self.space.shadow.root_machine_address(root) else {
            // Void: only a recycle makes it so, and that is kept out while this vCPU is inside.
            self.root = None;
            return Ok(());
        };
        match &self.begin {
            Begin::Start => {
                hw_regs::set_all(
                    &mut self.fd,
                    &self.space.monitor,
                    self.seat.index(),
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

    pub(super) fn guest_error(&self, source: GuestError) -> VmError {
        VmError::Guest { vcpu: self.seat.index(), rip: self.last_rip, source }
    }
}
