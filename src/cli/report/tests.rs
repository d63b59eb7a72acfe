//! Rendering of reports.

use std::time::Duration;

use super::*;
use crate::lab::{Fate, Item, Pages, PopulationCount, Record};

/// A run that passed.
pub(crate) fn report() -> Report {
    Report {
        gnomon_version: "0.0.0",
        result: Verdict::Passed,
        seconds: 10.0,
        worked_seconds: 9.0,
        config: ConfigReport {
            paging: "shadow".to_owned(),
            memory_bytes: 512 << 20,
            host_memory_bytes: 128 << 20,
            swap_bytes: 1 << 30,
            vcpus: 2,
            vms: 1,
            churn_seconds: None,
            duration_seconds: 30.0,
            workloads: vec![Workload::Seq, Workload::Zipf],
            dma: 2,
            invalidations: vec![Invalidation::Reclaim],
            rate_per_second: 20_000,
            seed: 42,
            policy: PolicyName::Clock,
            paranoid: false,
            fail_fast: false,
            sabotage: None,
            inject: Vec::new(),
        },
        guest: GuestReport { verified: 1_000_000, writes: 400_000, ..GuestReport::default() },
        faults: FaultReport { read: 1234, ..FaultReport::default() },
        exits: ExitReport::default(),
        storms: vec![StormCount {
            kind: "reclaim".to_owned(),
            tried: 200_000,
            done: 70_000,
            failed_batches: 0,
            broken: None,
            wrong: None,
            limited: None,
        }],
        observers: Vec::new(),
        vms: VmsReport::default(),
        host: MmStats { swap_ins: 5, ..MmStats::default() },
        shadow: ShadowStats::default(),
        direct: crate::direct_mmu::DirectStats::default(),
        dma: DmaStats { operations: 777, bytes: 777 << 12, ..DmaStats::default() },
        iotlb: IotlbStats { hits: 3000, installs: 700, upgrades: 11, ..IotlbStats::default() },
        fault_latency: LatencyReports {
            all: Some(LatencyReport {
                count: 1234,
                p50_ns: 12_000,
                p99_ns: 90_000,
                max_ns: 2_000_000,
            }),
            ..LatencyReports::default()
        },
        memory: MemoryReport {
            budget_bytes: 128 << 20,
            peak_frame_bytes: 128 << 20,
            peak_resident_bytes: 64 << 20,
        },
        peers: None,
        injected: None,
        violations: Violations::default(),
        detection: None,
        host_limit: None,
        cut_short: false,
        signal: None,
        not_checked: Vec::new(),
        guest_console: Vec::new(),
    }
}

fn failed(count: u64) -> Report {
    let mut report = report();
    report.result = Verdict::Failed;
    let texts = (0..count.min(64)).map(|page| format!("page {page} is wrong"));
    report.violations.add(Check::GuestOracle, texts, count);
    report.detection = Some(Detection { seconds: 2.5, by: Check::GuestOracle });
    report
}

/// The words of the line of the table that begins so.
fn words<'a>(rendered: &'a str, begin: &str) -> Vec<&'a str> {
    let line = rendered.lines().find(|line| line.trim_start().starts_with(begin));
    line.unwrap_or_else(|| panic!("no line {begin:?} in:\n{rendered}")).split_whitespace().collect()
}

#[test]
fn the_table_has_what_was_run_and_what_came_of_it() {
    let rendered = table::render(&report());
    assert!(
        rendered.starts_with("stress: 512M guest in 128M of frames, 2 vCPUs, seq,zipf, seed 42\n")
    );
    assert!(words(&rendered, "accesses verified").ends_with(&["1,000,000", "100000"]));
    assert!(words(&rendered, "commands carried out by DMA").ends_with(&["777", "78"]));
    assert!(words(&rendered, "IOTLB: misses").ends_with(&["711", "71"]));
    assert!(words(&rendered, "faults: read").ends_with(&["1,234", "123"]));
    assert!(words(&rendered, "storm: reclaim, pages done").ends_with(&["70,000", "7000"]));
    assert!(words(&rendered, "pages read from swap").ends_with(&["5", "0"]));
    assert!(words(&rendered, "all").ends_with(&["1,234", "12.0", "µs", "90.0", "µs", "2.0", "ms"]));
    assert!(words(&rendered, "frames in use").ends_with(&["128", "MiB", "100.0", "%"]));
    assert!(words(&rendered, "resident").ends_with(&["64", "MiB", "50.0", "%"]));
    assert!(rendered.ends_with("PASSED after 10.0 s: no violations"), "{rendered}");
    assert!(!rendered.contains("violations:"), "{rendered}");
}

#[test]
fn a_failure_shows_the_first_twenty_violations() {
    let rendered = table::render(&failed(1000));
    assert!(rendered.contains("violations: 1,000\n"), "{rendered}");
    assert!(rendered.contains("page 19 is wrong") && !rendered.contains("page 20 is wrong"));
    assert!(rendered.contains("... and 980 more"), "{rendered}");
    assert!(rendered.contains(
        "FAILED after 10.0 s; the first violation was found after 2.5 s by the guest's oracle"
    ));
    let rendered = table::render(&failed(3));
    assert!(!rendered.contains("more"), "{rendered}");
}

#[test]
fn what_a_guest_says_cannot_drive_the_terminal() {
    let mut report = failed(0);
    report.violations.add_one(Violation::of_run("bad \x1b[31m news"));
    let rendered = table::render(&report);
    assert!(!rendered.contains('\x1b') && rendered.contains("bad \\u{1b}[31m news"), "{rendered}");
}

#[test]
fn sabotage_is_caught_or_not() {
    let mut report = failed(1);
    report.config.sabotage = Some(SabotageName::DropDirty);
    let rendered = table::render(&report);
    assert!(
        rendered.contains("sabotage drop-dirty was caught after 2.5 s by the guest's oracle"),
        "{rendered}"
    );
    let mut report = self::report();
    report.config.sabotage = Some(SabotageName::SkipFlush);
    let rendered = table::render(&report);
    assert!(rendered.contains("should not have: sabotage skip-flush was not caught"), "{rendered}");
}

#[test]
fn injected_faults_are_counted_in_both_forms() {
    let mut report = report();
    let injected = Injected {
        items: vec![Item {
            item: "eintr=0.5".into(),
            calls: 2000,
            struck: 1001,
            kind: "calls",
            advice: "",
        }],
        pages: Some(Pages { in_frames: 3, in_swap: 4, lost: 0 }),
        ..Injected::default()
    };
    report.injected = Some(injected);
    let rendered = table::render(&report);
    assert!(rendered.contains("injected eintr=0.5: struck 1,001 of 2,000 calls\n"), "{rendered}");
    let value = serde_json::to_value(&report).unwrap();
    let item = serde_json::json!({ "item": "eintr=0.5", "calls": 2000, "struck": 1001 });
    assert_eq!(value["injected"]["items"], serde_json::json!([item]));
    assert_eq!(value["injected"]["pages"]["in_swap"], 4);
}

#[test]
fn an_interrupted_run_says_so() {
    let mut report = report();
    report.result = Verdict::Interrupted;
    report.signal = Some(2);
    let rendered = table::render(&report);
    assert!(rendered.contains("INTERRUPTED by signal 2 after 9.0 s of 30.0 s"), "{rendered}");
}

#[test]
fn a_limit_of_the_host_is_an_end_of_its_own_and_no_violation() {
    let mut report = report();
    report.result = Verdict::HostLimit;
    report.host_limit = Some("cannot start the thread of vCPU 1: raise that limit".to_owned());
    let rendered = table::render(&report);
    let said = "CUT SHORT by a limit of this host after 9.0 s of 30.0 s, with nothing wrong until \
                then: cannot start the thread of vCPU 1: raise that limit";
    assert!(rendered.ends_with(said), "{rendered}");
    assert!(!rendered.contains("violation") && !rendered.contains("FAILED"), "{rendered}");
    assert!(!report.failed());
    let value = serde_json::to_value(report).unwrap();
    assert_eq!(value["result"], "host_limit");
    assert!(value["host_limit"].as_str().unwrap().starts_with("cannot start"));
    assert_eq!(value["violations"]["total"], 0);
}

#[test]
fn json_has_the_same_figures() {
    let value = serde_json::to_value(failed(1)).unwrap();
    assert_eq!(value["result"], "failed");
    assert_eq!(value["config"]["workloads"], serde_json::json!(["seq", "zipf"]));
    assert_eq!(value["violations"]["total"], 1);
    assert_eq!(value["violations"]["first"][0]["by"], "guest_oracle");
    assert_eq!(value["violations"]["first"][0]["text"], "page 0 is wrong");
    assert_eq!(value["detection"]["seconds"], 2.5);
    assert_eq!(value["host"]["swap_ins"], 5);
    assert_eq!(value["dma"]["bytes"], 777 << 12);
    assert_eq!(value["iotlb"]["hits"], 3000);
    assert_eq!(value["fault_latency"]["all"]["p99_ns"], 90_000);
    assert_eq!(value["fault_latency"]["read"], serde_json::Value::Null);
}

#[test]
fn a_signal_at_the_end_interrupts_only_what_it_cut_short() {
    let mut whole = report();
    whole.note_signal(Some(15));
    assert_eq!((whole.result, whole.signal), (Verdict::Passed, None), "it came too late");
    let mut cut = report();
    cut.not_checked = vec![EndCheck::LastSweep, EndCheck::ReverseMap];
    cut.violations.unchecked.extend(&cut.not_checked);
    cut.note_signal(Some(15));
    assert_eq!((cut.result, cut.signal), (Verdict::Interrupted, Some(15)));
    let rendered = table::render(&cut);
    let said = "cut short by signal 15; not checked: the guest's last sweep over its memory, the \
                reverse map (I3)\n\nINTERRUPTED by signal 15";
    assert!(rendered.contains(said), "{rendered}");
    let value = serde_json::to_value(cut).unwrap();
    assert_eq!(value["not_checked"], serde_json::json!(["last_sweep", "reverse_map"]));
    let mut failed = failed(1);
    failed.not_checked = vec![EndCheck::Leftovers];
    failed.note_signal(Some(15));
    assert_eq!((failed.result, failed.signal), (Verdict::Failed, Some(15)));
}

#[test]
fn any_violation_fails_a_run_even_an_interrupted_one() {
    let mut course = Course {
        elapsed: Duration::from_secs(1),
        worked: Duration::from_secs(1),
        bad_end: None,
        host_limit: None,
        cut_short: false,
        signal: Some(15),
        unchecked: Vec::new(),
        detection: None,
        peak_resident_bytes: 0,
        storms: Vec::new(),
        observers: Vec::new(),
        population: PopulationCount::default(),
    };
    let mut found = Violations::default();
    assert_eq!(verdict(&found, &course), Verdict::Interrupted);
    course.host_limit = Some("no threads".to_owned());
    assert_eq!(verdict(&found, &course), Verdict::HostLimit);
    found.first.push(Violation { by: Check::Run, text: String::new() });
    found.total = 1;
    assert_eq!(verdict(&found, &course), Verdict::Failed);
}

#[test]
fn several_vms_have_lines_of_their_own() {
    let mut report = report();
    assert!(!table::render(&report).contains("cloned from"), "one VM needs none");
    let record = |number: u32| Record {
        number,
        parent: (number > 1).then_some(1),
        fate: Fate::Asked,
        guest: GuestCounters { verified: 1000, ..GuestCounters::default() },
        faults: 5,
        clone: (number > 1).then_some(crate::vmm::CloneFigures {
            paused: Duration::from_millis(2),
            to_first_entry: Some(Duration::from_millis(8)),
            shared_pages: 300,
        }),
    };
    let records: Vec<Record> = (1..=20).map(record).collect();
    let population = PopulationCount { cloned: 19, killed: 4, ..PopulationCount::default() };
    report.vms = VmsReport::new(&records, population, 12);
    report.config.vms = 20;
    let rendered = table::render(&report);
    assert!(rendered.starts_with("stress: 20 VMs, 512M guest"), "{rendered}");
    assert_eq!(words(&rendered, "16 "), ["16", "1", "1,000", "0", "5", "8.0", "asked"]);
    assert!(rendered.contains("... and 4 more"), "{rendered}");
    assert!(words(&rendered, "clone ms: pause to").ends_with(&["8.0", "8.0"]));
    assert!(words(&rendered, "pages shared").ends_with(&["300", "300"]));
    assert!(rendered.contains("VMs cloned: 19,") && rendered.contains("across VMs: 12"));
}
