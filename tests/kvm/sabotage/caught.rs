//! `gnomon stress --sabotage NAME` for each name, and the control.

use std::fs;

use gnomon::vmm::{HostKind, HostTraits};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::direct::direct_is_possible;
use crate::patience::{at_least, until_enough};
use crate::process::run;
use crate::trial::{Ignore, kvm_trial, kvm_trial_or_ignore};

/// Enough pressure for every sabotage to show in seconds.
const MACHINE: [&str; 6] = ["--memory", "96M", "--host-memory", "24M", "--vcpus", "2"];
/// What the guest itself finds.
const ORACLE: &str = "guest_oracle";
/// That the guest could not go on.
const RUN: &str = "run";
/// Runs in which the oracle may be last.
const MAX_RUNS: u32 = 10;

/// The window instead of shadow page tables.
const DIRECT: [&str; 2] = ["--paging", "direct"];
/// Faults that are often overtaken.
const OVERTAKEN: [&str; 6] =
    ["--workload", "random", "--invalidate", "reclaim", "--rate", "100000/s"];
/// A busy device, whose pages are cleaned and evicted while it is at them.
const DMA: [&str; 6] = ["--workload", "zipf", "--dma", "30", "--rate", "100000/s"];

/// VMs at work that are cloned again and again.
const CLONES: [&str; 4] = ["--vms", "2", "--churn", "1s"];

pub(crate) fn trials() -> Vec<Trial> {
    // Each name with the checks that may be the first to notice.
    const HOST: &str = "host_memory";
    /// A write that the dirty log, or who looks at a snapshot, has missed.
    const OBSERVER: &str = "observer";
    vec![
        caught("skip-flush", &[], &[ORACLE, HOST, OBSERVER]),
        caught("drop-dirty", &[], &[ORACLE, HOST, OBSERVER]),
        caught("forget-rmap", &[], &[ORACLE, HOST, OBSERVER, "reverse_map"]),
        caught("late-install", &OVERTAKEN, &[ORACLE, HOST, "reverse_map"]),
        caught("early-reuse", &[], &[ORACLE, HOST, OBSERVER]),
        caught("skip-clone-protect", &CLONES, &[ORACLE, HOST, OBSERVER]),
        caught("skip-iotlb-wait", &DMA, &[ORACLE, HOST, OBSERVER]),
        caught("swap-corrupt", &[], &["swap_checksum"]),
        // Checks at the moment are faster: the oracle has to see these all the same.
        seen_by_the_oracle("skip-flush", &[]),
        seen_by_the_oracle("drop-dirty", &[]),
        seen_by_the_oracle("late-install", &OVERTAKEN),
        seen_by_the_oracle("early-reuse", &[]),
        seen_by_the_oracle("skip-iotlb-wait", &DMA),
        caught_direct("skip-flush", &[], &[ORACLE, HOST, OBSERVER]),
        caught_direct("skip-wp", &[], &[ORACLE, HOST, OBSERVER]),
        caught_direct("drop-event", &[], &[ORACLE, HOST, OBSERVER]),
        caught_direct("drop-dirty", &[], &[ORACLE, HOST, OBSERVER]),
        caught_direct("forget-rmap", &[], &[ORACLE, HOST, OBSERVER, "reverse_map"]),
        caught_direct("late-install", &OVERTAKEN, &[ORACLE, HOST, OBSERVER, "reverse_map"]),
        caught_direct("skip-iotlb-wait", &DMA, &[ORACLE, HOST, OBSERVER]),
        caught_direct("swap-corrupt", &[], &["swap_checksum"]),
        kvm_trial_or_ignore("control_of_direct_without_sabotage", || {
            direct_is_possible()?;
            control(&DIRECT);
            Ok(())
        }),
        kvm_trial("control_without_sabotage", || control(&[])),
        kvm_trial("control_of_clones_without_sabotage", || control(&CLONES)),
    ]
}

/// `arguments` are needed for the sabotage to make a difference.
fn caught(
    name: &'static str,
    arguments: &'static [&'static str],
    checks: &'static [&'static str],
) -> Trial {
    let trial = format!("sabotage_{}", name.replace('-', "_"));
    kvm_trial_or_ignore(&trial, move || is_caught(name, arguments, checks))
}

/// The same, but what all other checks find does not count. What a sabotage lets go astray may hit the
/// guest's own page tables or its code, and it falls over before it can look: then the next seed's turn
/// has come.
fn seen_by_the_oracle(name: &'static str, arguments: &'static [&'static str]) -> Trial {
    let trial = format!("sabotage_{}_is_seen_by_the_oracle", name.replace('-', "_"));
    kvm_trial_or_ignore(&trial, move || {
        let all = [&["--until-oracle"], arguments].concat();
        for seed in 1..=MAX_RUNS {
            let by = noticed_by(name, &all, seed)?;
            if by == ORACLE {
                return Ok(());
            }
            assert_eq!(by, RUN, "seed {seed}");
        }
        panic!("the guest fell over in each of {MAX_RUNS} runs");
    })
}

/// The same with direct paging, where this process may handle KVM's page faults.
fn caught_direct(
    name: &'static str,
    arguments: &'static [&'static str],
    checks: &'static [&'static str],
) -> Trial {
    let trial = format!("sabotage_direct_{}", name.replace('-', "_"));
    kvm_trial_or_ignore(&trial, move || {
        direct_is_possible()?;
        is_caught(name, &[&DIRECT, arguments].concat(), checks)
    })
}

/// Why this host may not show a missing flush: with nested paging a stale translation lives only
/// until its TLB entry goes.
fn hardly_shows(name: &str) -> Result<(), Ignore> {
    let needs_stale_translations = matches!(name, "skip-flush" | "early-reuse");
    let traits = HostTraits::probe().expect("KVM is there");
    if needs_stale_translations && traits.kind() == HostKind::Tdp {
        let reason = "with nested paging a missing flush is a race that a minute need not show";
        return Err(Ignore(reason.to_owned()));
    }
    Ok(())
}

/// Runs `stress`; returns the exit code, what it printed, and its report.
fn stress(arguments: &[&str]) -> (i32, String, Value) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let json = folder.path().join("report.json");
    let report = ["stress", "--json", json.to_str().expect("a plain path")];
    let finished = run(&[&report, &MACHINE[..], arguments].concat());
    let code = finished.code();
    let text = format!("{}{}", finished.stdout, finished.stderr);
    let report = serde_json::from_slice(&fs::read(&json).expect("a report")).expect("JSON");
    (code, text, report)
}

fn is_caught(name: &str, arguments: &[&str], checks: &[&str]) -> Result<(), Ignore> {
    let by = noticed_by(name, arguments, 1)?;
    assert!(checks.contains(&by.as_str()), "noticed by {by}");
    Ok(())
}

/// The check that was the first to notice.
fn noticed_by(name: &str, arguments: &[&str], seed: u32) -> Result<String, Ignore> {
    let seed = seed.to_string();
    let all = [&["--duration", "60s", "--sabotage", name, "--seed", &seed], arguments].concat();
    let (code, text, report) = stress(&all);
    if code == 0 {
        hardly_shows(name)?;
    }
    assert_eq!(code, 1, "{text}");
    assert!(!text.contains("panicked"), "{text}");
    assert_eq!(report["result"], "failed");
    assert_eq!(report["config"]["sabotage"], name);
    let seconds = report["detection"]["seconds"].as_f64().expect("a time");
    assert!(seconds <= 60.0, "noticed after {seconds} s: {text}");
    let by = report["detection"]["by"].as_str().expect("a check");
    if by == RUN {
        return Ok(by.to_owned());
    }
    // The first violation names a page: a guest frame, a page or a slot, by its number.
    let first = report["violations"]["first"][0]["text"].as_str().expect("a sentence");
    let names_a_page = ["frame ", "page "].iter().any(|word| {
        let number = first.split(word).nth(1).unwrap_or_default().trim_start_matches("0x");
        number.starts_with(|c: char| c.is_ascii_hexdigit())
    });
    assert!(names_a_page, "no page in {first:?}");
    assert!(text.contains(first), "the report for people says it, too: {text}");
    Ok(by.to_owned())
}

fn control(arguments: &[&str]) {
    until_enough(5, |duration| {
        let machine = ["--duration", duration, "--seed", "1"];
        let (code, text, report) = stress(&[&machine, arguments].concat());
        assert_eq!(code, 0, "{text}");
        assert_eq!(report["result"], "passed", "{text}");
        assert_eq!(report["violations"]["total"], 0, "{text}");
        at_least(&report, &[("/host/evictions", 1000)])
    });
}
