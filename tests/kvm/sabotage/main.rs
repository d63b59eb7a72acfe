//! Checks that can fail: each rule of the protocol is broken on purpose, and the run must notice
//! within a minute and name a page; the same run without it must find nothing.

#[path = "../common/direct.rs"]
mod direct;
#[path = "../common/process.rs"]
#[allow(dead_code, reason = "shared with another suite")]
mod process;
#[path = "../common/trial.rs"]
mod trial;

mod caught;
mod dawdle;

use std::process::ExitCode;

/// Each trial loads the machine with as many vCPUs as it has processors.
const THREADS: usize = 1;

fn main() -> ExitCode {
    let trials = [caught::trials(), dawdle::trials()];
    trial::run(trials.into_iter().flatten().collect(), THREADS).exit_code()
}
