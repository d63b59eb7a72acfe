//! The `gnomon` binary from end to end, on real KVM: what it prints, what it exits with, and what
//! it leaves behind. (And, without the binary, the memory of guests that a fault of the host ended.)

#[path = "../common/guest.rs"]
#[allow(dead_code, reason = "the hostile guests need more of it")]
mod guest;
#[path = "../common/patience.rs"]
mod patience;
#[path = "../common/direct.rs"]
mod possible;
#[path = "../common/process.rs"]
#[allow(dead_code, reason = "shared with another suite")]
mod process;
#[path = "../common/trial.rs"]
mod trial;

mod boot;
mod clones;
mod direct;
mod ends;
mod inject;
mod kernel;
mod mended;
mod peers;
mod signals;
mod stress;
mod swap;

use std::process::ExitCode;

/// Each trial loads the machine with as many vCPUs as it has processors.
const THREADS: usize = 1;

fn main() -> ExitCode {
    let trials = [
        boot::trials(),
        clones::trials(),
        direct::trials(),
        ends::trials(),
        inject::trials(),
        kernel::trials(),
        signals::trials(),
        mended::trials(),
        peers::trials(),
        stress::trials(),
        swap::trials(),
    ];
    trial::run(trials.into_iter().flatten().collect(), THREADS).exit_code()
}
