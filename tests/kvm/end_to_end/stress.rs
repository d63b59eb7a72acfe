//! `gnomon stress` without sabotage: it finds nothing, and says so in a report that adds up.

use std::fs;

use libtest_mimic::Trial;
use serde_json::Value;

use crate::patience::{at_least, until_enough};
use crate::process::run;
use crate::trial::{Ignore, kvm_trial, kvm_trial_or_ignore};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        kvm_trial("stress_with_two_vcpus", stress_with_two_vcpus),
        kvm_trial_or_ignore("stress_paranoid", stress_paranoid),
        kvm_trial("stress_of_one_workload_without_storms", stress_of_one_workload_without_storms),
        kvm_trial("stress_with_clones_that_come_and_go", stress_with_clones_that_come_and_go),
        kvm_trial("stress_too_short_for_its_vms", stress_too_short_for_its_vms),
        kvm_trial("stress_with_a_report_that_cannot_be", stress_with_a_report_that_cannot_be),
    ]
}

/// Runs `stress` with a JSON report; returns that.
fn stress(arguments: &[&str]) -> Result<Value, Ignore> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let json = folder.path().join("report.json");
    let mut all = vec!["stress", "--json", json.to_str().expect("a plain path")];
    all.extend(arguments);
    let finished = run(&all);
    if let Some(line) = finished.stderr.lines().find(|line| line.contains("--paranoid:")) {
        return Err(Ignore(line.to_owned()));
    }
    let finished = finished.with_code(0);
    assert!(finished.stdout.contains("PASSED"), "{finished:#?}");
    Ok(serde_json::from_slice(&fs::read(&json).expect("a report")).expect("JSON"))
}

fn number(report: &Value, pointer: &str) -> u64 {
    let value = report.pointer(pointer).and_then(Value::as_u64);
    value.unwrap_or_else(|| panic!("no number at {pointer}: {report:#}"))
}

/// A clean run, as long as it takes to come to so much of each figure.
fn clean(seconds: u32, arguments: &[&str], floors: &[(&str, u64)]) -> Result<Value, Ignore> {
    until_enough(seconds, |duration| {
        let report = match stress(&[arguments, &["--duration", duration]].concat()) {
            Ok(report) => report,
            Err(ignore) => return Ok(Err(ignore)),
        };
        check_clean(&report);
        at_least(&report, &[("/guest/verified", 1000), ("/host/evictions", 1)])?;
        at_least(&report, floors).map(|()| Ok(report))
    })
}

/// What holds for each clean run, however long.
fn check_clean(report: &Value) {
    assert_eq!(report["result"], "passed", "{report:#}");
    assert_eq!(number(report, "/violations/total"), 0, "{report:#}");
    assert!(report["detection"].is_null() && report["signal"].is_null(), "{report:#}");
    assert_eq!(report["cut_short"], false);
    let budget = number(report, "/config/host_memory_bytes");
    assert_eq!(number(report, "/memory/budget_bytes"), budget);
    for peak in ["/memory/peak_frame_bytes", "/memory/peak_resident_bytes"] {
        let bytes = number(report, peak);
        assert!(bytes > 0 && bytes <= budget, "{peak}: {bytes} of {budget} bytes");
    }
    let faults: u64 = ["read", "write", "execute"]
        .iter()
        .map(|kind| number(report, &format!("/faults/{kind}")))
        .sum();
    assert_eq!(number(report, "/fault_latency/all/count"), faults, "{report:#}");
    assert!(
        number(report, "/fault_latency/all/p50_ns") <= number(report, "/fault_latency/all/max_ns")
    );
}

fn stress_with_two_vcpus() {
    // Both storms do something, and the guest some of everything.
    let mut floors = vec![("/storms/0/done", 100), ("/storms/1/done", 100)];
    floors.extend(
        [
            "/guest/writes",
            "/guest/shared_adds",
            "/guest/paging_ops",
            "/guest/dma_ops",
            "/guest/dma_bytes",
            "/host/swap_ins",
            "/shadow/invalidated",
            "/shadow/write_protected",
            "/iotlb/installs",
            "/iotlb/hits",
        ]
        .map(|figure| (figure, 1)),
    );
    let arguments = ["--memory", "96M", "--host-memory", "24M", "--vcpus", "2", "--seed", "7"];
    let report = clean(5, &arguments, &floors).expect("nothing to ignore it for");
    assert_eq!(number(&report, "/config/seed"), 7);
    assert_eq!(number(&report, "/config/vcpus"), 2);
    assert_eq!(number(&report, "/config/memory_bytes"), 96 << 20);
    assert!(report["worked_seconds"].as_f64().is_some_and(|seconds| seconds >= 5.0));
    let storms = report["storms"].as_array().expect("a list");
    assert_eq!(storms.len(), 2);
    assert!(storms.iter().all(|storm| storm["broken"].is_null()), "{report:#}");
    let [device, guest] = ["/dma/operations", "/guest/dma_ops"].map(|at| number(&report, at));
    assert!(device >= guest, "the guest counts what it has seen finished: {report:#}");
}

fn stress_paranoid() -> Result<(), Ignore> {
    let arguments = ["--memory", "64M", "--host-memory", "16M", "--vcpus", "2", "--paranoid"];
    let report = clean(5, &arguments, &[])?;
    assert_eq!(report["config"]["paranoid"], true);
    Ok(())
}

fn stress_of_one_workload_without_storms() {
    let arguments = [
        "--memory",
        "48M",
        "--host-memory",
        "16M",
        "--vcpus",
        "1",
        "--workload",
        "zipf",
        "--invalidate",
        "none",
        "--dma",
        "0",
    ];
    let report = clean(2, &arguments, &[]).expect("nothing to ignore it for");
    assert_eq!(number(&report, "/guest/paging_ops"), 0, "only zipf runs");
    assert_eq!(number(&report, "/guest/dma_ops"), 0, "without the device");
    assert_eq!(report["storms"].as_array().map(Vec::len), Some(0));
}

fn stress_with_clones_that_come_and_go() {
    let arguments = [
        "--memory",
        "48M",
        "--host-memory",
        "24M",
        "--vcpus",
        "2",
        "--vms",
        "3",
        "--churn",
        "500ms",
        "--invalidate",
        "reclaim,clean,migrate,merge,cow,zero,remap,free",
    ];
    let mut floors = vec![("/vms/cloned", 5), ("/vms/killed", 1), ("/vms/asked", 1)];
    floors.push(("/shadow/invalidated", 1));
    // Giving back is the guest's affair, and no storm.
    let storms: Vec<String> = (0..7).map(|storm| format!("/storms/{storm}/done")).collect();
    floors.extend(storms.iter().map(|storm| (storm.as_str(), 1)));
    let report = clean(8, &arguments, &floors).expect("nothing to ignore it for");
    assert_eq!(number(&report, "/config/vms"), 3);
    let each = report["vms"]["each"].as_array().expect("a list");
    let cloned = number(&report, "/vms/cloned");
    assert_eq!(each.len() as u64, cloned + 1, "{report:#}");
    // The sums are those of all of them, and clones of clones were among them.
    for count in ["verified", "writes"] {
        let sum: u64 = each.iter().map(|vm| number(vm, &format!("/guest/{count}"))).sum();
        assert_eq!(sum, number(&report, &format!("/guest/{count}")), "{count}: {report:#}");
    }
    assert!(each.iter().any(|vm| vm["parent"].as_u64().is_some_and(|parent| parent > 1)));
    let milliseconds = report["vms"]["clones"]["clone_ms"]["median"].as_f64();
    assert!(milliseconds.is_some_and(|ms| ms > 0.0), "{report:#}");
    // Every storm had all of them to itself.
    let each_storm = report["storms"].as_array().expect("a list");
    assert_eq!(each_storm.len(), storms.len());
    for storm in each_storm {
        assert!(storm["broken"].is_null(), "{storm:#}");
    }
}

fn stress_too_short_for_its_vms() {
    let finished = run(&["stress", "--memory", "48M", "--vms", "2", "--duration", "1ms"]);
    let finished = finished.with_code(1);
    let said = "only 1 of --vms 2 were there";
    assert!(finished.stdout.contains(said), "{finished:#?}");
}

fn stress_with_a_report_that_cannot_be() {
    let finished = run(&["stress", "--duration", "1s", "--json", "/no/such/folder/report.json"]);
    let finished = finished.with_code(2).says(&["/no/such/folder"]);
    assert_eq!(finished.stdout, "", "nothing was run");
}
