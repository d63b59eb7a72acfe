//! The report of a stress run: one set of figures, shown as tables and written as JSON.

pub(crate) mod json;
pub(crate) mod table;
pub(crate) mod vms;

use hdrhistogram::Histogram;
use serde::Serialize;

use super::args::{PolicyName, SabotageName, Workload};
use super::config::StressConfig;
use super::paging;
use crate::direct_mmu::DirectStats;
use crate::host_mm::MmStats;
use crate::iotlb::IotlbStats;
use crate::lab::{
    self, Check, Course, Detection, EndCheck, Injected, Invalidation, PeersCount, Setup, SetupPlan,
    StormCount, Violation, Violations,
};
use crate::peer::PeerStats;
use crate::shadow_mmu::ShadowStats;
use crate::sys::signal;
use crate::vmm::{Contract, DmaStats, FaultLatency, GuestCounters, Latencies, VcpuCounts};
use vms::VmsReport;

/// How a run came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Verdict {
    /// All of it, and nothing found.
    Passed,
    /// Violations were found, or the end was not a clean one.
    Failed,
    /// A signal ended it early, and nothing was found until then.
    Interrupted,
    /// The host had no more of something, and nothing was found: that says nothing about Gnomon.
    #[serde(rename = "host_limit")]
    HostLimit,
}

/// Everything that is known about a run.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) gnomon_version: &'static str,
    pub(crate) result: Verdict,
    /// From the start of the guest to its end.
    pub(crate) seconds: f64,
    /// The part of it before the last sweep.
    pub(crate) worked_seconds: f64,
    pub(crate) config: ConfigReport,
    pub(crate) guest: GuestReport,
    pub(crate) faults: FaultReport,
    pub(crate) exits: ExitReport,
    pub(crate) storms: Vec<StormCount>,
    /// Those who looked on: their turns, and the pages that they found written.
    pub(crate) observers: Vec<StormCount>,
    pub(crate) vms: VmsReport,
    pub(crate) host: MmStats,
    pub(crate) shadow: ShadowStats,
    pub(crate) direct: DirectStats,
    pub(crate) dma: DmaStats,
    pub(crate) iotlb: IotlbStats,
    pub(crate) fault_latency: LatencyReports,
    pub(crate) memory: MemoryReport,
    /// Other processes that held pages; `None` without `--export-socket`.
    pub(crate) peers: Option<PeersReport>,
    /// What came of `--inject`; `None` without it.
    pub(crate) injected: Option<Injected>,
    pub(crate) violations: Violations,
    /// When the first violation was found, and by which check.
    pub(crate) detection: Option<Detection>,
    /// The first limit of the host that something was not done for, with what to do about it.
    pub(crate) host_limit: Option<String>,
    /// Whether the first violation ended the run.
    pub(crate) cut_short: bool,
    /// The signal that ended the run early, in its work or in the checks at its end.
    pub(crate) signal: Option<i32>,
    /// What was not checked, or not to the end, since a signal or a limit of the host cut the run short.
    pub(crate) not_checked: Vec<EndCheck>,
    /// The end of what the guest printed.
    pub(crate) guest_console: Vec<String>,
}

/// What was run.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct ConfigReport {
    /// How the guest's memory was mapped.
    pub(crate) paging: String,
    pub(crate) memory_bytes: u64,
    pub(crate) host_memory_bytes: u64,
    pub(crate) swap_bytes: u64,
    pub(crate) vcpus: usize,
    pub(crate) vms: usize,
    /// Time between two changes of `--churn`; `None` without it.
    pub(crate) churn_seconds: Option<f64>,
    pub(crate) duration_seconds: f64,
    pub(crate) workloads: Vec<Workload>,
    /// Percentage of page accesses by DMA.
    pub(crate) dma: u8,
    pub(crate) invalidations: Vec<Invalidation>,
    pub(crate) rate_per_second: u32,
    pub(crate) seed: u64,
    pub(crate) policy: PolicyName,
    pub(crate) paranoid: bool,
    pub(crate) fail_fast: bool,
    pub(crate) sabotage: Option<SabotageName>,
    /// Items of `--inject`.
    pub(crate) inject: Vec<String>,
}

/// What the guest says that it did.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct GuestReport {
    pub(crate) verified: u64,
    pub(crate) writes: u64,
    pub(crate) shared_adds: u64,
    pub(crate) paging_ops: u64,
    pub(crate) hot_accesses: u64,
    pub(crate) dma_ops: u64,
    pub(crate) dma_bytes: u64,
}

/// Page faults by kind.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct FaultReport {
    pub(crate) read: u64,
    pub(crate) write: u64,
    pub(crate) execute: u64,
    /// Those that were the guest's own, delivered to it.
    pub(crate) guest: u64,
}

/// Exits from the guest.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct ExitReport {
    pub(crate) all: u64,
    pub(crate) emulated: u64,
    pub(crate) ports: u64,
    pub(crate) hypercalls: u64,
    pub(crate) recycles: u64,
}

/// Latency of the host side of shadow faults.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct LatencyReports {
    pub(crate) all: Option<LatencyReport>,
    pub(crate) read: Option<LatencyReport>,
    pub(crate) write: Option<LatencyReport>,
    pub(crate) execute: Option<LatencyReport>,
}

/// One distribution, in nanoseconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct LatencyReport {
    pub(crate) count: u64,
    pub(crate) p50_ns: u64,
    pub(crate) p99_ns: u64,
    pub(crate) max_ns: u64,
}

/// What peers did.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct PeersReport {
    #[serde(flatten)]
    pub(crate) stats: PeerStats,
    /// Pages whose copies were recalled because somebody wrote.
    pub(crate) recalls: u64,
    /// From an invalidation to the end of its copies.
    pub(crate) latency: Option<LatencyReport>,
    /// What is left of peers that are gone.
    #[serde(skip)]
    pub(crate) found: Violations,
}

impl From<PeersCount> for PeersReport {
    fn from(count: PeersCount) -> Self {
        let PeersCount { stats, recalls, latency, found } = count;
        Self { stats, recalls, latency: latency.as_ref().map(LatencyReport::new), found }
    }
}

/// Memory against its budget.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct MemoryReport {
    pub(crate) budget_bytes: u64,
    /// Frames in use, counted at each allocation.
    pub(crate) peak_frame_bytes: u64,
    /// What the kernel says that the frames take up, sampled.
    pub(crate) peak_resident_bytes: u64,
}

impl Report {
    /// The report of a run that is over: no vCPU runs any more. Lets go of the VMs, unless the end is to
    /// be quick.
    pub(crate) fn new(
        config: &StressConfig,
        setup: &mut Setup<impl Contract>,
        course: &Course,
        peers: Option<PeersReport>,
        console: &[String],
    ) -> Self {
        let figures = setup.figures();
        let injected = Injected::conclude(&setup.mm, setup.fleet.memory());
        // They are kept until here because their pages were looked for.
        let has_ended = setup.retire_all();
        let mut violations = all_violations(setup, course, peers.as_ref(), injected.as_ref());
        // Pauses let nothing fail.
        let may_fail = config.plan.setup.host.inject.may_fail();
        let is_sound = config.sabotage.is_none() && !may_fail;
        if is_sound && (has_ended || signal::is_stop_asked()) {
            let left = || lab::left_behind(setup);
            violations.look(EndCheck::Leftovers, Check::ReverseMap, left);
        }
        violations.unchecked.extend(&course.unchecked);
        let fleet = &setup.fleet;
        let console = console.iter().cloned().chain(fleet.lines()).collect();
        let late = violations
            .first
            .first()
            .map(|first| Detection { seconds: course.elapsed.as_secs_f64(), by: first.by });
        Self {
            gnomon_version: env!("CARGO_PKG_VERSION"),
            result: verdict(&violations, course),
            host_limit: host_limit(course),
            seconds: course.elapsed.as_secs_f64(),
            worked_seconds: course.worked.as_secs_f64(),
            config: ConfigReport::new(config),
            guest: GuestReport::from(figures.done.guest),
            faults: FaultReport::from(figures.done.vcpus),
            exits: ExitReport::from(figures.done.vcpus),
            storms: course.storms.clone(),
            observers: course.observers.clone(),
            vms: VmsReport::new(&fleet.records(), course.population, fleet.merged_across()),
            host: figures.host,
            shadow: figures.done.shadow,
            direct: figures.done.direct,
            dma: figures.done.dma,
            iotlb: figures.done.iotlb,
            fault_latency: LatencyReports::new(&fleet.fault_latency()),
            memory: MemoryReport {
                budget_bytes: config.plan.setup.host.host_memory_bytes,
                peak_frame_bytes: figures.peak_frame_bytes(),
                peak_resident_bytes: course.peak_resident_bytes,
            },
            peers,
            injected,
            detection: course.detection.or(late),
            cut_short: course.cut_short,
            signal: course.signal,
            not_checked: violations.unchecked.iter().copied().collect(),
            violations,
            guest_console: console,
        }
    }

    /// A signal that came so late that nothing but checks at the end was cut short for it. One that
    /// came later still changes nothing.
    pub(crate) fn note_signal(&mut self, signal: Option<i32>) {
        if self.signal.is_some() || self.not_checked.is_empty() {
            return;
        }
        self.signal = signal;
        if self.result == Verdict::Passed {
            self.result = Verdict::Interrupted;
        }
    }

    /// Whether the run found anything, or did not end as it should.
    pub(crate) fn failed(&self) -> bool {
        self.result == Verdict::Failed
    }
}

fn all_violations(
    setup: &Setup<impl Contract>,
    course: &Course,
    peers: Option<&PeersReport>,
    injected: Option<&Injected>,
) -> Violations {
    let mut all = lab::collect(setup, course.peak_resident_bytes);
    if let Some(bad_end) = &course.bad_end {
        all.add_one(bad_end.clone());
    }
    for storm in course.storms.iter().chain(&course.observers) {
        all.add(Check::Observer, storm.wrong.clone(), 0);
        if let Some(broken) = &storm.broken {
            all.add_one(Violation::of_run(format!("the {} storm failed: {broken}", storm.kind)));
        }
    }
    if let Some(peers) = peers {
        all.append(peers.found.clone());
    }
    if let Some(injected) = injected {
        let ended_early = course.signal.is_some() || course.host_limit.is_some();
        injected.add_violations(&mut all, ended_early);
    }
    all
}

/// What ended the run, or else what a storm came up against.
fn host_limit(course: &Course) -> Option<String> {
    let mut storms = course.storms.iter().chain(&course.observers);
    course.host_limit.clone().or_else(|| storms.find_map(|storm| storm.limited.clone()))
}

fn verdict(violations: &Violations, course: &Course) -> Verdict {
    if violations.total > 0 {
        Verdict::Failed
    } else if host_limit(course).is_some() {
        Verdict::HostLimit
    } else if course.signal.is_some() {
        Verdict::Interrupted
    } else {
        Verdict::Passed
    }
}

impl ConfigReport {
    fn new(config: &StressConfig) -> Self {
        let StressConfig { plan, .. } = config;
        let SetupPlan { vm, host, .. } = &plan.setup;
        Self {
            paging: paging::name(plan.setup.paging),
            memory_bytes: vm.memory_bytes,
            host_memory_bytes: host.host_memory_bytes,
            swap_bytes: host.swap.bytes,
            vcpus: vm.vcpus,
            vms: plan.vms,
            churn_seconds: plan.churn.map(|churn| churn.as_secs_f64()),
            duration_seconds: plan.duration.as_secs_f64(),
            workloads: config.workloads.clone(),
            dma: config.dma,
            invalidations: plan.storm.kinds.clone(),
            rate_per_second: plan.storm.rate,
            seed: plan.storm.seed,
            policy: config.policy,
            paranoid: host.paranoid,
            fail_fast: plan.fail_fast,
            sabotage: config.sabotage,
            inject: host.inject.items.iter().map(ToString::to_string).collect(),
        }
    }
}

impl From<GuestCounters> for GuestReport {
    fn from(counters: GuestCounters) -> Self {
        Self {
            verified: counters.verified,
            writes: counters.writes,
            shared_adds: counters.shared_adds,
            paging_ops: counters.paging_ops,
            hot_accesses: counters.hot_accesses,
            dma_ops: counters.dma_ops,
            dma_bytes: counters.dma_bytes,
        }
    }
}

impl From<VcpuCounts> for FaultReport {
    fn from(counts: VcpuCounts) -> Self {
        Self {
            read: counts.read_faults,
            write: counts.write_faults,
            execute: counts.execute_faults,
            guest: counts.guest_page_faults,
        }
    }
}

impl From<VcpuCounts> for ExitReport {
    fn from(counts: VcpuCounts) -> Self {
        Self {
            all: counts.exits,
            emulated: counts.emulated,
            ports: counts.port_exits,
            hypercalls: counts.hypercalls,
            recycles: counts.recycles,
        }
    }
}

impl LatencyReports {
    pub(crate) fn new(latency: &FaultLatency) -> Self {
        let parts = [&latency.read, &latency.write, &latency.execute];
        let mut recorded = parts.into_iter().filter_map(Latencies::histogram);
        let all = recorded.next().cloned().map(|first| {
            recorded.fold(first, |mut sum, part| {
                // Equal bounds: cannot be refused.
                let _ = sum.add(part);
                sum
            })
        });
        let report = |part: &Latencies| part.histogram().map(LatencyReport::new);
        Self {
            all: all.as_ref().map(LatencyReport::new),
            read: report(&latency.read),
            write: report(&latency.write),
            execute: report(&latency.execute),
        }
    }
}

impl LatencyReport {
    pub(crate) fn new(histogram: &Histogram<u64>) -> Self {
        Self {
            count: histogram.len(),
            p50_ns: histogram.value_at_quantile(0.5),
            p99_ns: histogram.value_at_quantile(0.99),
            max_ns: histogram.max(),
        }
    }
}

#[cfg(test)]
#[path = "tests.rs"]
pub(crate) mod tests;
