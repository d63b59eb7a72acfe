//! What the threads of a machine share, whatever its processors are.
//!
//! Guarantee: the first outcome stands, and once there is one, no vCPU is let in, those inside are kicked
//! out, and whoever waits in a device goes on. It does not hold the [`Space`](super::processor::Space): a
//! thread of that which ends the machine keeps this for a moment, maybe as the last, and must not come to take
//! down what it belongs to.

use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use super::brief_wait::BriefWait;
use super::bus::Bus;
use super::gate::{Gate, Paused};
use super::kick::Kick;
use super::outcome::Outcome;
use super::roster::{Roster, StartRefused};
use super::stats::{LiveCounts, VcpuCounts};

/// See the module's documentation. `S` is what a vCPU is told at its start.
pub(in crate::vmm) struct Core<S> {
    pub(super) gate: Gate,
    pub(super) roster: Roster<S>,
    pub(super) bus: Arc<dyn Bus>,
    counts: Vec<LiveCounts>,
    /// When the first vCPU was first let in.
    first_entry: OnceLock<Instant>,
    ended: OnceLock<Instant>,
}

impl<S> Core<S> {
    /// That of the vCPUs that `kicks` kick, in order of their indices, before `bus`.
    pub(in crate::vmm) fn new(kicks: Vec<Arc<dyn Kick>>, bus: Arc<dyn Bus>) -> Arc<Self> {
        let vcpus = kicks.len();
        Arc::new(Self {
            gate: Gate::new(kicks),
            roster: Roster::new(vcpus),
            bus,
            counts: (0..vcpus).map(|_| LiveCounts::default()).collect(),
            first_entry: OnceLock::new(),
            ended: OnceLock::new(),
        })
    }

    /// The place of vCPU `index`.
    pub(in crate::vmm) fn seat(self: &Arc<Self>, index: usize) -> Seat<S> {
        Seat { core: self.clone(), index }
    }

    /// Ends the machine: the outcome stands if it is the first, and every vCPU leaves its loop.
    pub(in crate::vmm) fn end(&self, outcome: Outcome) {
        self.roster.end(outcome);
        self.ended.get_or_init(Instant::now);
        self.gate.stop();
        self.bus.over();
    }

    /// Whether the machine has been over for so long.
    pub(super) fn has_been_over_for(&self, time: Duration) -> bool {
        self.ended.get().is_some_and(|ended| ended.elapsed() >= time)
    }

    /// A vCPU has been let in.
    pub(super) fn entered(&self) {
        self.first_entry.get_or_init(Instant::now);
    }

    /// When the first vCPU was first let in.
    pub(super) fn first_entry(&self) -> Option<Instant> {
        self.first_entry.get().copied()
    }

    /// [`Gate::pause_all`].
    pub(super) fn pause_all<T>(
        &self,
        since: u64,
        brief: Option<BriefWait>,
        work: impl FnOnce() -> T,
    ) -> Paused<T> {
        self.gate.pause_all(since, brief, work)
    }

    /// What each vCPU counted so far, by index.
    pub(super) fn counts(&self) -> Vec<VcpuCounts> {
        self.counts.iter().map(LiveCounts::snapshot).collect()
    }
}

impl<S: Send + 'static> Core<S> {
    /// A way to end the machine from elsewhere.
    pub(in crate::vmm) fn ender(self: &Arc<Self>) -> Ender {
        let weak = Arc::downgrade(self);
        Ender(weak)
    }
}

/// A vCPU's place in its machine: what its processor reaches from there.
pub(in crate::vmm) struct Seat<S> {
    core: Arc<Core<S>>,
    index: usize,
}

impl<S> Seat<S> {
    /// The vCPU's index.
    pub(in crate::vmm) fn index(&self) -> usize {
        self.index
    }

    /// What is on the other side of its ports.
    pub(in crate::vmm) fn bus(&self) -> &dyn Bus {
        &*self.core.bus
    }

    /// Counts.
    pub(in crate::vmm) fn count(&self, update: impl FnOnce(&LiveCounts)) {
        if let Some(counts) = self.core.counts.get(self.index) {
            update(counts);
        }
    }

    /// Starts another vCPU.
    pub(in crate::vmm) fn start(&self, index: usize, start: S) -> Result<(), StartRefused> {
        self.core.roster.start(index, start)
    }

    /// [`Gate::pause_all`], for a vCPU, which is outside and cannot go on without.
    pub(in crate::vmm) fn pause_all<T>(&self, since: u64, work: impl FnOnce() -> T) -> Paused<T> {
        self.core.pause_all(since, None, work)
    }
}

/// What can be ended.
trait End: Send + Sync {
    fn end(&self, outcome: Outcome);
}

impl<S: Send> End for Core<S> {
    fn end(&self, outcome: Outcome) {
        Core::end(self, outcome);
    }
}

/// A way to end a machine from elsewhere, as a device of it does; it keeps nothing alive.
#[derive(Clone)]
pub struct Ender(Weak<dyn End>);

impl Ender {
    /// Ends the machine; the first outcome stands.
    pub fn end(&self, outcome: Outcome) {
        if let Some(machine) = self.0.upgrade() {
            machine.end(outcome);
        }
    }
}
