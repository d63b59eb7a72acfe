//! `gnomon boot`: a guest with its console on standard output.
//!
//! Guarantee: the exit code is the guest's own, or says that it was stopped by a signal, that the run
//! failed or that its console could not be written; a summary on standard error tells how it went, and
//! what was not checked for a signal.

use std::time::{Duration, Instant};

use super::config::MachineConfig;
use super::ending::{self, Ending, TICK};
use super::injected::{self, Injected};
use super::machine::{Figures, Machine};
use super::output::{self, StdoutConsole, printable};
use super::values::{human_bytes, human_count};
use super::violations::{self, Violations};
use super::{EXIT_FAILURE, exit_code_of_signal};
use crate::addr::PAGE_SIZE_U64;
use crate::direct_mmu::DirectStats;
use crate::host_mm::MmStats;
use crate::vmm::Outcome;

/// Time for vCPU threads to end after a kill.
pub(crate) const KILL_TIMEOUT: Duration = Duration::from_secs(30);
/// Violations that are shown in full.
const SHOWN: usize = 20;

/// Boots the guest, waits for its end and returns the exit code.
///
/// # Errors
/// If the guest cannot be started.
pub(crate) fn run(mut config: MachineConfig) -> anyhow::Result<u8> {
    let ending = Ending::install()?;
    let console = StdoutConsole::new();
    let mut machine = Machine::new(&mut config, Box::new(console.clone()))?;
    for warning in &config.warnings {
        output::note(warning);
    }
    if let Some(line) = injected::announcement(&config.host.inject) {
        output::note(line);
    }
    let begun = Instant::now();
    machine.fleet.start()?;
    ending.phase("running the guest");
    let (outcome, signal) = wait(&mut machine, &ending, &console);
    let elapsed = begun.elapsed();

    ending.phase("checking what is left");
    let resident = machine.mm.resident_bytes().unwrap_or(0);
    let mut found = violations::collect(&machine, resident);
    let injected =
        outcome.as_ref().and_then(|_| Injected::conclude(&machine.mm, machine.fleet.memory()));
    for line in summary(
        &machine.figures(),
        config.host.host_memory_bytes,
        elapsed,
        &how_it_ended(outcome.as_ref(), signal),
    ) {
        output::note(line);
    }
    if let (Some(injected), Some(outcome)) = (&injected, &outcome) {
        for line in injected.lines() {
            output::note(line);
        }
        let ended_early = signal.is_some() || matches!(outcome, Outcome::Failed(_));
        injected.add_violations(&mut found, ended_early);
    }
    let members = machine.fleet.members.iter();
    let lost = members.map(|member| member.vm.lost_console_bytes()).sum();
    for line in complaints(&found, lost, ending.signal()) {
        output::note(line);
    }
    ending::let_go(machine);
    Ok(exit_code(outcome.as_ref(), signal, &found))
}

/// Waits for the end of the guest, or for a signal, which then ends it.
fn wait(
    machine: &mut Machine,
    ending: &Ending,
    console: &StdoutConsole,
) -> (Option<Outcome>, Option<i32>) {
    loop {
        machine.fleet.poll(TICK);
        if let Some(outcome) = take_outcome(machine) {
            return (Some(outcome), None);
        }
        if let Some(signal) = ending.signal() {
            ending.phase("waiting for the vCPUs to stop");
            console.give_up();
            machine.fleet.kill(KILL_TIMEOUT);
            return (take_outcome(machine), Some(signal));
        }
    }
}

/// How the one VM ended, if it has.
fn take_outcome(machine: &mut Machine) -> Option<Outcome> {
    machine.fleet.members.first_mut().and_then(|member| member.outcome.take())
}

pub(crate) fn how_it_ended(outcome: Option<&Outcome>, signal: Option<i32>) -> String {
    match (outcome, signal) {
        (None, Some(signal)) => {
            format!("the guest was ended by signal {signal}, before all its vCPUs had stopped")
        }
        (None, None) => {
            format!("a vCPU did not stop within {} s of being killed", KILL_TIMEOUT.as_secs())
        }
        (Some(Outcome::Killed), Some(signal)) => format!("the guest was ended by signal {signal}"),
        (Some(Outcome::Killed), None) => "the guest was ended".to_owned(),
        (Some(Outcome::PoweredOff), _) => "the guest powered off".to_owned(),
        (Some(Outcome::Rebooted), _) => "the guest rebooted, which ends it".to_owned(),
        (Some(Outcome::GuestExit(code)), _) => format!("the guest ended with exit code {code}"),
        (Some(Outcome::Halted), _) => "every vCPU halted".to_owned(),
        (Some(Outcome::Failed(error)), _) => {
            format!("the guest was ended: {}", printable(&error.to_string()))
        }
    }
}

fn exit_code(outcome: Option<&Outcome>, signal: Option<i32>, found: &Violations) -> u8 {
    match (outcome, signal) {
        (None | Some(Outcome::Killed), Some(signal)) => exit_code_of_signal(signal),
        (None, None) => EXIT_FAILURE,
        (Some(outcome), _) => match outcome.exit_code() {
            0 if found.total > 0 => EXIT_FAILURE,
            code => code,
        },
    }
}

fn summary(figures: &Figures, budget: u64, elapsed: Duration, end: &str) -> [String; 4] {
    let Figures { vcpus, host, direct, .. } = figures;
    let count = human_count;
    let faults = match direct.faults {
        0 => format!(
            "faults: {} read, {} write, {} execute, {} the guest's own",
            count(vcpus.read_faults),
            count(vcpus.write_faults),
            count(vcpus.execute_faults),
            count(vcpus.guest_page_faults)
        ),
        _ => window_line(direct),
    };
    [
        format!("{end} after {:.2} s", elapsed.as_secs_f64()),
        faults,
        swap_line(host),
        frames_line(host, budget),
    ]
}

/// What direct paging has done.
pub(crate) fn window_line(direct: &DirectStats) -> String {
    format!(
        "faults: {} of the window, {} pages mapped for them",
        human_count(direct.faults),
        human_count(direct.installs.saturating_add(direct.fault_around))
    )
}

/// What went to swap and came back.
pub(crate) fn swap_line(host: &MmStats) -> String {
    format!(
        "swap: {} pages in, {} out; {} evictions",
        human_count(host.swap_ins),
        human_count(host.swap_outs),
        human_count(host.evictions)
    )
}

/// The most memory that was in use.
pub(crate) fn frames_line(host: &MmStats, budget: u64) -> String {
    format!(
        "frames: at most {} in use, of {}",
        human_bytes(host.peak_frames_in_use.saturating_mul(PAGE_SIZE_U64)),
        human_bytes(budget)
    )
}

pub(crate) fn complaints(
    found: &Violations,
    lost_console_bytes: u64,
    signal: Option<i32>,
) -> Vec<String> {
    let cut_short = signal.and_then(|signal| violations::cut_short(signal, &found.unchecked));
    let mut lines: Vec<String> = cut_short.into_iter().collect();
    if lost_console_bytes > 0 {
        lines.push(format!(
            "{} bytes of the guest's console could not be written to standard output",
            human_count(lost_console_bytes)
        ));
    }
    if found.total > 0 {
        lines.push(format!("violations: {}", human_count(found.total)));
    }
    let shown = found.first.iter().take(SHOWN);
    lines.extend(shown.map(|violation| printable(&violation.text)));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::violations::{Check, EndCheck, Violation};
    use crate::vmm::{KvmError, VmError};

    #[test]
    fn the_exit_code_is_the_guests_unless_something_else_happened() {
        let clean = Violations::default();
        let mut bad = Violations::default();
        bad.add_one(Violation::of_run("stale"));
        let failed = Outcome::Failed(VmError::Kvm(KvmError::Missing));
        let code =
            |outcome: &Outcome, signal, found: &Violations| exit_code(Some(outcome), signal, found);
        assert_eq!(code(&Outcome::PoweredOff, None, &clean), 0);
        assert_eq!(code(&Outcome::PoweredOff, None, &bad), 1);
        assert_eq!(code(&Outcome::GuestExit(35), None, &clean), 35);
        assert_eq!(code(&Outcome::GuestExit(35), None, &bad), 35);
        assert_eq!(code(&failed, None, &clean), 1);
        assert_eq!(code(&Outcome::Killed, Some(2), &clean), 130);
        assert_eq!(code(&Outcome::Killed, Some(15), &clean), 143);
        assert_eq!(code(&Outcome::PoweredOff, Some(2), &clean), 0, "it was faster than the signal");
        assert_eq!(exit_code(None, Some(2), &clean), 130);
        assert_eq!(exit_code(None, None, &clean), 1);
    }

    #[test]
    fn the_summary_has_all_figures_in_four_lines() {
        let mut figures = Figures::default();
        figures.vcpus.read_faults = 1_000;
        figures.vcpus.write_faults = 200;
        figures.host.swap_ins = 30;
        figures.host.swap_outs = 40;
        figures.host.evictions = 50;
        figures.host.peak_frames_in_use = 16_384;
        let end = how_it_ended(Some(&Outcome::PoweredOff), None);
        let lines = summary(&figures, 64 << 20, Duration::from_millis(1250), &end);
        assert_eq!(lines[0], "the guest powered off after 1.25 s");
        assert_eq!(lines[1], "faults: 1,000 read, 200 write, 0 execute, 0 the guest's own");
        assert_eq!(lines[2], "swap: 30 pages in, 40 out; 50 evictions");
        assert_eq!(lines[3], "frames: at most 64 MiB in use, of 64 MiB");
    }

    #[test]
    fn lost_output_and_violations_are_told() {
        let mut found = Violations::default();
        let texts = (0..30).map(|n| format!("violation \x07{n}"));
        found.add(Check::GuestOracle, texts, 3000);
        found.unchecked.insert(EndCheck::ReverseMap);
        let lines = complaints(&found, 12, None);
        assert!(lines[0].starts_with("12 bytes"), "{lines:?}");
        assert_eq!(lines[1], "violations: 3,000");
        assert_eq!(lines.len(), 2 + SHOWN);
        assert!(lines[2].ends_with("\\u{7}0"), "{lines:?}");
        let lines = complaints(&found, 0, Some(15));
        assert_eq!(lines[0], "cut short by signal 15; not checked: the reverse map (I3)");
        assert!(complaints(&Violations::default(), 0, Some(15)).is_empty());
    }
}
