//! What `docs/guest-abi.md` says of the machine, tried by guests. `tests/guest_page.rs` ties each of its
//! sentences to the trial that tries it, here or elsewhere.

#[path = "../common/guest.rs"]
#[allow(dead_code, reason = "shared with suites that need more of it")]
mod guest;
#[path = "../common/machine.rs"]
#[allow(dead_code, reason = "shared with suites that need more of it")]
mod machine;
#[path = "../common/direct.rs"]
mod possible;
#[path = "../common/process.rs"]
#[allow(dead_code, reason = "shared with suites that need more of it")]
mod process;
#[path = "../common/trial.rs"]
mod trial;

mod delivery;
mod ends;
mod processor;
mod state;
mod strings;

use std::process::ExitCode;

/// The guests are small; two run at a time.
const THREADS: usize = 2;

fn main() -> ExitCode {
    let trials = [
        delivery::trials(),
        ends::trials(),
        processor::trials(),
        state::trials(),
        strings::trials(),
    ];
    trial::run(trials.into_iter().flatten().collect(), THREADS).exit_code()
}
