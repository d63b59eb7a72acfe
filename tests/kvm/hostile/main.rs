//! Guests that mean harm: each has an outcome that the architecture and `docs/guest-abi.md`
//! prescribe, comes to it in bounded time, and leaves the hypervisor as it was (invariant I9).

#[path = "../common/guest.rs"]
mod guest;
#[path = "../common/machine.rs"]
mod machine;
#[path = "../common/trial.rs"]
mod trial;

mod addresses;
mod dma;
mod exceptions;
mod instructions;
mod paging;
mod pressure;
mod processors;
mod random_code;

use std::process::ExitCode;

/// The guests are small; two run at a time.
const THREADS: usize = 2;

fn main() -> ExitCode {
    let trials = [
        addresses::trials(),
        dma::trials(),
        exceptions::trials(),
        instructions::trials(),
        paging::trials(),
        pressure::trials(),
        processors::trials(),
        random_code::trials(),
    ];
    trial::run(trials.into_iter().flatten().collect(), THREADS).exit_code()
}
