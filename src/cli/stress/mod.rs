//! `gnomon stress`: the test guest under memory pressure and a storm of invalidations, with every
//! access checked.
//!
//! Guarantee: the exit code is 0 only if the guest worked for the whole time, swept all its memory
//! once more, powered off when asked, and no check found anything. A signal cuts all that short, and so
//! does a limit of the host that is met on the way; the report says what was not checked.

mod progress;

use std::cell::RefCell;

use super::config::StressConfig;
use super::ending::{self, Ending};
use super::output::{self, printable};
use super::refusal::{from_serve, from_setup};
use super::report::{self, PeersReport, Report, Verdict};
use super::{EXIT_FAILURE, args, hint};
use crate::lab::{self, Advice, Kind, Peers, Setup, Status, Tail, Watch};
use progress::Progress;

/// Runs the stress test and returns the exit code.
///
/// # Errors
/// If the run cannot start, or its report cannot be written.
pub(crate) fn run<P: Kind>(mut config: StressConfig) -> anyhow::Result<u8> {
    let ending = Ending::install()?;
    let tail = Tail::default();
    let paging = config.plan.setup.paging;
    let mut setup = Setup::<P>::new(&mut config.plan.setup, Box::new(tail.clone()))
        .map_err(|error| from_setup(error, paging))?;
    announce(&config);
    let peers = serve_peers(&config, &setup)?;
    let shown =
        Shown { ending: &ending, progress: RefCell::new(Progress::new(config.plan.duration)) };
    let course = lab::run(&mut setup, &config.plan, &shown)?;
    shown.progress.borrow().end();
    ending.phase("taking the pages back from peers");
    let peers = peers.map(|peers| PeersReport::from(peers.conclude(&setup.mm.stats())));
    ending.phase("checking what is left");
    let mut report = Report::new(&config, &mut setup, &course, peers, &tail.lines());
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
    ending::let_go(setup);
    written?;
    // A signal that came after everything was done has still taken the report from who asked for it.
    let untold = ending.signal().filter(|_| output::gave_up());
    Ok(exit_code(&report, report.signal.or(untold)))
}

/// What is told before a run.
fn announce(config: &StressConfig) {
    for warning in &config.notes.warnings {
        output::note(warning);
    }
    if let Some(name) = config.sabotage {
        output::note(format_args!(
            "sabotage {}: broken on purpose: {}",
            args::name_of(name),
            args::description_of(name)
        ));
    }
    if let Some(line) = lab::announcement(&config.plan.setup.host.inject) {
        output::note(line);
    }
}

/// Serves peers, if there are to be any.
fn serve_peers(config: &StressConfig, setup: &Setup<impl Kind>) -> anyhow::Result<Option<Peers>> {
    let Some(plan) = &config.plan.peers else { return Ok(None) };
    let peers = Peers::start(plan, setup, |sentence| output::note(sentence)).map_err(from_serve)?;
    if peers.is_some() {
        output::note(format_args!("peers are served at {}", plan.socket.display()));
    }
    Ok(peers)
}

/// A run that is shown on standard error, and that a signal may end.
struct Shown<'a> {
    ending: &'a Ending,
    progress: RefCell<Progress>,
}

impl Watch for Shown<'_> {
    fn signal(&self) -> Option<i32> {
        self.ending.signal()
    }

    fn phase(&self, phase: &'static str) {
        self.ending.phase(phase);
    }

    fn note_failure(&self) {
        self.ending.note_failure();
    }

    fn status(&self, status: &Status) {
        self.progress.borrow_mut().show(status);
    }

    fn advice(&self) -> Advice {
        hint::of
    }
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
