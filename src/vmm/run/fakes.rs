//! A kind of machine without KVM, for tests: what a new kind has to bring is what is here.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use crate::abi;
use crate::export_rmap::ClientId;
use crate::sync::{Condvar, Mutex, lock};
use crate::vmm::error::VmError;

use super::bus::{Action, Bus, HypercallResult};
use super::core::{Core, Seat};
use super::gate::Paused;
use super::kick::Kick;
use super::machine::{Machine, Parts};
use super::outcome::Outcome;
use super::processor::{Next, Processor, Space};
use super::stats::PagingStats;

/// A vCPU without KVM: "guest mode" is waiting until kicked.
#[derive(Default)]
pub(super) struct FakeKick {
    kicked: Mutex<bool>,
    changed: Condvar,
    attached: Mutex<bool>,
}

impl Kick for FakeKick {
    fn kick(&self) {
        *lock(&self.kicked) = true;
        self.changed.notify_all();
    }

    fn rearm(&self) {
        *lock(&self.kicked) = false;
    }

    fn attach(&self) {
        *lock(&self.attached) = true;
    }

    fn detach(&self) {
        *lock(&self.attached) = false;
    }
}

impl FakeKick {
    pub(super) fn run_until_kicked(&self) {
        let mut kicked = lock(&self.kicked);
        while !*kicked {
            kicked = self.changed.wait(kicked).unwrap();
        }
    }

    /// Whether a kick is yet to be answered.
    pub(super) fn is_kicked(&self) -> bool {
        *lock(&self.kicked)
    }

    /// Whether a thread gets the kicks.
    pub(super) fn is_attached(&self) -> bool {
        *lock(&self.attached)
    }
}

/// Fails the test, rather than hang it, if `body` deadlocks.
pub(in crate::vmm) fn within_a_minute(body: impl FnOnce() + Send + 'static) {
    let (done, wait) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        body();
        let _ = done.send(());
    });
    if wait.recv_timeout(Duration::from_secs(60)) == Err(mpsc::RecvTimeoutError::Timeout) {
        panic!("deadlock");
    }
    thread.join().unwrap();
}

/// What a guest does here, one a step.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Op {
    Work,
    /// An access to a port.
    Out(u16, Vec<u8>),
    /// A hypercall with these registers.
    Call([u64; 16]),
    /// For ever, until kicked.
    Hang,
    /// In the kernel, until the machine lets go; no kick gets it out of there.
    AwaitPage,
    /// What is done outside the gate: everybody is paused.
    Outside,
    /// Of another vCPU, once that one has halted.
    Start(usize, Vec<Op>),
    Halt,
    Exit(u8),
    Panic(&'static str),
    PanicAtTheEnd,
}

/// Nothing is mapped here; it is told what the processors do.
#[derive(Default)]
pub(crate) struct FakeSpace {
    pub(super) epochs: Mutex<Vec<u64>>,
    pub(super) is_let_go: Mutex<bool>,
    changed: Condvar,
    panics_at_the_end: AtomicBool,
    pub(super) left: AtomicU64,
    /// What hypercalls have come to.
    pub(in crate::vmm) answers: Mutex<Vec<u64>>,
}

impl FakeSpace {
    fn await_page(&self) {
        let mut is_let_go = lock(&self.is_let_go);
        while !*is_let_go {
            is_let_go = self.changed.wait(is_let_go).unwrap();
        }
    }
}

impl Space for FakeSpace {
    fn client_id(&self) -> ClientId {
        // Above those that are given out.
        ClientId::new(900).unwrap()
    }

    fn paging_stats(&self) -> PagingStats {
        PagingStats::default()
    }

    fn check_reverse_map(&self) -> Vec<String> {
        Vec::new()
    }

    fn let_go(&self) {
        *lock(&self.is_let_go) = true;
        self.changed.notify_all();
    }
}

/// Does what it is told.
pub(crate) struct FakeProcessor {
    seat: Seat<Vec<Op>>,
    space: Arc<FakeSpace>,
    kick: Arc<FakeKick>,
    program: Vec<Op>,
}

impl Processor for FakeProcessor {
    type Start = Vec<Op>;
    type Space = FakeSpace;

    fn begin(&mut self, start: Vec<Op>) -> Result<(), VmError> {
        self.program = start;
        Ok(())
    }

    fn enter(&mut self, epoch: u64) -> Result<Next, VmError> {
        lock(&self.space.epochs).push(epoch);
        Ok(Next::Resume)
    }

    fn step(&mut self) -> Result<Next, VmError> {
        assert!(self.kick.is_attached(), "no kick would reach this thread");
        let op = self.program.first().cloned().unwrap_or(Op::Halt);
        if op == Op::Hang {
            self.kick.run_until_kicked();
            return Ok(Next::Reenter);
        }
        self.seat.count(|counts| counts.exits.add(1));
        self.program.drain(..1.min(self.program.len()));
        match op {
            Op::Work | Op::Hang => Ok(Next::Resume),
            Op::Out(port, bytes) => self.out(port, &bytes, &[0; 16]),
            Op::Call(registers) => self.out(abi::PORT_HYPERCALL, &[0; 4], &registers),
            Op::AwaitPage => {
                self.space.await_page();
                Ok(Next::Reenter)
            }
            Op::Outside => Ok(Next::Outside),
            Op::Start(vcpu, program) => {
                while self.seat.start(vcpu, program.clone()).is_err() {
                    std::thread::yield_now();
                }
                Ok(Next::Resume)
            }
            Op::Halt => Ok(Next::Park),
            Op::Exit(code) => Ok(Next::End(Outcome::GuestExit(code))),
            Op::Panic(text) => panic!("{text}"),
            Op::PanicAtTheEnd => {
                self.space.panics_at_the_end.store(true, Ordering::Relaxed);
                Ok(Next::Park)
            }
        }
    }

    fn outside(&mut self, epoch: u64) -> Result<(), VmError> {
        match self.seat.pause_all(epoch, || ()) {
            Paused::GivenUp => panic!("a vCPU does not give up"),
            _ => Ok(()),
        }
    }

    fn account(&mut self) -> Result<Result<Vec<Op>, VmError>, VmError> {
        Ok(Ok(self.program.clone()))
    }

    fn leave(self) {
        self.space.left.fetch_add(1, Ordering::Relaxed);
        assert!(!self.space.panics_at_the_end.load(Ordering::Relaxed), "cannot leave");
    }
}

impl FakeProcessor {
    fn out(&self, port: u16, bytes: &[u8], registers: &[u64; 16]) -> Result<Next, VmError> {
        let (bus, vcpu) = (self.seat.bus(), self.seat.index());
        match bus.port_out(vcpu, port, bytes) {
            Action::Continue => Ok(Next::Resume),
            Action::End(outcome) => Ok(Next::End(outcome)),
            Action::Refuse(source) => Err(VmError::Guest { vcpu, rip: 0x1000, source }),
            Action::Hypercall => {
                // It ends with what is its argument.
                let start = |index, _rip, argument: u64| {
                    self.seat.start(index, vec![Op::Exit(argument.to_le_bytes()[0])])
                };
                match bus.hypercall(vcpu, registers, &start) {
                    HypercallResult::End(outcome) => Ok(Next::End(outcome)),
                    HypercallResult::Value(value) => {
                        lock(&self.space.answers).push(value);
                        Ok(Next::Resume)
                    }
                }
            }
        }
    }
}

/// A machine whose vCPUs begin with these programs; none, where one waits to be started.
pub(in crate::vmm) fn machine(
    bus: Arc<dyn Bus>,
    starts: Vec<Option<Vec<Op>>>,
) -> Machine<FakeProcessor> {
    let kicks: Vec<Arc<FakeKick>> = starts.iter().map(|_| Arc::default()).collect();
    let dynamic = kicks.iter().map(|kick| kick.clone() as Arc<dyn Kick>).collect();
    let core = Core::new(dynamic, bus);
    let space = Arc::<FakeSpace>::default();
    let processors = kicks.into_iter().enumerate().map(|(index, kick)| FakeProcessor {
        seat: core.seat(index),
        space: space.clone(),
        kick,
        program: Vec::new(),
    });
    let processors = processors.collect();
    Machine::of(Parts { core, space, processors, starts, keep: None })
}
