//! The course of a stress run: work under the storm, the last sweep, the end.
//!
//! Guarantee: it ends. Each phase has a bound, in time that this process ran, after which the guests are
//! killed, and that is then said; a signal ends the last sweep, too, or leaves it out; and when it has returned,
//! no vCPU and no storm runs any more, unless one did not stop in time, which is said.

use std::time::{Duration, Instant};

use super::fleet::{Fate, Member};
use super::judge::Judge;
use super::plan::{Invalidation, Plan};
use super::population::{Population, PopulationCount};
use super::setup::{Setup, SetupError};
use super::storms::{StormCount, Storms};
use super::text::human_count;
use super::violations::{self, Check, EndCheck, Violation};
use super::watch::{Status, Watch};
use crate::addr::PAGE_SIZE_U64;
use crate::sys::Patience;
use crate::vmm::{Contract, Outcome};

/// Time for the last sweep that any guest gets ...
const SWEEP_BASE: Duration = Duration::from_secs(60);
/// ... and what is added for each of its pages. A page that comes back from swap takes a tenth.
const SWEEP_PER_PAGE: Duration = Duration::from_millis(1);
/// Time for vCPU threads to end after a kill.
const KILL_TIMEOUT: Duration = Duration::from_secs(30);

/// When the first violation was found, and by which check.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Detection {
    /// Seconds since the start.
    pub seconds: f64,
    /// The check.
    pub by: Check,
}

/// How a run went.
#[derive(Debug)]
pub struct Course {
    /// From the start to the end of the last vCPU.
    pub elapsed: Duration,
    /// The part of it before the guest was asked to finish.
    pub worked: Duration,
    /// What is wrong with the end; `None` for a clean one.
    pub bad_end: Option<Violation>,
    /// What the host had no more of, for which the run could not go on.
    pub host_limit: Option<String>,
    /// Whether the run was cut short because of a violation.
    pub cut_short: bool,
    /// The signal that cut it short.
    pub signal: Option<i32>,
    /// What was left out for it.
    pub unchecked: Vec<EndCheck>,
    /// The first violation, if there was one.
    pub detection: Option<Detection>,
    /// Most bytes that frames were seen to take up.
    pub peak_resident_bytes: u64,
    /// What the storms have done.
    pub storms: Vec<StormCount>,
    /// Those who look on.
    pub observers: Vec<StormCount>,
    /// How the number of VMs was kept up.
    pub population: PopulationCount,
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
pub fn run(
    setup: &mut Setup<impl Contract>,
    plan: &Plan,
    watch: &dyn Watch,
) -> Result<Course, SetupError> {
    setup.fleet.start()?;
    watch.phase("running the guest");
    let judge = Judge::new(plan.setup.host.inject.clone(), watch.advice());
    let mut lookout = Lookout::new(plan, judge.clone(), watch);
    let mut population = Population::new(plan, judge.clone());
    let objects = setup.fleet.objects();
    let mut storms = Storms::start(judge, &setup.mm, objects, &plan.storm)?;
    let removes = plan.storm.kinds.contains(&Invalidation::Remove);
    storms.observe(objects, removes, plan.storm.seed)?;
    let phase_end = lookout
        .phase(setup, &storms, plan.duration, |setup| population.tend(setup, Instant::now()));
    if let PhaseEnd::Signal(_) = phase_end {
        // Before the storms are waited for: who has to go on longest begins to stop first.
        setup.fleet.kill(Duration::ZERO);
    }
    storms.stop();
    let worked = lookout.begun.elapsed();

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
        PhaseEnd::Signal(signal) => course.interrupt(setup, signal),
        PhaseEnd::Deadline => {
            finish(&mut lookout, setup, &storms, &mut course);
            let is_whole = course.bad_end.is_none() && !course.cut_short && course.signal.is_none();
            if is_whole && course.host_limit.is_none() && !population.was_complete() {
                course.bad_end = Some(too_few(plan, &population));
            }
        }
        other => course.end_badly(setup, other),
    }
    course.elapsed = lookout.begun.elapsed();
    lookout.look(setup, &storms);
    course.detection = lookout.detection;
    course.peak_resident_bytes = lookout.peak_resident_bytes;
    course.storms = storms.counts();
    course.observers = storms.observed();
    Ok(course)
}

impl Course {
    /// Ends what still runs, for a signal.
    fn interrupt(&mut self, setup: &mut Setup<impl Contract>, signal: i32) {
        self.signal = Some(signal);
        self.unchecked.push(EndCheck::LastSweep);
        if !setup.fleet.kill(KILL_TIMEOUT) {
            self.unchecked.push(EndCheck::Ends);
        }
    }

    /// Ends what still runs.
    fn end_badly(&mut self, setup: &mut Setup<impl Contract>, why: PhaseEnd) {
        match why {
            PhaseEnd::Violation => self.cut_short = true,
            PhaseEnd::Bad(violation) => self.bad_end = Some(violation),
            PhaseEnd::HostLimit(sentence) => {
                self.host_limit = Some(sentence);
                self.unchecked.push(EndCheck::LastSweep);
            }
            PhaseEnd::Ended | PhaseEnd::Deadline | PhaseEnd::Signal(_) => {}
        }
        if let Err(also) = kill(setup) {
            self.bad_end.get_or_insert_with(|| Violation::of_run(also));
        }
    }
}

/// The last sweep.
fn finish(
    lookout: &mut Lookout<'_>,
    setup: &mut Setup<impl Contract>,
    storms: &Storms,
    course: &mut Course,
) {
    lookout.watch.phase("the guest makes its last sweep");
    lookout.status.sweeping = true;
    setup.fleet.request_stop();
    let bytes = setup.fleet.members.iter().map(|member| member.vm.object().bytes()).sum();
    let bound = sweep_bound(bytes);
    match lookout.phase(setup, storms, bound, |_| Ok(())) {
        PhaseEnd::Ended => {}
        PhaseEnd::Signal(signal) => course.interrupt(setup, signal),
        PhaseEnd::Deadline => {
            let failed = setup.figures().host.failed_evictions;
            let mut said = unfinished(bound, failed);
            if let Err(also) = kill(setup) {
                said = format!("{said}; {also}");
            }
            course.bad_end = Some(Violation::of_run(said));
        }
        other => course.end_badly(setup, other),
    }
}

/// The run was over before there were as many VMs as it was to have.
fn too_few(plan: &Plan, population: &Population) -> Violation {
    let made = 1 + population.count.cloned;
    let why = match population.count.failed {
        0 => "the first VM had hardly begun to work; choose a longer --duration".to_owned(),
        failed => format!(
            "{} attempts to clone failed, for want of swap, as injected, or since a disk or a peer did not answer",
            human_count(failed)
        ),
    };
    Violation::of_run(format!("only {made} of --vms {} were there: {why}", plan.vms))
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

fn kill(setup: &mut Setup<impl Contract>) -> Result<(), String> {
    match setup.fleet.kill(KILL_TIMEOUT) {
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
    judge: &Judge,
) -> Option<PhaseEnd> {
    let named = |text: String| match is_one_of_several {
        true => format!("VM {}: {text}", member.number),
        false => text,
    };
    if let Some(Outcome::Failed(error)) = &member.outcome
        && let Some(sentence) = judge.host_limit(error)
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
        Outcome::Rebooted => Violation::of_run("the guest reset its setup"),
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

fn wrong_end_of_any(setup: &Setup<impl Contract>, judge: &Judge) -> Option<PhaseEnd> {
    let is_one_of_several = setup.fleet.is_one_of_several();
    setup.fleet.members.iter().find_map(|member| wrong_end(member, is_one_of_several, judge))
}

/// Looks at a run again and again.
struct Lookout<'a> {
    watch: &'a dyn Watch,
    judge: Judge,
    begun: Instant,
    fail_fast: bool,
    until_oracle: bool,
    status: Status,
    detection: Option<Detection>,
    peak_resident_bytes: u64,
}

impl<'a> Lookout<'a> {
    fn new(plan: &Plan, judge: Judge, watch: &'a dyn Watch) -> Self {
        Self {
            watch,
            judge,
            begun: Instant::now(),
            fail_fast: plan.fail_fast,
            until_oracle: plan.until_oracle,
            status: Status::default(),
            detection: None,
            peak_resident_bytes: 0,
        }
    }

    /// Waits for the end of a phase of so long. `tend` is called again and again while it lasts.
    fn phase<P: Contract>(
        &mut self,
        setup: &mut Setup<P>,
        storms: &Storms,
        length: Duration,
        mut tend: impl FnMut(&mut Setup<P>) -> Result<(), PhaseEnd>,
    ) -> PhaseEnd {
        let mut patience = Patience::at_work(length, Instant::now());
        loop {
            let slice = patience.slice();
            setup.fleet.poll(slice.unwrap_or_default());
            self.look(setup, storms);
            if let Some(wrong) = wrong_end_of_any(setup, &self.judge) {
                return wrong;
            }
            if setup.fleet.have_all_ended() {
                return PhaseEnd::Ended;
            }
            if self.fail_fast && self.detection.is_some() {
                return PhaseEnd::Violation;
            }
            if let Some(signal) = self.watch.signal() {
                return PhaseEnd::Signal(signal);
            }
            if slice.is_none() {
                return PhaseEnd::Deadline;
            }
            if let Err(end) = tend(setup) {
                return end;
            }
        }
    }

    fn look(&mut self, setup: &Setup<impl Contract>, storms: &Storms) {
        let found = violations::found_so_far(setup).or(storms.found().map(|check| (check, 1)));
        // The oracle's come first if there are any.
        let found = found.filter(|&(by, _)| !self.until_oracle || by == Check::GuestOracle);
        if let (Some((by, _)), None) = (found, self.detection) {
            let seconds = self.begun.elapsed().as_secs_f64();
            self.detection = Some(Detection { seconds, by });
            self.watch.note_failure();
        }
        // What the kernel does not tell is not a peak.
        let resident = setup.mm.resident_bytes().unwrap_or(0);
        self.peak_resident_bytes = self.peak_resident_bytes.max(resident);
        let figures = setup.figures();
        self.status = Status {
            elapsed: self.begun.elapsed(),
            sweeping: self.status.sweeping,
            verified: figures.done.guest.verified,
            faults: figures.done.faults,
            evictions: figures.host.evictions,
            resident_bytes: resident,
            violations: found.map_or(0, |(_, count)| count),
        };
        self.watch.status(&self.status);
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
