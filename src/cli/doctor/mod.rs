//! `gnomon doctor`: what this machine offers, what is missing, and what to do about it.
//!
//! Guarantee: what can be tried is tried rather than concluded from versions and settings, nothing
//! is left changed, and the exit code is 0 exactly if nothing that `gnomon boot` needs is missing.

mod host;
mod kvm;
mod limited;

use std::fmt;

use serde::Serialize;

use super::EXIT_FAILURE;
use super::args::DoctorArgs;
use super::limits::{Folder, HostLimits};
use super::output;

/// How much of something there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    /// All that is needed.
    Ok,
    /// Guests run, but something is slower or not on offer.
    Limited,
    /// Guests do not run.
    Missing,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ok => "ok",
            Self::Limited => "limited",
            Self::Missing => "missing",
        })
    }
}

/// One line of the diagnosis.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Finding {
    status: Status,
    /// What was looked at.
    what: &'static str,
    /// What was found, and what to do about it.
    detail: String,
}

impl Finding {
    fn ok(what: &'static str, detail: impl Into<String>) -> Self {
        Self { status: Status::Ok, what, detail: detail.into() }
    }

    fn limited(what: &'static str, detail: impl Into<String>) -> Self {
        Self { status: Status::Limited, what, detail: detail.into() }
    }

    fn missing(what: &'static str, detail: impl Into<String>) -> Self {
        Self { status: Status::Missing, what, detail: detail.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<8} {}: {}", self.status, self.what, self.detail)
    }
}

/// The whole diagnosis.
#[derive(Clone, Debug, Serialize)]
struct Diagnosis {
    findings: Vec<Finding>,
    /// Whether `gnomon boot` can work.
    can_boot: bool,
}

impl Diagnosis {
    fn new(findings: Vec<Finding>) -> Self {
        let can_boot = findings.iter().all(|finding| finding.status != Status::Missing);
        Self { findings, can_boot }
    }

    fn verdict(&self) -> &'static str {
        if self.can_boot {
            "gnomon boot can work here"
        } else {
            "gnomon boot cannot work here: see what is missing"
        }
    }
}

/// Examines the machine and returns the exit code.
///
/// # Errors
/// If the diagnosis cannot be turned into JSON.
pub(crate) fn run(args: &DoctorArgs) -> anyhow::Result<u8> {
    let mut findings = kvm::examine();
    // Where boot puts swap unless it is told otherwise.
    let temporary = Folder::look_at(std::env::temp_dir());
    findings.extend(host::examine(&temporary));
    findings.extend(limited::examine(&HostLimits::probe(), &temporary));
    let diagnosis = Diagnosis::new(findings);
    if args.json {
        output::print(serde_json::to_string_pretty(&diagnosis)?);
    } else {
        for finding in &diagnosis.findings {
            output::print(finding);
        }
        output::print(diagnosis.verdict());
    }
    Ok(if diagnosis.can_boot { 0 } else { EXIT_FAILURE })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_missing_keeps_a_guest_from_booting() {
        let fine = Finding::ok("one", "there");
        let slow = Finding::limited("two", "slow; do this");
        let gone = Finding::missing("three", "gone; do that");
        assert!(Diagnosis::new(vec![fine.clone(), slow.clone()]).can_boot);
        let bad = Diagnosis::new(vec![fine, slow, gone]);
        assert!(!bad.can_boot && bad.verdict().contains("cannot"));
        let value = serde_json::to_value(&bad).unwrap();
        assert_eq!(value["findings"][2]["status"], "missing");
        assert_eq!(value["can_boot"], false);
    }

    #[test]
    fn lines_begin_with_the_status_in_a_column() {
        assert_eq!(Finding::ok("KVM", "there").to_string(), "ok       KVM: there");
        assert_eq!(Finding::missing("KVM", "gone").to_string(), "missing  KVM: gone");
    }
}
