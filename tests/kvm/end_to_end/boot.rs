//! `gnomon boot` with the built-in guest.

use libtest_mimic::Trial;

use crate::process::{Finished, run};
use crate::trial::{Ignore, kvm_trial, kvm_trial_or_ignore};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        kvm_trial("boot_by_default", boot_by_default),
        kvm_trial("boot_64g_in_64m", boot_64g_in_64m),
        kvm_trial("boot_with_two_vcpus", boot_with_two_vcpus),
        kvm_trial_or_ignore("boot_paranoid", boot_paranoid),
        kvm_trial("boot_with_a_seed_is_repeatable", boot_with_a_seed_is_repeatable),
    ]
}

/// The guest's last line, with its sums.
fn sums(finished: &Finished) -> &str {
    let last = finished.stdout.lines().rfind(|line| line.starts_with("PASS: "));
    last.unwrap_or_else(|| panic!("no sums: {finished:#?}"))
}

/// The number after `name=` in the guest's sums.
fn sum(finished: &Finished, name: &str) -> u64 {
    let words = sums(finished).split_whitespace();
    let value = words.filter_map(|word| word.split_once('=')).find(|(key, _)| *key == name);
    let (_, value) = value.unwrap_or_else(|| panic!("no {name}: {finished:#?}"));
    value.parse().expect("a number")
}

/// What a good boot looks like.
fn passed(finished: Finished) -> Finished {
    let finished = finished.with_code(0).says(&["the guest powered off", "frames: at most "]);
    let passed = finished.stdout.lines().filter(|line| line.starts_with("PASS ")).count();
    assert!(passed >= 22, "{passed} items passed: {finished:#?}");
    assert!(!finished.stdout.contains("FAIL"), "{finished:#?}");
    assert_eq!(sum(&finished, "passed"), passed as u64);
    assert_eq!((sum(&finished, "failed"), sum(&finished, "violations")), (0, 0));
    assert!(!finished.stderr.contains("violations"), "{finished:#?}");
    finished
}

/// The number at the start of the part of a line of standard error that ends with `unit`.
fn figure(finished: &Finished, line: &str, unit: &str) -> u64 {
    let line = finished.stderr.lines().find(|text| text.contains(line));
    let words: Vec<&str> = line.unwrap_or_default().split_whitespace().collect();
    let at = words.iter().position(|word| word.trim_end_matches(',') == unit);
    let number = at.and_then(|at| words.get(at.checked_sub(1)?));
    let digits: String = number.unwrap_or(&"").chars().filter(char::is_ascii_digit).collect();
    digits.parse().unwrap_or_else(|_| panic!("no figure of {unit}: {finished:#?}"))
}

fn boot_by_default() {
    let finished = passed(run(&["boot"]));
    assert!(finished.stdout.contains("1 vCPUs, 256 MiB of memory"), "{finished:#?}");
    // The guest uses four times the host's memory: most of its pages were in swap at some time.
    assert!(figure(&finished, "evictions", "evictions") > 16_384, "{finished:#?}");
    assert!(sum(&finished, "verified") > 100_000, "{finished:#?}");
    assert!(finished.stderr.contains("in use, of 64 MiB"), "{finished:#?}");
}

fn boot_64g_in_64m() {
    let cmdline = "mode=boot pages=20000";
    let arguments = ["boot", "--memory", "64G", "--host-memory", "64M", "--cmdline", cmdline];
    let finished = passed(run(&arguments));
    assert!(finished.stdout.contains("65536 MiB of memory"), "{finished:#?}");
    assert!(figure(&finished, "evictions", "evictions") > 10_000, "{finished:#?}");
}

fn boot_with_two_vcpus() {
    let arguments = ["boot", "--memory", "32M", "--host-memory", "10M", "--vcpus", "2"];
    let finished = passed(run(&arguments));
    assert!(finished.stdout.contains("2 vCPUs, 32 MiB of memory"), "{finished:#?}");
}

fn boot_paranoid() -> Result<(), Ignore> {
    let arguments = ["boot", "--memory", "32M", "--host-memory", "10M", "--paranoid"];
    let finished = run(&arguments);
    if let Some(line) = finished.stderr.lines().find(|line| line.contains("--paranoid:")) {
        return Err(Ignore(line.to_owned()));
    }
    passed(finished);
    Ok(())
}

fn boot_with_a_seed_is_repeatable() {
    let boot = |cmdline: &str| {
        let arguments = ["boot", "--memory", "32M", "--host-memory", "64M", "--cmdline", cmdline];
        passed(run(&arguments)).stdout
    };
    let first = boot("mode=boot seed=77 pages=500");
    assert_eq!(first, boot("mode=boot seed=77 pages=500"));
    assert_ne!(first, boot("mode=boot seed=78 pages=500"));
}
