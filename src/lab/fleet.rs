//! The VMs of a run: the first, and clones that come and go.
//!
//! Guarantee: what a VM did counts in the sums for good, and what the checks found in it stays
//! found, also when the VM is gone; and of a VM that is gone nothing is left in the reverse map,
//! or that is a finding itself.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::setup::Phases;
use super::tail::Tail;
use super::violations::{self, Check, EndCheck, Violations};
use super::watch::wait_for;
use crate::direct_mmu::DirectStats;
use crate::host_mm::{HostMm, MemoryObject};
use crate::iotlb::IotlbStats;
use crate::shadow_mmu::ShadowStats;
use crate::sync::{Mutex, lock};
use crate::vmm::{
    CloneFigures, Contract, ContractVm, DmaStats, FaultLatency, GuestCounters, Outcome,
    PagingStats, Processor, VcpuCounts, VmError, VmObserver,
};

/// What a VM is meant to come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It works until it is told otherwise.
    Works,
    /// It was asked to make its last checks and power off.
    Asked,
    /// It was killed.
    Killed,
}

/// One VM of a run.
pub struct Member<P: Processor> {
    /// 1 for the first, then in the order in which they were made.
    pub number: u32,
    /// The number of the one that it was cloned from.
    pub parent: Option<u32>,
    /// The VM itself.
    pub vm: ContractVm<P>,
    /// What it is meant to come to.
    pub fate: Fate,
    /// Whether it has ended.
    pub has_ended: bool,
    /// How it ended, once it has, until somebody takes that.
    pub outcome: Option<Outcome>,
    /// The end of what a clone's guest printed.
    pub console: Tail,
}

/// What VMs have done, all together.
#[derive(Clone, Copy, Debug, Default)]
pub struct Done {
    /// What the guests say that they did.
    pub guest: GuestCounters,
    /// Exits and faults of the vCPUs.
    pub vcpus: VcpuCounts,
    /// Page faults of all kinds, that were fixed.
    pub faults: u64,
    /// Of shadow paging.
    pub shadow: ShadowStats,
    /// Of direct paging.
    pub direct: DirectStats,
    /// Of the DMA devices.
    pub dma: DmaStats,
    /// Of their translations.
    pub iotlb: IotlbStats,
}

impl Done {
    fn add<P: Contract>(&mut self, vm: &ContractVm<P>) {
        let PagingStats { shadow, direct } = vm.paging_stats();
        self.guest.add(&vm.guest_counters());
        self.vcpus.add(&vm.counts());
        self.faults = self.faults.saturating_add(vm.faults());
        self.shadow.add(&shadow);
        self.direct.add(&direct);
        self.dma.add(&vm.dma_stats());
        self.iotlb.add(&vm.iotlb().stats());
    }
}

/// A VM that is gone, or about to be.
#[derive(Clone, Copy, Debug)]
pub struct Record {
    /// As [`Member::number`].
    pub number: u32,
    /// As [`Member::parent`].
    pub parent: Option<u32>,
    /// What it was meant to come to.
    pub fate: Fate,
    /// What its guest says that it did.
    pub guest: GuestCounters,
    /// Page faults that were fixed.
    pub faults: u64,
    /// What it took to clone it; `None` of the first.
    pub clone: Option<CloneFigures>,
}

/// The memory objects of the VMs that are there, for those who invalidate their pages.
#[derive(Default)]
pub struct Objects {
    live: Mutex<Vec<Arc<MemoryObject>>>,
    /// Pages of one VM that were merged with those of another.
    pub merged_across: AtomicU64,
}

impl Objects {
    /// Those that are there now.
    pub fn live(&self) -> Vec<Arc<MemoryObject>> {
        lock(&self.live).clone()
    }

    /// Adds one that has come.
    pub fn add(&self, object: &Arc<MemoryObject>) {
        lock(&self.live).push(object.clone());
    }

    fn remove(&self, object: &Arc<MemoryObject>) {
        lock(&self.live).retain(|one| !Arc::ptr_eq(one, object));
    }
}

/// See the module's documentation.
pub struct Fleet<P: Processor> {
    phases: Arc<Phases>,
    /// Those that are there.
    pub members: Vec<Member<P>>,
    objects: Arc<Objects>,
    made: u32,
    // Of those that are gone:
    done: Done,
    latency: FaultLatency,
    found: Violations,
    /// What [`check_and_recycle`](Self::check_and_recycle) has found.
    differences: u64,
    oracle: u64,
    records: Vec<Record>,
    lines: Vec<String>,
}

impl<P: Contract> Fleet<P> {
    /// A fleet of one, which is told of its phases.
    pub(super) fn new(vm: ContractVm<P>, phases: Arc<Phases>) -> Self {
        let objects = Arc::new(Objects::default());
        objects.add(vm.object());
        let first = Member {
            number: 1,
            parent: None,
            vm,
            fate: Fate::Works,
            has_ended: false,
            outcome: None,
            console: Tail::default(),
        };
        Self {
            phases,
            members: vec![first],
            objects,
            made: 1,
            done: Done::default(),
            latency: FaultLatency::default(),
            found: Violations::default(),
            differences: 0,
            oracle: 0,
            records: Vec::new(),
            lines: Vec::new(),
        }
    }

    /// The memory objects, as they come and go.
    pub fn objects(&self) -> &Arc<Objects> {
        &self.objects
    }

    /// The memory of each VM that there is.
    pub fn memory(&self) -> impl Iterator<Item = &Arc<MemoryObject>> {
        self.members.iter().map(|member| member.vm.object())
    }

    /// Whether there was ever more than one.
    pub fn is_one_of_several(&self) -> bool {
        self.made > 1
    }

    /// Whether the first guest has begun to work.
    pub fn is_working(&self) -> bool {
        self.phases.is_working()
    }

    /// Starts all that have not been started.
    ///
    /// # Errors
    /// If a thread cannot be started.
    pub fn start(&mut self) -> Result<(), VmError> {
        self.members.iter_mut().try_for_each(|member| member.vm.start())
    }

    /// Adds a clone of a member, which runs already.
    ///
    /// # Errors
    /// As [`ContractVm::clone_running`].
    pub fn clone_member(&mut self, index: usize) -> Result<(), VmError> {
        let Some(source) = self.members.get(index) else {
            return Err(VmError::NotRunning);
        };
        let console = Tail::default();
        let observer: Arc<dyn VmObserver> = self.phases.clone();
        let vm = source.vm.clone_running(Some(observer), Box::new(console.clone()))?;
        self.objects.add(vm.object());
        self.made += 1;
        let (number, parent) = (self.made, Some(source.number));
        let fate = Fate::Works;
        let member = Member { number, parent, vm, fate, has_ended: false, outcome: None, console };
        self.members.push(member);
        Ok(())
    }

    /// Looks which have ended, waiting for an end for at most `timeout`.
    pub fn poll(&mut self, timeout: Duration) {
        let mut left = timeout;
        for member in self.members.iter_mut().filter(|member| !member.has_ended) {
            member.outcome = member.vm.wait(Some(left));
            member.has_ended = member.outcome.is_some();
            // One is waited for; the others are looked at.
            left = Duration::ZERO;
        }
    }

    /// Asks all that work to finish.
    pub fn request_stop(&mut self) {
        for member in self.members.iter_mut().filter(|member| member.fate == Fate::Works) {
            member.fate = Fate::Asked;
            member.vm.request_stop();
        }
    }

    /// Kills all. Does not wait.
    pub fn kill_all(&mut self) {
        for member in self.members.iter_mut().filter(|member| !member.has_ended) {
            member.fate = Fate::Killed;
            member.vm.kill();
        }
    }

    /// Kills all, and waits until they have ended; false if one has not in time, which is short after
    /// a signal.
    pub fn kill(&mut self, timeout: Duration) -> bool {
        self.kill_all();
        let all_ended = |tick| {
            self.poll(tick);
            self.have_all_ended().then_some(())
        };
        wait_for(timeout, all_ended).is_some()
    }

    /// Whether none is there that has not ended.
    pub fn have_all_ended(&self) -> bool {
        self.members.iter().all(|member| member.has_ended)
    }

    /// Compares reverse maps with what is mapped while the guests work, then takes the shadow pages of
    /// one of them back. Whatever was known of its mappings alone must be known elsewhere by then.
    ///
    /// # Errors
    /// As [`ContractVm::recycle`].
    pub fn check_and_recycle(&mut self, turn: usize) -> Result<(), VmError> {
        let running: Vec<_> = self.members.iter().filter(|member| !member.has_ended).collect();
        let differences: Vec<String> =
            running.iter().flat_map(|member| member.vm.check_running()).collect();
        if let Some(member) = running.get(turn % running.len().max(1)) {
            member.vm.recycle()?;
        }
        self.differences = self.differences.saturating_add(differences.len() as u64);
        self.found.add(Check::ReverseMap, differences, 0);
        Ok(())
    }

    /// What comparisons of reverse maps have found while guests worked.
    pub fn differences(&self) -> u64 {
        self.differences
    }

    /// Lets go of a member that has ended.
    pub fn retire(&mut self, index: usize, mm: &HostMm) {
        let member = self.members.remove(index);
        self.done.add(&member.vm);
        self.latency.merge(&member.vm.fault_latency());
        self.oracle = self.oracle.saturating_add(member.vm.violation_count());
        self.records.push(member.record());
        self.found.append(violations::of_vm(&member, self.is_one_of_several()));
        self.lines.extend(member.lines());
        self.objects.remove(member.vm.object());
        let (number, clients) = (member.number, member.vm.client_ids());
        drop(member);
        self.found.look(EndCheck::Leftovers, Check::ReverseMap, || {
            let left: u64 = clients.into_iter().map(|client| mm.mappings_of(client)).sum();
            let told = |left: &u64| {
                format!("I3: VM {number} is gone, but the reverse map has {left} of its entries")
            };
            Some(left).filter(|&left| left > 0).iter().map(told).collect()
        });
    }

    /// What all have done so far.
    pub(super) fn done(&self) -> Done {
        let mut done = self.done;
        self.members.iter().for_each(|member| done.add(&member.vm));
        done
    }

    /// Latencies of faults; complete once all have ended.
    pub fn fault_latency(&self) -> FaultLatency {
        let mut latency = self.latency.clone();
        self.members.iter().for_each(|member| latency.merge(&member.vm.fault_latency()));
        latency
    }

    /// Violations that guests have reported so far.
    pub fn oracle_violations(&self) -> u64 {
        let live = self.members.iter().map(|member| member.vm.violation_count());
        live.fold(self.oracle, u64::saturating_add)
    }

    /// Everything that the checks of each VM have found.
    pub fn violations(&self) -> Violations {
        let mut all = self.found.clone();
        for member in &self.members {
            all.append(violations::of_vm(member, self.is_one_of_several()));
        }
        all
    }

    /// All VMs that there ever were, in order.
    pub fn records(&self) -> Vec<Record> {
        let live = self.members.iter().map(Member::record);
        let mut all: Vec<Record> = self.records.iter().copied().chain(live).collect();
        all.sort_by_key(|record| record.number);
        all
    }

    /// The last lines of what the clones printed, with their numbers.
    pub fn lines(&self) -> Vec<String> {
        let live = self.members.iter().flat_map(Member::lines);
        self.lines.iter().cloned().chain(live).collect()
    }

    /// Pages of one VM that were merged with those of another.
    pub fn merged_across(&self) -> u64 {
        self.objects.merged_across.load(Ordering::Relaxed)
    }
}

impl<P: Contract> Member<P> {
    fn record(&self) -> Record {
        Record {
            number: self.number,
            parent: self.parent,
            fate: self.fate,
            guest: self.vm.guest_counters(),
            faults: self.vm.faults(),
            clone: self.vm.clone_figures(),
        }
    }

    /// Only of those that have something to tell.
    fn lines(&self) -> Vec<String> {
        if self.vm.violation_count() == 0 {
            return Vec::new();
        }
        let lines = self.console.lines();
        lines.iter().map(|line| format!("VM {}: {line}", self.number)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::fakes::{self, Op};

    #[test]
    fn one_that_has_ended_is_checked_though_its_outcome_was_taken() {
        let vm = fakes::vm(vec![Some(vec![Op::Work, Op::Exit(3)])]);
        let phases = Arc::new(Phases::new(vm.object().host_mm()));
        let mut fleet = Fleet::new(vm, phases);
        let unchecked =
            |fleet: &Fleet<_>| fleet.violations().unchecked.into_iter().collect::<Vec<_>>();
        assert_eq!(unchecked(&fleet), [EndCheck::ReverseMap], "it has not even begun");
        fleet.start().unwrap();
        let taken = loop {
            fleet.poll(Duration::from_millis(1));
            if let Some(outcome) = fleet.members[0].outcome.take() {
                break outcome;
            }
        };
        assert!(matches!(taken, Outcome::GuestExit(3)), "{taken:?}");
        assert!(fleet.have_all_ended());
        assert_eq!(unchecked(&fleet), []);
        fleet.poll(Duration::ZERO);
        assert!(fleet.have_all_ended(), "for good");
    }
}
