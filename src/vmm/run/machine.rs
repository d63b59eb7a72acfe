//! A machine: its vCPUs' threads, from their start to the outcome.
//!
//! Guarantee: a machine that was started ends exactly once, with one [`Outcome`], by its guest or by whoever
//! ends it, by an error or a panic under one of its vCPUs; and when that was [waited for](Machine::wait), or
//! the value is dropped, none of its threads runs any more. Guest code runs inside the gate only: a pause
//! finds every vCPU outside, and a stop gets it out within one exit. That holds for every [`Processor`]: the
//! loop of a vCPU is here, once.

use std::any::Any;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::sys::Patience;
use crate::vmm::error::VmError;

use super::brief_wait::BriefWait;
use super::core::{Core, Ender};
use super::gate::{Paused, Position, Refused};
use super::kick::Kick;
use super::outcome::Outcome;
use super::processor::{Next, Processor, Space};
use super::roster::{Census, VcpuState};
use super::stats::VcpuCounts;
use super::threads::{outcome_of, spawn_vcpu};

/// How long the threads of a machine may take to end before they are left behind.
const JOIN_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a vCPU may wait for a page after the end before it is [let go](Space::let_go) without.
const PAGE_PATIENCE: Duration = Duration::from_millis(250);

/// What a machine is put together from.
pub(in crate::vmm) struct Parts<P: Processor> {
    /// What its threads share.
    pub(in crate::vmm) core: Arc<Core<P::Start>>,
    /// What maps its memory.
    pub(in crate::vmm) space: Arc<P::Space>,
    /// In the order of their seats.
    pub(in crate::vmm) processors: Vec<P>,
    /// How each begins, by index; `None` for those that wait to be started by another.
    pub(in crate::vmm) starts: Vec<Option<P::Start>>,
    /// What is to outlive the threads.
    pub(in crate::vmm) keep: Option<Box<dyn Any + Send + Sync>>,
}

/// See the module's documentation.
pub struct Machine<P: Processor> {
    // In the order in which they go: no guest can run when its memory does.
    /// Before the start.
    processors: Vec<P>,
    starts: Vec<Option<P::Start>>,
    threads: Vec<JoinHandle<()>>,
    /// Those of the bus.
    helpers: Vec<JoinHandle<()>>,
    space: Arc<P::Space>,
    core: Arc<Core<P::Start>>,
    _keep: Option<Box<dyn Any + Send + Sync>>,
}

impl<P: Processor> Machine<P> {
    /// Ready to start.
    pub(in crate::vmm) fn of(parts: Parts<P>) -> Self {
        let Parts { core, space, processors, starts, keep } = parts;
        let (threads, helpers) = (Vec::new(), Vec::new());
        Self { processors, starts, threads, helpers, space, core, _keep: keep }
    }

    /// Starts the threads, and lets those vCPUs run that begin by themselves. Starting twice does nothing.
    ///
    /// # Errors
    /// A thread that cannot be started; the machine is then over.
    pub fn start(&mut self) -> Result<(), VmError> {
        let processors = std::mem::take(&mut self.processors);
        if processors.is_empty() {
            return Ok(());
        }
        self.start_threads(processors).inspect_err(|_| self.kill())
    }

    fn start_threads(&mut self, processors: Vec<P>) -> Result<(), VmError> {
        self.helpers = self.core.bus.start(self.core.ender())?;
        // All of them before the first thread: one that halts at once is not the last that runs.
        for (index, start) in std::mem::take(&mut self.starts).into_iter().enumerate() {
            if let Some(start) = start {
                // Refused only if it runs already.
                let _ = self.core.roster.start(index, start);
            }
        }
        for (index, processor) in processors.into_iter().enumerate() {
            let core = self.core.clone();
            self.threads.push(spawn_vcpu(index, move || thread(index, processor, &core))?);
        }
        Ok(())
    }

    /// Waits until the machine is over and all its threads are done; `None` when `timeout` passes first, or
    /// when the outcome was taken by an earlier call, or it was never started.
    pub fn wait(&mut self, timeout: Option<Duration>) -> Option<Outcome> {
        if self.threads.is_empty() || !self.wait_for_threads(&mut timeout.map(Patience::new)) {
            return None;
        }
        self.join();
        self.core.roster.take_outcome()
    }

    /// Whether every thread was done in time.
    fn wait_for_threads(&self, patience: &mut Option<Patience>) -> bool {
        loop {
            let slice = patience.as_mut().map_or(Some(PAGE_PATIENCE), Patience::slice);
            let mut waited = Some(Patience::new(slice.unwrap_or_default()));
            if self.core.roster.wait_for_exit(self.threads.len(), &mut waited) {
                return self.core.bus.wait_until_over(patience);
            }
            if self.core.has_been_over_for(PAGE_PATIENCE) {
                self.space.let_go();
            }
            if slice.is_none() {
                return false;
            }
        }
    }

    /// Ends the machine at once, whatever its guest does. Does not wait; [`Self::wait`] does.
    pub fn kill(&self) {
        self.core.end(Outcome::Killed);
    }

    /// Takes all vCPUs out of the guest and lets them back in: after the process was stopped, it is told so
    /// in those that were on their way out of it by themselves, too.
    pub fn interrupt(&self) {
        self.core.gate.kicks().iter().for_each(|kick| kick.kick());
    }

    /// A way to end it from elsewhere.
    #[must_use]
    pub fn ender(&self) -> Ender {
        self.core.ender()
    }

    /// What the vCPUs counted so far, by index.
    #[must_use]
    pub fn vcpu_counts(&self) -> Vec<VcpuCounts> {
        self.core.counts()
    }

    /// What the vCPUs counted so far, all together.
    #[must_use]
    pub fn counts(&self) -> VcpuCounts {
        let mut total = VcpuCounts::default();
        for counts in self.core.counts() {
            total.add(&counts);
        }
        total
    }

    /// Life of each vCPU by index, and where it is with respect to a pause of all.
    #[must_use]
    pub fn vcpu_states(&self) -> Vec<(VcpuState, Position)> {
        self.core.roster.states().into_iter().zip(self.core.gate.positions()).collect()
    }

    /// What maps its memory.
    #[must_use]
    pub fn space(&self) -> &Arc<P::Space> {
        &self.space
    }

    /// When the first vCPU was first let in.
    pub(in crate::vmm) fn first_entry(&self) -> Option<Instant> {
        self.core.first_entry()
    }

    /// How each vCPU is to begin, before the start.
    pub(in crate::vmm) fn begin_by(&mut self, starts: Vec<Option<P::Start>>) {
        self.starts = starts;
    }

    /// Has every vCPU stop at the gate and say how to go on, for as long as the result lives.
    ///
    /// # Errors
    /// [`VmError::NotRunning`] if the machine is over; [`VmError::NotInTime`], and then all go on.
    pub(in crate::vmm) fn census(
        &self,
        brief: &mut BriefWait,
    ) -> Result<Census<'_, P::Start>, VmError> {
        self.core.roster.census(&self.core.gate, brief)
    }

    /// Runs `work` while no vCPU is inside the gate; left out when one does not come out in time, or the
    /// machine is over.
    pub(in crate::vmm) fn pause_briefly<T>(&self, work: impl FnOnce() -> T) -> Paused<T> {
        self.core.pause_all(self.core.gate.epoch(), Some(BriefWait::begin()), work)
    }

    fn join(&mut self) {
        for thread in self.threads.drain(..).chain(self.helpers.drain(..)) {
            // A panic was already turned into the outcome.
            let _ = thread.join();
        }
    }
}

impl<P: Processor> Drop for Machine<P> {
    fn drop(&mut self) {
        if self.threads.is_empty() && self.helpers.is_empty() {
            return;
        }
        self.kill();
        if self.wait_for_threads(&mut Some(Patience::new(JOIN_TIMEOUT))) {
            self.join();
        }
        // Otherwise a thread is left behind, kicked, with everything that it uses, which it shares by
        // reference counts: a leak, but nothing dangles.
    }
}

/// Why a vCPU left its loop.
enum Left {
    Stopped,
    Parked,
    Ended(Outcome),
}

/// A vCPU's thread gets kicks, for as long as this lives.
struct Attached<'a>(Option<&'a Arc<dyn Kick>>);

impl<'a> Attached<'a> {
    fn new(kick: Option<&'a Arc<dyn Kick>>) -> Self {
        kick.inspect(|kick| kick.attach());
        Self(kick)
    }
}

impl Drop for Attached<'_> {
    fn drop(&mut self) {
        self.0.inspect(|kick| kick.detach());
    }
}

/// The body of a vCPU's thread.
fn thread<P: Processor>(index: usize, mut processor: P, core: &Core<P::Start>) {
    let _attached = Attached::new(core.gate.kicks().get(index));
    if let Some(outcome) = outcome_of(index, || live(index, &mut processor, core)) {
        core.end(outcome);
    }
    let leave = || {
        processor.leave();
        Ok(None)
    };
    if let Some(outcome) = outcome_of(index, leave) {
        core.end(outcome);
    }
    core.roster.exited(index);
}

/// Runs until the machine is over; returns the outcome if this vCPU brought it about.
fn live<P: Processor>(
    index: usize,
    processor: &mut P,
    core: &Core<P::Start>,
) -> Result<Option<Outcome>, VmError> {
    while let Some(start) = core.roster.wait_for_start(index) {
        processor.begin(start)?;
        match run(index, processor, core)? {
            Left::Stopped => break,
            Left::Ended(outcome) => return Ok(Some(outcome)),
            Left::Parked => {
                if core.roster.park(index) {
                    return Ok(Some(Outcome::Halted));
                }
            }
        }
    }
    Ok(None)
}

/// The loop of a vCPU, from its start to its halt.
fn run<P: Processor>(
    index: usize,
    processor: &mut P,
    core: &Core<P::Start>,
) -> Result<Left, VmError> {
    loop {
        let pass = match core.gate.enter(index) {
            Ok(pass) => pass,
            Err(Refused::Stopping) => return Ok(Left::Stopped),
            Err(Refused::Held) => {
                core.roster.give_account(index, processor.account()?);
                continue;
            }
        };
        core.entered();
        let epoch = pass.epoch;
        let mut next = processor.enter(epoch)?;
        while matches!(next, Next::Resume) {
            next = processor.step()?;
        }
        drop(pass);
        match next {
            Next::Resume | Next::Reenter => {}
            Next::Outside => processor.outside(epoch)?,
            Next::Park => return Ok(Left::Parked),
            Next::End(outcome) => return Ok(Left::Ended(outcome)),
        }
    }
}

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;
