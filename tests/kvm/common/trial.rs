//! Trials that need something of the host: where it is missing they are *ignored* and say why, so
//! that a green run never hides what was not run.
//!
//! `GNOMON_REQUIRE_KVM` in the environment turns a missing KVM into a failure. `GNOMON_LONG_TESTS`
//! makes those trials long that have a short and a long form.

use std::env;
use std::sync::OnceLock;

use gnomon::vmm::KvmOffer;
use libtest_mimic::{Arguments, Completion, Conclusion, Trial};

/// What a trial needs of the host.
pub(crate) type Needs = fn() -> Result<(), String>;

/// Why a trial that has begun cannot go on here.
#[allow(dead_code, reason = "not every suite has such trials")]
#[derive(Debug)]
pub(crate) struct Ignore(pub(crate) String);

/// A trial that needs KVM, and may find out that it needs something else, too.
#[allow(dead_code, reason = "not every suite has such trials")]
pub(crate) fn kvm_trial_or_ignore(
    name: &str,
    body: impl FnOnce() -> Result<(), Ignore> + Send + 'static,
) -> Trial {
    trial(name, &[], body)
}

/// A trial that does without KVM, but may find out that it needs something else.
#[allow(dead_code, reason = "not every suite has such trials")]
pub(crate) fn trial_without_kvm(
    name: &str,
    body: impl FnOnce() -> Result<(), Ignore> + Send + 'static,
) -> Trial {
    Trial::ignorable_test(name, move || Ok(completion(body())))
}

/// A trial that needs KVM; it fails by panicking.
#[allow(dead_code, reason = "not every suite has such trials")]
pub(crate) fn kvm_trial(name: &str, body: impl FnOnce() + Send + 'static) -> Trial {
    kvm_trial_with(name, &[], body)
}

/// A trial that needs KVM and more; it fails by panicking.
#[allow(dead_code, reason = "not every suite has such trials")]
pub(crate) fn kvm_trial_with(
    name: &str,
    needs: &'static [Needs],
    body: impl FnOnce() + Send + 'static,
) -> Trial {
    trial(name, needs, || {
        body();
        Ok(())
    })
}

fn trial(
    name: &str,
    needs: &'static [Needs],
    body: impl FnOnce() -> Result<(), Ignore> + Send + 'static,
) -> Trial {
    Trial::ignorable_test(name, move || {
        if let Err(reason) = kvm() {
            if env::var_os("GNOMON_REQUIRE_KVM").is_some() {
                return Err(format!("GNOMON_REQUIRE_KVM is set, but {reason}").into());
            }
            return Ok(Completion::ignored_with(reason));
        }
        for need in needs {
            if let Err(reason) = need() {
                return Ok(Completion::ignored_with(reason));
            }
        }
        Ok(completion(body()))
    })
}

fn completion(ended: Result<(), Ignore>) -> Completion {
    match ended {
        Ok(()) => Completion::Completed,
        Err(Ignore(reason)) => Completion::ignored_with(reason),
    }
}

/// Whether trials that can be long are to be.
#[allow(dead_code, reason = "not every suite has such trials")]
pub(crate) fn long() -> bool {
    env::var_os("GNOMON_LONG_TESTS").is_some()
}

/// Runs `trials` on `threads` threads unless the command line says otherwise.
pub(crate) fn run(trials: Vec<Trial>, threads: usize) -> Conclusion {
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(threads);
    libtest_mimic::run(&arguments, trials)
}

/// Whether VMs can be made here: what `/dev/kvm` is does not say so, only what KVM answers.
fn kvm() -> Result<(), String> {
    static USABLE: OnceLock<Result<(), String>> = OnceLock::new();
    USABLE.get_or_init(|| KvmOffer::try_out().map_err(|error| error.to_string())).clone()
}
