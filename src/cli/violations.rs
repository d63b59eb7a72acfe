//! What all checks of a run found, in one list.
//!
//! Guarantee: each finding is one sentence that names the page or the frame that it is about, and
//! the total counts every one, also those that the checks themselves no longer keep in full.

use std::collections::BTreeSet;
use std::fmt;

use super::fleet::Member;
use super::machine::Machine;
use super::values::human_bytes;
use crate::abi;
use crate::addr::Pfn;
use crate::host_mm::swap::SwapError;
use crate::host_mm::{HostMm, MmError};
use crate::sys::signal;
use crate::vmm::{Contract, ViolationReport, VmError};

/// Which check found a violation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Check {
    /// The test guest, which knows what each of its pages has to hold.
    GuestOracle,
    /// Host memory management, at each eviction.
    HostMemory,
    /// The kernel, through the tripwire of `--paranoid`.
    Tripwire,
    /// The checksums of pages in swap.
    SwapChecksum,
    /// The comparison of reverse map and shadow tables at the end.
    ReverseMap,
    /// Those who look on: at the dirty log, at snapshots.
    Observer,
    /// The watch over memory in use.
    Budget,
    /// What is left of peers that are gone.
    Peer,
    /// The count of injected faults: one never struck.
    Injection,
    /// The run itself: the VM failed, or did not end as it should.
    Run,
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::GuestOracle => "the guest's oracle",
            Self::HostMemory => "the checks of host memory",
            Self::Tripwire => "the tripwire",
            Self::SwapChecksum => "the checksums of swap",
            Self::ReverseMap => "the check of the reverse map",
            Self::Observer => "those who look on",
            Self::Budget => "the watch over the budget",
            Self::Peer => "the look for what peers left behind",
            Self::Injection => "the count of injected faults",
            Self::Run => "the end of the run",
        })
    }
}

/// What is looked at only at the end of a run, and so not when that is cut short.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum EndCheck {
    /// The guest's, of all its memory.
    LastSweep,
    /// That every VM comes to its end.
    Ends,
    /// The comparison of reverse map and shadow tables, IOTLB or window.
    ReverseMap,
    /// What the statistics say of shared pages.
    Statistics,
    /// What VMs leave behind that are gone.
    Leftovers,
    /// What peers leave behind that are gone.
    Peers,
    /// Whether the guest's pages are still there after faults that were injected.
    InjectedPages,
}

impl fmt::Display for EndCheck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::LastSweep => "the guest's last sweep over its memory",
            Self::Ends => "the end of a VM, which had not stopped yet",
            Self::ReverseMap => "the reverse map (I3)",
            Self::Statistics => "the statistics of shared pages",
            Self::Leftovers => "what VMs leave behind",
            Self::Peers => "what peers leave behind",
            Self::InjectedPages => "the guest's pages after the injected faults",
        })
    }
}

/// The sentence about a run that was cut short, and what was therefore not checked.
pub(crate) fn cut_short(signal: i32, unchecked: &BTreeSet<EndCheck>) -> Option<String> {
    let names: Vec<String> = unchecked.iter().map(ToString::to_string).collect();
    (!names.is_empty())
        .then(|| format!("cut short by signal {signal}; not checked: {}", names.join(", ")))
}

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub(crate) struct Violation {
    /// The check that found it.
    pub(crate) by: Check,
    /// What is wrong, and where.
    pub(crate) text: String,
}

impl Violation {
    /// A run that did not end as it should.
    pub(crate) fn of_run(text: impl Into<String>) -> Self {
        Self { by: Check::Run, text: text.into() }
    }

    /// A VM that failed: some checks end it themselves.
    pub(crate) fn of_failure(error: &VmError) -> Self {
        let by = match error {
            VmError::Stale(_) => Check::Tripwire,
            VmError::Host(MmError::Swap(SwapError::Checksum { .. })) => Check::SwapChecksum,
            VmError::Paging(error) if error.is_corruption() => Check::SwapChecksum,
            _ => Check::Run,
        };
        Self { by, text: error.to_string() }
    }
}

/// Findings of VMs that are kept in full, however many there are.
const MAX_KEPT: usize = 1024;

/// All findings of a run.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub(crate) struct Violations {
    /// How many there were.
    pub(crate) total: u64,
    /// The first ones of each check.
    pub(crate) first: Vec<Violation>,
    /// What was not looked at, or not to the end.
    #[serde(skip)]
    pub(crate) unchecked: BTreeSet<EndCheck>,
}

impl Violations {
    /// Adds findings of one check, of which `total` may be more than `texts`.
    pub(crate) fn add(&mut self, by: Check, texts: impl IntoIterator<Item = String>, total: u64) {
        let before = self.first.len();
        self.first.extend(texts.into_iter().map(|text| Violation { by, text }));
        let added = self.first.len() - before;
        self.total = self.total.saturating_add(total.max(added as u64));
    }

    /// Adds all of other findings; those kept in full are bounded.
    pub(crate) fn append(&mut self, other: Self) {
        let room = MAX_KEPT.saturating_sub(self.first.len());
        self.first.extend(other.first.into_iter().take(room));
        self.total = self.total.saturating_add(other.total);
        self.unchecked.extend(other.unchecked);
    }

    /// Looks, unless the end is to be quick, and adds what there is: a sentence for each difference. A
    /// look that was under way when a signal came has not seen everything.
    pub(crate) fn look(&mut self, check: EndCheck, by: Check, look: impl FnOnce() -> Vec<String>) {
        if !signal::is_stop_asked() {
            self.add(by, look(), 0);
        }
        if signal::is_stop_asked() {
            self.unchecked.insert(check);
        }
    }

    /// As [`look`](Self::look), if what is to be compared is at rest.
    pub(crate) fn look_at_rest(
        &mut self,
        (check, is_at_rest): (EndCheck, bool),
        by: Check,
        look: impl FnOnce() -> Vec<String>,
    ) {
        match is_at_rest {
            true => self.look(check, by, look),
            false => drop(self.unchecked.insert(check)),
        }
    }

    /// Adds one finding.
    pub(crate) fn add_one(&mut self, violation: Violation) {
        self.first.push(violation);
        self.total = self.total.saturating_add(1);
    }
}

/// Findings so far, of the checks that are always on; cheap enough to be asked many times a second.
pub(crate) fn found_so_far(machine: &Machine<impl Contract>) -> Option<(Check, u64)> {
    let oracle = machine.fleet.oracle_violations();
    let host = machine.mm.violations().1;
    let differences = machine.fleet.differences();
    let first = match (oracle, host, differences) {
        (0, 0, 0) => return None,
        (0, 0, _) => Check::ReverseMap,
        (0, _, _) => Check::HostMemory,
        _ => Check::GuestOracle,
    };
    Some((first, oracle.saturating_add(host).saturating_add(differences)))
}

/// Everything that the checks have found, after the VMs have ended. Of one that has not, in spite of
/// everything, only what it has found by itself.
pub(crate) fn collect(machine: &Machine<impl Contract>, peak_resident_bytes: u64) -> Violations {
    let mut all = machine.fleet.violations();
    all.append(of_host(&machine.mm, machine.fleet.have_all_ended(), peak_resident_bytes));
    all
}

/// What the checks of host memory have found. Whoever still runs (`is_at_rest` is false) is between a
/// page and its count.
pub(crate) fn of_host(mm: &HostMm, is_at_rest: bool, peak_resident_bytes: u64) -> Violations {
    let mut all = Violations::default();
    let (host, total) = mm.violations();
    all.add(Check::HostMemory, host.iter().map(ToString::to_string), total);
    let statistics = (EndCheck::Statistics, is_at_rest);
    all.look_at_rest(statistics, Check::HostMemory, || mm.miscounted());
    let stats = mm.stats();
    let budget = mm.config().host_memory_bytes;
    all.add(
        Check::Budget,
        over_budget(stats.peak_frames_in_use, stats.frames, peak_resident_bytes, budget),
        0,
    );
    all
}

/// What was found in one VM, with its number, if there are several; all of it if it has ended.
pub(crate) fn of_vm(member: &Member<impl Contract>, is_one_of_several: bool) -> Violations {
    let vm = &member.vm;
    let named = |text: String| match is_one_of_several {
        true => format!("VM {}: {text}", member.number),
        false => text,
    };
    let mut found = Violations::default();
    let reports = vm.violations();
    let texts = reports.iter().map(|report| named(describe(report)));
    found.add(Check::GuestOracle, texts, vm.violation_count());
    let differences = || vm.check_reverse_map().into_iter().map(named).collect();
    let reverse_map = (EndCheck::ReverseMap, member.has_ended);
    found.look_at_rest(reverse_map, Check::ReverseMap, differences);
    found
}

/// Frames that are looked at between two looks for a signal.
const CHUNK_FRAMES: u32 = 1 << 14;

/// What is left of VMs when all are gone, though nothing should be. Leaves off
/// when a [stop](signal::is_stop_asked) is asked for, and then knows of nothing.
pub(crate) fn left_behind(machine: &Machine<impl Contract>) -> Vec<String> {
    let mm = &machine.mm;
    let _quiet = mm.quiet();
    let mut found = Vec::new();
    for first in (0..mm.frame_count()).step_by(CHUNK_FRAMES as usize) {
        if signal::is_stop_asked() {
            return Vec::new();
        }
        // A fault that was overtaken may have left a page of zeros that nobody names: reclaim's to take.
        let end = first.saturating_add(CHUNK_FRAMES).min(mm.frame_count());
        let frames: Vec<Pfn> = (first..end).map(Pfn::new).collect();
        if let (Err(error), true) = (mm.evict_frames(&frames), found.is_empty()) {
            found.push(error.to_string());
        }
    }
    let stats = mm.stats();
    for (what, count) in [
        ("frames", stats.frames_in_use),
        ("slots of swap", stats.swap_slots_used),
        ("shared pages", mm.shared_pages()),
    ] {
        if count > 0 {
            found.push(format!("{count} {what} are in use though every VM is gone"));
        }
    }
    found
}

/// A guest's report in words. The guest may send anything.
fn describe(report: &ViolationReport) -> String {
    let &ViolationReport { vcpu, kind, gva, expected, found, page } = report;
    let place = format!("guest frame {page:#x} at address {gva:#x}");
    let seen = format!("expected {expected:#x}, found {found:#x} (vCPU {vcpu})");
    let is = |violation: abi::Violation| kind == violation as u64;
    if is(abi::Violation::Number) {
        format!("I1/I2: {place} carries another page's number: {seen}")
    } else if is(abi::Violation::Version) {
        format!("I1/I2: {place} has a version that is not the ledger's: {seen}")
    } else if is(abi::Violation::Checksum) {
        format!("I1/I2: {place} has a checksum that does not match its body: {seen}")
    } else if is(abi::Violation::Word) {
        format!("I1/I2: {place} has a wrong word: {seen}")
    } else if is(abi::Violation::SharedSum) {
        format!("I2: shared counters of {place} do not add up: {seen}")
    } else if is(abi::Violation::Paging) {
        format!("a page-table change at {place} was not obeyed: {seen}")
    } else if is(abi::Violation::Device) {
        format!("the DMA device did not do what the descriptor for {place} says: {seen}")
    } else {
        format!("the guest reports a violation of unknown kind {kind:#x}: {place}: {seen}")
    }
}

fn over_budget(peak_frames: u64, frames: u64, resident: u64, budget: u64) -> Vec<String> {
    let mut found = Vec::new();
    if peak_frames > frames {
        found.push(format!("I5: {peak_frames} frames were in use at once, of {frames}"));
    }
    if resident > budget {
        found.push(format!(
            "I5: frames took up {resident} bytes ({}), of {budget} ({})",
            human_bytes(resident),
            human_bytes(budget)
        ));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::{Gpa, PAGE_SIZE};
    use crate::host_mm::{HostMmConfig, MIN_HOST_MEMORY_BYTES, Placement, Sabotage, SwapConfig};

    fn report(kind: u64) -> ViolationReport {
        ViolationReport { vcpu: 1, kind, gva: 0x40_0000, expected: 5, found: 4, page: 77 }
    }

    #[test]
    fn each_report_names_its_page_and_what_was_found() {
        let words =
            ["number", "version", "checksum", "word", "add up", "page-table", "DMA", "unknown"];
        for (kind, word) in (1..).zip(words) {
            let said = describe(&report(kind));
            for part in [word, "guest frame 0x4d", "0x400000", "expected 0x5, found 0x4", "vCPU 1"]
            {
                assert!(said.contains(part), "no {part:?} in: {said}");
            }
        }
    }

    #[test]
    fn the_total_counts_what_was_not_kept() {
        let mut all = Violations::default();
        all.add(Check::GuestOracle, ["a".to_owned(), "b".to_owned()], 1000);
        all.add(Check::ReverseMap, ["c".to_owned()], 0);
        all.add_one(Violation::of_run("d"));
        assert_eq!((all.total, all.first.len()), (1002, 4));
        assert_eq!(all.first[2].by, Check::ReverseMap);
    }

    #[test]
    fn what_is_still_in_motion_or_cut_short_is_not_compared() {
        let look = |is_at_rest| {
            let mut all = Violations::default();
            let count = || vec!["one more than counted".to_owned()];
            all.look_at_rest((EndCheck::Statistics, is_at_rest), Check::HostMemory, count);
            (all.total, all.unchecked.contains(&EndCheck::Statistics))
        };
        assert_eq!((look(true), look(false)), ((1, false), (0, true)));
        let _stop = signal::pretended::Stop::after(0);
        assert_eq!((look(true), look(false)), ((0, true), (0, true)));
    }

    #[test]
    fn the_budget_is_kept_up_to_the_last_byte() {
        assert!(over_budget(10, 10, 4096, 4096).is_empty());
        let found = over_budget(11, 10, 8192, 4096);
        assert_eq!(found.len(), 2);
        assert!(found[0].contains("11 frames"), "{found:?}");
        assert!(found[1].contains("8192 bytes"), "{found:?}");
    }

    /// Invariant I5 in bytes, with a rule broken on purpose and without.
    #[test]
    fn frames_that_keep_their_memory_are_noticed() {
        const RATION: u64 = MIN_HOST_MEMORY_BYTES;
        for (sabotage, is_noticed) in [(None, false), (Some(Sabotage::KeepMemory), true)] {
            let placement = Placement::Identity { guest_bytes: 2 * RATION };
            let swap = SwapConfig { path: None, dir: None, bytes: 2 * RATION };
            let config = HostMmConfig { placement, sabotage, swap, ..HostMmConfig::new(RATION) };
            let mm = HostMm::new(config).unwrap();
            let object = mm.create_object(2 * RATION).unwrap();
            for at in (0..2 * RATION).step_by(PAGE_SIZE) {
                object.write(Gpa::new(at), &[1; PAGE_SIZE]).unwrap();
            }
            let found = of_host(&mm, true, mm.resident_bytes().unwrap());
            let noticed = found.first.iter().any(|one| one.text.contains("I5: frames took up"));
            assert_eq!(noticed, is_noticed, "{sabotage:?}: {found:?}");
        }
    }
}
