//! The command line: arguments to a validated configuration, and a run to something readable.
//!
//! Guarantee: whatever the arguments, the process ends with an exit code and at most one sentence
//! on standard error for each thing that is wrong, never with a panic; nothing is created or
//! changed on the host before the whole command line has been accepted.
//!
//! Exit codes: 0 for success, 1 for a failure, violations found, a limit of the host met on the way, or
//! output that could not be written (standard error included), 2 for a command line that cannot be run,
//! 128 + N after signal N, and from `boot` whatever the guest says.

mod args;
mod boot;
mod config;
mod doctor;
mod ending;
mod hint;
mod inject;
mod kernel_file;
mod limits;
mod linux;
mod output;
mod paging;
mod peer;
mod refusal;
mod report;
mod run;
mod stress;
mod trace;
mod values;

use std::ffi::OsString;
use std::process::ExitCode;

use args::{BootArgs, Command};
use config::{MachineConfig, StressConfig, UsageError};
use limits::HostLimits;
use linux::Resolved;
use trace::traced;

use crate::lab::{Kind, Paging};
use crate::sys::heap;
use crate::sys::signal::ignore_file_size_signal;
use crate::vmm::ShadowProcessor;
use crate::vmm::direct::DirectProcessor;

/// Exit code of a command line that cannot be run.
const EXIT_USAGE: u8 = 2;
/// Exit code of a run that failed.
const EXIT_FAILURE: u8 = 1;

/// Runs the command line `words`, the program's name first, and returns the process's exit code.
pub fn run(words: impl IntoIterator<Item = OsString>) -> ExitCode {
    heap::share_if_addresses_are_limited();
    // Whoever writes too much is told so, and can give the terminal back. Without it nothing is worse
    // than it was.
    let _ = ignore_file_size_signal();
    let code = match args::parse(words) {
        Ok(cli) => execute(cli.command),
        Err(error) => complain(&error),
    };
    ExitCode::from(output::conclude(code))
}

/// Prints help, the version, or the one sentence that says what is wrong.
fn complain(error: &clap::Error) -> u8 {
    match args::complaint(error) {
        None => {
            // Styled where standard output is a terminal.
            output::printed(error.print());
            0
        }
        Some(sentence) => {
            output::note(sentence);
            EXIT_USAGE
        }
    }
}

fn execute(command: Command) -> u8 {
    let result = match command {
        Command::Boot(args) => boot_guest(&args),
        Command::Stress(args) => {
            config::stress(&args, &HostLimits::probe()).map_err(anyhow::Error::from).and_then(
                |config| traced(args.host.trace.as_deref(), || run_kind(Job::Stress(config))),
            )
        }
        Command::Peer(args) => peer::run(&args),
        Command::Doctor(args) => doctor::run(&args),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            // Every error of the layers below carries its cause in its own message.
            output::note(format_args!("{error}{}", hint::of(error.as_ref())));
            if error.is::<UsageError>() { EXIT_USAGE } else { EXIT_FAILURE }
        }
    }
}

/// Linux, or a guest that keeps to the guest ABI.
fn boot_guest(args: &BootArgs) -> anyhow::Result<u8> {
    let limits = HostLimits::probe();
    let kernel = args.kernel.as_deref().map(kernel_file::read_kernel).transpose()?;
    let trace = args.host.trace.as_deref();
    match linux::resolve(args, kernel, &limits)? {
        Resolved::Linux(config) => traced(trace, || linux::run(*config)),
        Resolved::Other(kernel) => {
            let config = config::boot(args, kernel, &limits)?;
            traced(trace, || run_kind(Job::Boot(config)))
        }
    }
}

/// A run of VMs for guests that keep to the guest ABI.
enum Job {
    Boot(MachineConfig),
    Stress(StressConfig),
}

impl Job {
    fn on<P: Kind>(self) -> anyhow::Result<u8> {
        match self {
            Self::Boot(config) => boot::run::<P>(config),
            Self::Stress(config) => stress::run::<P>(config),
        }
    }
}

/// With VMs of the kind that is configured: all of a run are of one.
fn run_kind(job: Job) -> anyhow::Result<u8> {
    let setup = match &job {
        Job::Boot(config) => &config.setup,
        Job::Stress(config) => &config.plan.setup,
    };
    match setup.paging {
        Paging::Shadow => job.on::<ShadowProcessor>(),
        Paging::Direct(_) => job.on::<DirectProcessor>(),
    }
}

/// The convention of shells: 128 + N.
fn exit_code_of_signal(signal: i32) -> u8 {
    u8::try_from(signal).map_or(EXIT_FAILURE, |signal| signal.saturating_add(128))
}
