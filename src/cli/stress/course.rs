//! The course of a stress run: work under the storm, the last sweep, the end.
//!
//! Guarantee: it ends. Each phase has a bound, in time that this process ran, after which the guests are
//! killed, and that is then said; a signal ends the last sweep, too, or leaves it out; and when it has returned, no vCPU and no
//! storm runs any more, unless one did not stop in time, which is said.

use std::time::{Duration, Instant};

use super::population::{Population, PopulationCount};
use super::progress::{Progress, Status};
use super::storm::{StormCount, Storms};
use crate::addr::PAGE_SIZE_U64;
use crate::cli::args::Invalidate;
use crate::cli::config::StressConfig;
use crate::cli::ending::Ending;
use crate::cli::fleet::{Fate, Member};
use crate::cli::hint;
use crate::cli::machine::Machine;
use crate::cli::values::human_count;
use crate::cli::violations::{self, Check, EndCheck, Violation};
use crate::host_mm::InjectionPlan;
use crate::sys::Patience;
use crate::vmm::{Contract, Outcome};

/// Time for the last sweep that any guest gets ...
const SWEEP_BASE: Duration = Duration::from_secs(60);
/// ... and what is added for each of its pages. A page that comes back from swap takes a tenth.
const SWEEP_PER_PAGE: Duration = Duration::from_millis(1);
/// Time for vCPU threads to end after a kill.
const KILL_TIMEOUT: Duration = Duration::from_secs(30);

/// When the first violation was found, and by which check.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub(crate) struct Detection {
    /// Seconds since the start.
    pub(crate) seconds: f64,
    /// The check.
    pub(crate) by: Check,
}

/// How a run went.
#[derive(Debug)]
pub(crate) struct Course {
    /// From the start to the end of the last vCPU.
    pub(crate) elapsed: Duration,
    /// The part of it before the guest was asked to finish.
    pub(crate) worked: Duration,
    /// What is wrong with the end; `None` for a clean one.
    pub(crate) bad_end: Option<Violation>,
    /// What the host had no more of, for which the run could not go on.
    pub(crate) host_limit: Option<String>,
    /// Whether the run was cut short because of a violation.
    pub(crate) cut_short: bool,
    /// The signal that cut it short.
    pub(crate) signal: Option<i32>,
    /// What was left out for it.
    pub(crate) unchecked: Vec<EndCheck>,
    pub(crate) detection: Option<Detection>,
    /// Most bytes that frames were seen to take up.
    pub(crate) peak_resident_bytes: u64,
    pub(crate) storms: Vec<StormCount>,
    /// Those who look on.
    pub(crate) observers: Vec<StormCount>,
    pub(crate) population: PopulationCount,
}

/// Why a phase is over.
pub(super) enum PhaseEnd {
    /// Its time was.
    Deadline,
    /// A signal came.
    Signal(i32),
    /// A violation was found and the run is to end at the first.
    Violation,
    /// All VMs have ended as they were told to.
    Ended,
    /// One of them ended as it should not have, or could not be cloned.
    Bad(Violation),
    /// The host has no more of something that one of them needs: nothing is wrong with them.
    HostLimit(String),
}

/// Starts the first VM and stays with it and its clones to their end.
///
/// # Errors
/// If a thread cannot be started.
pub(crate) fn run(
    machine: &mut Machine<impl Contract>,
    config: &StressConfig,
    ending: &Ending,
) -> anyhow::Result<Course> {
    machine.fleet.start()?;
    ending.phase("running the guest");
    let mut watch = Watch::new(config, ending);
    let mut population = Population::new(config);
    let kinds = &config.invalidations;
    let objects = machine.fleet.objects();
    let mut storms = Storms::start(&machine.mm, objects, kinds, config.rate, config.seed)?;
    let removes = kinds.contains(&Invalidate::Remove);
    storms.observe(objects, removes, config.seed)?;
    let phase_end = watch.phase(machine, &storms, config.duration, |machine| {
        population.tend(machine, Instant::now())
    });
    if let PhaseEnd::Signal(_) = phase_end {
        // Before the storms are waited for: who has to go on longest begins to stop first.
        machine.fleet.kill(Duration::ZERO);
    }
    storms.stop();
    let worked = watch.begun.elapsed();

    let mut course = Course {
        elapsed: worked,
        worked,
        bad_end: None,
        host_limit: None,
        cut_short: false,
        signal: None,
        unchecked: Vec::new(),
        detection: None,
        peak_resident_bytes: 0,
        storms: Vec::new(),
        observers: Vec::new(),
        population: population.count,
    };
    match phase_end {
        PhaseEnd::Signal(signal) => course.interrupt(machine, signal),
        PhaseEnd::Deadline => {
            finish(&mut watch, machine, &storms, &mut course);
            let is_whole = course.bad_end.is_none() && !course.cut_short && course.signal.is_none();
            if is_whole && course.host_limit.is_none() && !population.was_complete() {
                course.bad_end = Some(too_few(config, &population));
            }
        }
        other => course.end_badly(machine, other),
    }
    course.elapsed = watch.begun.elapsed();
    watch.look(machine, &storms);
    watch.progress.end();
    course.detection = watch.detection;
    course.peak_resident_bytes = watch.peak_resident_bytes;
    course.storms = storms.counts();
    course.observers = storms.observed();
    Ok(course)
}

impl Course {
    /// Ends what still runs, for a signal.
    fn interrupt(&mut self, machine: &mut Machine<impl Contract>, signal: i32) {
        self.signal = Some(signal);
        self.unchecked.push(EndCheck::LastSweep);
        if !machine.fleet.kill(KILL_TIMEOUT) {
            self.unchecked.push(EndCheck::Ends);
        }
    }

    /// Ends what still runs.
    fn end_badly(&mut self, machine: &mut Machine<impl Contract>, why: PhaseEnd) {
        match why {
            PhaseEnd::Violation => self.cut_short = true,
            PhaseEnd::Bad(violation) => self.bad_end = Some(violation),
            PhaseEnd::HostLimit(sentence) => {
                self.host_limit = Some(sentence);
                self.unchecked.push(EndCheck::LastSweep);
            }
            PhaseEnd::Ended | PhaseEnd::Deadline | PhaseEnd::Signal(_) => {}
        }
        if let Err(also) = kill(machine) {
            self.bad_end.get_or_insert_with(|| Violation::of_run(also));
        }
    }
}

/// The last sweep.
fn finish(
    watch: &mut Watch<'_>,
    machine: &mut Machine<impl Contract>,
    storms: &Storms,
    course: &mut Course,
) {
    watch.ending.phase("the guest makes its last sweep");
    watch.status.sweeping = true;
    machine.fleet.request_stop();
    let bytes = machine.fleet.members.iter().map(|member| member.vm.object().bytes()).sum();
    let bound = sweep_bound(bytes);
    match watch.phase(machine, storms, bound, |_| Ok(())) {
        PhaseEnd::Ended => {}
        PhaseEnd::Signal(signal) => course.interrupt(machine, signal),
        PhaseEnd::Deadline => {
            let failed = machine.figures().host.failed_evictions;
            let mut said = unfinished(bound, failed);
            if let Err(also) = kill(machine) {
                said = format!("{said}; {also}");
            }
            course.bad_end = Some(Violation::of_run(said));
        }
        other => course.end_badly(machine, other),
    }
}

/// The run was over before there were as many VMs as it was to have.
fn too_few(config: &StressConfig, population: &Population) -> Violation {
    let made = 1 + population.count.cloned;
    let why = match population.count.failed {
        0 => "the first VM had hardly begun to work; choose a longer --duration".to_owned(),
        failed => format!(
            "{} attempts to clone failed, for want of swap, as injected, or since a disk or a peer did not answer",
            human_count(failed)
        ),
    };
    Violation::of_run(format!("only {made} of --vms {} were there: {why}", config.vms))
}

/// A guest that hardly gets any frames is slow, and why is what its user can change.
fn unfinished(bound: Duration, failed_evictions: u64) -> String {
    let why = match failed_evictions {
        0 => String::new(),
        count => {
            format!("; {} evictions failed, for want of swap that takes them", human_count(count))
        }
    };
    format!(
        "the guest did not finish its last sweep within {} s and was killed{why}",
        bound.as_secs()
    )
}

fn sweep_bound(memory_bytes: u64) -> Duration {
    let pages = u32::try_from(memory_bytes / PAGE_SIZE_U64).unwrap_or(u32::MAX);
    SWEEP_BASE.saturating_add(SWEEP_PER_PAGE.saturating_mul(pages))
}

fn kill(machine: &mut Machine<impl Contract>) -> Result<(), String> {
    match machine.fleet.kill(KILL_TIMEOUT) {
        true => Ok(()),
        false => {
            Err(format!("a vCPU did not stop within {} s of being killed", KILL_TIMEOUT.as_secs()))
        }
    }
}

/// What is wrong with the end of a VM, by what it was meant to come to.
fn wrong_end(
    member: &Member<impl Contract>,
    is_one_of_several: bool,
    plan: &InjectionPlan,
) -> Option<PhaseEnd> {
    let named = |text: String| match is_one_of_several {
        true => format!("VM {}: {text}", member.number),
        false => text,
    };
    if let Some(Outcome::Failed(error)) = &member.outcome
        && let Some(sentence) = hint::host_limit(error, plan)
    {
        return Some(PhaseEnd::HostLimit(named(sentence)));
    }
    let wrong = match (member.fate, member.outcome.as_ref()?) {
        (Fate::Asked | Fate::Killed, Outcome::PoweredOff) => return None,
        (Fate::Killed, Outcome::Killed) => return None,
        (Fate::Works, outcome) => early_end(outcome),
        (_, outcome) => bad_outcome(outcome),
    };
    Some(PhaseEnd::Bad(Violation { text: named(wrong.text), ..wrong }))
}

/// What an end means that nobody asked for.
fn early_end(outcome: &Outcome) -> Violation {
    match outcome {
        Outcome::PoweredOff => Violation::of_run("the guest powered off before it was asked to"),
        other => bad_outcome(other),
    }
}

fn bad_outcome(outcome: &Outcome) -> Violation {
    match outcome {
        Outcome::PoweredOff => Violation::of_run("the guest powered off"),
        Outcome::Rebooted => Violation::of_run("the guest reset its machine"),
        Outcome::GuestExit(code) => {
            Violation::of_run(format!("the guest gave up with exit code {code}"))
        }
        Outcome::Halted => {
            Violation::of_run("every vCPU halted, which ends the guest before its last sweep")
        }
        Outcome::Killed => Violation::of_run("the guest was killed"),
        Outcome::Failed(error) => Violation::of_failure(error),
    }
}

fn wrong_end_of_any(machine: &Machine<impl Contract>) -> Option<PhaseEnd> {
    let is_one_of_several = machine.fleet.is_one_of_several();
    let plan = &machine.mm.config().inject;
    machine.fleet.members.iter().find_map(|member| wrong_end(member, is_one_of_several, plan))
}

/// Looks at a run again and again.
struct Watch<'a> {
    ending: &'a Ending,
    begun: Instant,
    fail_fast: bool,
    until_oracle: bool,
    progress: Progress,
    status: Status,
    detection: Option<Detection>,
    peak_resident_bytes: u64,
}

impl<'a> Watch<'a> {
    fn new(config: &StressConfig, ending: &'a Ending) -> Self {
        Self {
            ending,
            begun: Instant::now(),
            fail_fast: config.fail_fast,
            until_oracle: config.until_oracle,
            progress: Progress::new(config.duration),
            status: Status::default(),
            detection: None,
            peak_resident_bytes: 0,
        }
    }

    /// Waits for the end of a phase of so long. `tend` is called again and again while it lasts.
    fn phase<P: Contract>(
        &mut self,
        machine: &mut Machine<P>,
        storms: &Storms,
        length: Duration,
        mut tend: impl FnMut(&mut Machine<P>) -> Result<(), PhaseEnd>,
    ) -> PhaseEnd {
        let mut patience = Patience::at_work(length, Instant::now());
        loop {
            let slice = patience.slice();
            machine.fleet.poll(slice.unwrap_or_default());
            self.look(machine, storms);
            if let Some(wrong) = wrong_end_of_any(machine) {
                return wrong;
            }
            if machine.fleet.have_all_ended() {
                return PhaseEnd::Ended;
            }
            if self.fail_fast && self.detection.is_some() {
                return PhaseEnd::Violation;
            }
            if let Some(signal) = self.ending.signal() {
                return PhaseEnd::Signal(signal);
            }
            if slice.is_none() {
                return PhaseEnd::Deadline;
            }
            if let Err(end) = tend(machine) {
                return end;
            }
        }
    }

    fn look(&mut self, machine: &Machine<impl Contract>, storms: &Storms) {
        let found = violations::found_so_far(machine).or(storms.found().map(|check| (check, 1)));
        // The oracle's come first if there are any.
        let found = found.filter(|&(by, _)| !self.until_oracle || by == Check::GuestOracle);
        if let (Some((by, _)), None) = (found, self.detection) {
            let seconds = self.begun.elapsed().as_secs_f64();
            self.detection = Some(Detection { seconds, by });
            self.ending.note_failure();
        }
        // What the kernel does not tell is not a peak.
        let resident = machine.mm.resident_bytes().unwrap_or(0);
        self.peak_resident_bytes = self.peak_resident_bytes.max(resident);
        let figures = machine.figures();
        self.status = Status {
            sweeping: self.status.sweeping,
            verified: figures.guest.verified,
            faults: figures.faults,
            evictions: figures.host.evictions,
            resident_bytes: resident,
            violations: found.map_or(0, |(_, count)| count),
        };
        self.progress.show(&self.status);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::SwapSlot;
    use crate::host_mm::MmError;
    use crate::host_mm::swap::SwapError;
    use crate::vmm::{KvmError, VmError};

    #[test]
    fn the_last_sweep_gets_time_for_every_page() {
        assert_eq!(sweep_bound(0), Duration::from_secs(60));
        assert_eq!(
            sweep_bound(512 << 20),
            Duration::from_secs(60 + 131) + Duration::from_millis(72)
        );
        assert!(sweep_bound(u64::MAX) >= sweep_bound(1 << 40));
    }

    #[test]
    fn an_unfinished_sweep_says_whether_swap_was_the_trouble() {
        let bound = Duration::from_secs(72);
        assert!(unfinished(bound, 0).ends_with("within 72 s and was killed"));
        assert!(unfinished(bound, 1234).contains("killed; 1,234 evictions failed"));
    }

    #[test]
    fn an_end_that_nobody_asked_for_is_named() {
        let text = |outcome| early_end(&outcome).text;
        assert!(text(Outcome::PoweredOff).contains("before it was asked"));
        assert!(text(Outcome::GuestExit(35)).contains("exit code 35"));
        assert!(text(Outcome::Halted).contains("halted"));
        let failed = early_end(&Outcome::Failed(VmError::Kvm(KvmError::Missing)));
        assert!(failed.text.contains("/dev/kvm"), "the error's own sentence");
        assert_eq!(failed.by, Check::Run);
        let owner_tag = 0x70;
        let checksum = SwapError::Checksum {
            slot: SwapSlot::new(3).unwrap(),
            owner_tag,
            expected: None,
            found: 1,
        };
        let failed = early_end(&Outcome::Failed(VmError::Host(MmError::Swap(checksum))));
        assert_eq!(failed.by, Check::SwapChecksum);
        assert!(failed.text.contains("0x70"), "{}", failed.text);
    }
}
