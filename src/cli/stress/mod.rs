//! `gnomon stress`: the test guest under memory pressure and a storm of invalidations, with every
//! access checked.
//!
//! Guarantee: the exit code is 0 only if the guest worked for the whole time, swept all its memory
//! once more, powered off when asked, and no check found anything. A signal cuts all that short, and so
//! does a limit of the host that is met on the way; the report says what was not checked.

mod course;
mod observe;
mod peers;
mod population;
mod progress;
mod sources;
mod storm;

use super::config::StressConfig;
use super::ending::{self, Ending};
use super::machine::{Kind, Machine};
use super::output::{self, Tail, printable};
use super::report::{self, Report, Verdict};
use super::{EXIT_FAILURE, args, injected};

pub(crate) use course::{Course, Detection};
pub(crate) use peers::PeersReport;
pub(crate) use population::PopulationCount;
pub(crate) use storm::{StormCount, Storms};

/// Runs the stress test and returns the exit code.
///
/// # Errors
/// If the run cannot start, or its report cannot be written.
pub(crate) fn run<P: Kind>(mut config: StressConfig) -> anyhow::Result<u8> {
    let ending = Ending::install()?;
    let tail = Tail::default();
    let mut machine = Machine::<P>::new(&mut config.machine, Box::new(tail.clone()))?;
    for warning in &config.machine.warnings {
        output::note(warning);
    }
    if let Some(name) = config.sabotage {
        output::note(format_args!(
            "sabotage {}: broken on purpose: {}",
            args::name_of(name),
            args::description_of(name)
        ));
    }
    if let Some(line) = injected::announcement(&config.machine.host.inject) {
        output::note(line);
    }
    let peers = peers::Peers::start(config.peers.as_ref(), &machine)?;
    let course = course::run(&mut machine, &config, &ending)?;
    ending.phase("taking the pages back from peers");
    let peers = peers.map(|peers| peers.conclude(&machine.mm.stats()));
    ending.phase("checking what is left");
    let mut report = Report::new(&config, &mut machine, &course, peers, &tail.lines());
    report.note_signal(ending.signal());
    if report.failed() {
        ending.note_failure();
    }
    ending.phase("writing the report");
    // First to the file, which takes it: what reads standard output may have stopped to.
    let written = config.json.as_ref().map_or(Ok(()), |path| report::json::write(path, &report));
    output::print(report::table::render(&report));
    if report.failed() {
        show_console(&report);
    }
    // After the report: a signal that comes while much memory goes back must not cost it.
    ending.phase("giving memory back");
    ending::let_go(machine);
    written?;
    // A signal that came after everything was done has still taken the report from who asked for it.
    let untold = ending.signal().filter(|_| output::gave_up());
    Ok(exit_code(&report, report.signal.or(untold)))
}

fn exit_code(report: &Report, signal: Option<i32>) -> u8 {
    match signal {
        _ if report.failed() || report.result == Verdict::HostLimit => EXIT_FAILURE,
        Some(signal) => super::exit_code_of_signal(signal),
        None => 0,
    }
}

/// What the guest said last.
fn show_console(report: &Report) {
    for line in &report.guest_console {
        output::note(format_args!("guest: {}", printable(line)));
    }
}
