//! `--inject`: for each fault of the host the outcome that docs/fault-injection.md promises, and
//! the sentence that tells it. No trial may see a wrong byte, lose a page, or hang.

use std::fs;

use libtest_mimic::Trial;
use serde_json::Value;

use crate::patience::{at_least, until_enough};
use crate::process::{Finished, run};
use crate::trial::kvm_trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        kvm_trial("inject_a_write_that_fails_once", a_write_that_fails_once),
        kvm_trial("inject_writes_that_fail_now_and_then", writes_that_fail_now_and_then),
        kvm_trial("inject_a_disk_that_takes_no_more_writes", a_disk_that_takes_no_more_writes),
        kvm_trial("inject_a_full_disk", a_full_disk),
        kvm_trial("inject_reads_that_fail_now_and_then", reads_that_fail_now_and_then),
        kvm_trial("inject_a_disk_that_cannot_be_read", a_disk_that_cannot_be_read),
        kvm_trial("inject_full_swap", full_swap),
        kvm_trial("inject_short_writes", short_writes),
        kvm_trial("inject_interrupted_calls", interrupted_calls),
        kvm_trial("inject_pauses", pauses),
        kvm_trial("inject_a_slow_notifier", a_slow_notifier),
        kvm_trial("inject_late_flushes_beside_the_guests_own", late_flushes_beside_the_guests_own),
        kvm_trial("inject_a_slow_device", a_slow_device),
        kvm_trial("inject_failing_frame_allocations", failing_frame_allocations),
        kvm_trial("inject_everything_that_can_be_survived", everything_that_can_be_survived),
        kvm_trial("inject_what_never_strikes", what_never_strikes),
        kvm_trial("inject_hides_no_corruption", no_corruption_is_hidden),
    ]
}

const SMALL: [&str; 6] = ["--memory", "48M", "--host-memory", "12M", "--vcpus", "2"];

/// Runs `stress` with these faults; returns how it ended and its report.
fn stress(inject: &str, arguments: &[&str]) -> (Finished, Value) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let json = folder.path().join("report.json");
    let report = ["stress", "--json", json.to_str().expect("a plain path"), "--inject", inject];
    let finished = run(&[&report, &SMALL[..], arguments].concat());
    let report = fs::read(&json).unwrap_or_else(|error| panic!("{error}: {finished:#?}"));
    (finished, serde_json::from_slice(&report).expect("JSON"))
}

fn number(report: &Value, pointer: &str) -> u64 {
    let value = report.pointer(pointer).and_then(Value::as_u64);
    value.unwrap_or_else(|| panic!("no number at {pointer}: {report:#}"))
}

/// A run that was not impressed: nothing found, all work done, no page lost, and each item struck at
/// least so often. Returns how often each item struck.
fn survived(inject: &str, struck: &[u64]) -> Vec<u64> {
    until_enough(2, |duration| {
        let (finished, report) = stress(inject, &["--duration", duration, "--seed", "3"]);
        if number(&report, "/injected/pages/lost") == 0 && only_never_struck(&report) {
            return Err(format!("not every item struck: {report:#}"));
        }
        let finished = finished.with_code(0).says(&["injected on purpose: "]);
        assert!(finished.stdout.contains("PASSED"), "{finished:#?}");
        assert_eq!(report["result"], "passed", "{report:#}");
        assert_eq!(number(&report, "/violations/total"), 0);
        assert_eq!(number(&report, "/injected/pages/lost"), 0, "{report:#}");
        let items = report["injected"]["items"].as_array().expect("a list");
        let asked = report["config"]["inject"].as_array().expect("a list");
        assert_eq!((items.len(), asked.len()), (struck.len(), struck.len()));
        let mut counts = Vec::new();
        for (item, asked) in items.iter().zip(asked) {
            assert_eq!(&item["item"], asked);
            let (calls, struck) = (number(item, "/calls"), number(item, "/struck"));
            assert!(struck > 0 && struck <= calls, "{report:#}");
            let said = format!("injected {}: struck ", asked.as_str().expect("a name"));
            assert!(finished.stdout.contains(&said), "{finished:#?}");
            counts.push(struck);
        }
        at_least(&report, &[("/guest/verified", 1000), ("/injected/pages/in_swap", 100)])?;
        match counts.iter().zip(struck).all(|(count, floor)| count >= floor) {
            true => Ok(counts),
            false => Err(format!("{counts:?} of {struck:?}")),
        }
    })
}

/// Whether nothing is wrong with a run but that it was over before each item had struck.
fn only_never_struck(report: &Value) -> bool {
    let first = report["violations"]["first"].as_array().expect("a list");
    !first.is_empty()
        && first.len() as u64 == number(report, "/violations/total")
        && first.iter().all(|violation| violation["by"] == "injection")
}

/// A boot that could not go on, and says why in one sentence: the guest saw nothing wrong, and
/// every page is in a frame or can be read back from swap.
fn ended(inject: &str, parts: &[&str]) {
    let arguments = ["boot", "--memory", "48M", "--host-memory", "16M", "--inject", inject];
    let finished = run(&arguments).with_code(1).says(parts).says(&[
        "injected on purpose: ",
        "the guest was ended: host memory: ",
        &format!("injected {inject}: struck "),
        " read back from swap, 0 lost",
    ]);
    let told = finished.stderr.lines().filter(|line| line.contains("the guest was ended")).count();
    assert_eq!(told, 1, "one sentence: {finished:#?}");
    assert!(!finished.stdout.contains("FAIL"), "the guest saw no wrong data: {finished:#?}");
    assert!(!finished.stderr.contains("violations"), "{finished:#?}");
}

fn a_write_that_fails_once() {
    assert_eq!(survived("swap-write=EIO@50", &[1]), [1]);
}

fn writes_that_fail_now_and_then() {
    let items = "swap-write=EIO@10/40,swap-write=ENOMEM@0.01,swap-write=ENOSPC@333";
    assert_eq!(survived(items, &[11, 1, 1])[2], 1);
}

fn a_disk_that_takes_no_more_writes() {
    ended("swap-write=EIO@200+", &["cannot write swap slot", "Input/output error"]);
}

fn a_full_disk() {
    ended(
        "swap-write=ENOSPC@200+",
        &["the file system of the swap file is full", "No space left on device"],
    );
}

fn reads_that_fail_now_and_then() {
    assert_eq!(survived("swap-read=EIO@5/50,swap-read=ENOMEM@7", &[11, 1])[1], 1);
}

fn a_disk_that_cannot_be_read() {
    ended("swap-read=EIO@300+", &["cannot read swap slot", "Input/output error"]);
}

fn full_swap() {
    ended("swap-full@300+", &["swap is full: "]);
}

fn short_writes() {
    survived("short-write@3/5", &[11]);
}

fn interrupted_calls() {
    survived("eintr=0.3", &[11]);
}

fn a_slow_notifier() {
    survived("slow-notifier=20@0.002", &[1]);
}

/// Between the clearing of SPTEs and their flush, the guest changes its page tables and flushes for
/// itself: from then on nothing of the old translations may be left, the host's flush or not.
fn late_flushes_beside_the_guests_own() {
    let invalidations = "reclaim,clean,migrate,merge,cow,remap";
    until_enough(4, |duration| {
        let arguments =
            ["--duration", duration, "--workload", "paging", "--invalidate", invalidations];
        let (finished, report) = stress("slow-notifier=2@0.2", &arguments);
        assert!(finished.with_code(0).stdout.contains("PASSED"), "{report:#}");
        assert_eq!(number(&report, "/violations/total"), 0);
        at_least(&report, &[("/guest/paging_ops", 100)])
    });
}

/// Flushes sleep until the device is through with its access.
fn a_slow_device() {
    until_enough(3, |duration| {
        let arguments = ["--duration", duration, "--seed", "3", "--dma", "20"];
        let (finished, report) = stress("slow-device=2", &arguments);
        assert!(finished.with_code(0).stdout.contains("PASSED"), "{report:#}");
        assert_eq!(number(&report, "/violations/total"), 0);
        at_least(&report, &[("/guest/dma_ops", 50), ("/iotlb/waits", 1)])
    });
}

/// Pauses at points of all kinds, and nothing found.
fn pauses() {
    let arguments =
        ["--seed", "3", "--dma", "20", "--invalidate", "reclaim,clean,cow,merge,migrate"];
    until_enough(4, |duration| {
        let (finished, report) =
            stress("pause=0.05", &[&["--duration", duration], &arguments[..]].concat());
        assert!(finished.with_code(0).stdout.contains("PASSED"), "{report:#}");
        assert_eq!(number(&report, "/violations/total"), 0);
        let points = report["injected"]["pauses"].as_array().expect("a list");
        let paused = |name: &str| {
            let point = points.iter().find(|point| point["point"] == name);
            point.unwrap_or_else(|| panic!("no point {name}"))["paused"].as_u64().unwrap_or(0)
        };
        let wanted =
            ["fault-noted", "around-noted", "counted", "told", "detached", "flushed", "saved"];
        let others = ["sharing", "moved", "compared", "device-access", "slot-taken", "harvested"];
        match wanted.iter().chain(&others).find(|name| paused(name) == 0) {
            Some(name) => Err(format!("no pause at {name}: {report:#}")),
            None => Ok(()),
        }
    });
}

fn failing_frame_allocations() {
    survived("frame-enomem=0.02", &[11]);
}

fn everything_that_can_be_survived() {
    let all = "swap-write=EIO@10/50,swap-read=EIO@10/50,short-write@1/9,eintr=0.05,frame-enomem=0.01,slow-notifier=5@0.001";
    survived(all, &[1; 6]);
}

fn what_never_strikes() {
    until_enough(1, |duration| {
        let (finished, report) = stress("short-write@1000000000", &["--duration", duration]);
        let sentence = "--inject short-write@1000000000 never struck: there were ";
        assert!(finished.with_code(1).stdout.contains(sentence));
        assert_eq!(report["result"], "failed");
        assert_eq!(report["violations"]["first"][0]["by"], "injection");
        assert_eq!(number(&report, "/injected/items/0/struck"), 0);
        at_least(&report, &[("/injected/items/0/calls", 100)])
    });
    // A guest that fits into host memory never swaps.
    let boot = ["boot", "--memory", "16M", "--host-memory", "32M", "--inject", "swap-read=EIO@1"];
    let finished = run(&boot).with_code(1);
    let finished = finished.says(&["--inject swap-read=EIO@1 never struck: there were 0 reads"]);
    assert!(finished.stdout.contains("PASS: "), "the guest itself was well: {finished:#?}");
}

/// What is injected is survived; what is broken on top of it is found all the same.
fn no_corruption_is_hidden() {
    let sabotage = ["--duration", "60s", "--sabotage", "swap-corrupt"];
    let (finished, report) = stress("short-write@1/2,eintr=0.1", &sabotage);
    finished.with_code(1);
    assert_eq!(report["detection"]["by"], "swap_checksum", "{report:#}");
}
