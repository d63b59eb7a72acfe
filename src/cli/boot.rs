//! `gnomon boot`: a guest with its console on standard output.
//!
//! Guarantee: that of a run ([`mod@super::run`]).

use std::sync::Arc;
use std::time::Duration;

use super::config::MachineConfig;
use super::ending::Ending;
use super::output::{self, StdoutConsole};
use super::refusal::from_setup;
use super::run::{self, Guest};
use crate::addr::PAGE_SIZE_U64;
use crate::direct_mmu::DirectStats;
use crate::host_mm::{HostMm, MemoryObject, MmStats};
use crate::lab::text::{human_bytes, human_count};
use crate::lab::{self, Done, Figures, Kind, Setup, Violations};
use crate::vmm::{Contract, Outcome};

/// Boots the guest, waits for its end and returns the exit code.
///
/// # Errors
/// If the guest cannot be started.
pub(crate) fn run<P: Kind>(config: MachineConfig) -> anyhow::Result<u8> {
    let ending = Ending::install()?;
    let console = StdoutConsole::new();
    let MachineConfig { setup: mut plan, notes } = config;
    let setup = Setup::<P>::new(&mut plan, Box::new(console.clone()))
        .map_err(|error| from_setup(error, plan.paging))?;
    for warning in &notes.warnings {
        output::note(warning);
    }
    if let Some(line) = lab::announcement(&plan.host.inject) {
        output::note(line);
    }
    let budget = plan.host.host_memory_bytes;
    run::to_the_end(Booted { setup, budget }, &ending, &console)
}

/// A guest that keeps to the guest ABI, alone on its host memory.
struct Booted<P: Contract> {
    setup: Setup<P>,
    /// Bytes of host memory.
    budget: u64,
}

impl<P: Contract> Guest for Booted<P> {
    fn start(&mut self) -> anyhow::Result<()> {
        Ok(self.setup.fleet.start()?)
    }

    fn wait(&mut self, timeout: Duration) -> Option<Outcome> {
        self.setup.fleet.poll(timeout);
        self.setup.fleet.members.first_mut().and_then(|member| member.outcome.take())
    }

    fn kill(&mut self) {
        self.setup.fleet.kill_all();
    }

    /// Each member of the fleet knows whether it has ended.
    fn check(&self, _is_at_rest: bool) -> Violations {
        let resident = self.setup.mm.resident_bytes().unwrap_or(0);
        lab::collect(&self.setup, resident)
    }

    fn host_mm(&self) -> &Arc<HostMm> {
        &self.setup.mm
    }

    fn memory(&self) -> impl Iterator<Item = &Arc<MemoryObject>> {
        self.setup.fleet.memory()
    }

    fn figures(&self) -> Vec<String> {
        figures(&self.setup.figures(), self.budget).into()
    }

    fn lost_console_bytes(&self) -> u64 {
        self.setup.fleet.members.iter().map(|member| member.vm.lost_console_bytes()).sum()
    }
}

fn figures(figures: &Figures, budget: u64) -> [String; 3] {
    let Figures { done: Done { vcpus, direct, .. }, host } = figures;
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
    [faults, swap_line(host), frames_line(host, budget)]
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::run::End;

    #[test]
    fn the_summary_has_all_figures_in_four_lines() {
        let mut all = Figures::default();
        all.done.vcpus.read_faults = 1_000;
        all.done.vcpus.write_faults = 200;
        all.host.swap_ins = 30;
        all.host.swap_outs = 40;
        all.host.evictions = 50;
        all.host.peak_frames_in_use = 16_384;
        let end = End::Outcome(Outcome::PoweredOff);
        let figures = figures(&all, 64 << 20).into();
        let lines = run::summary(&end, Duration::from_millis(1250), figures);
        assert_eq!(lines.len(), 4);
        assert_eq!(lines[0], "the guest powered off after 1.25 s");
        assert_eq!(lines[1], "faults: 1,000 read, 200 write, 0 execute, 0 the guest's own");
        assert_eq!(lines[2], "swap: 30 pages in, 40 out; 50 evictions");
        assert_eq!(lines[3], "frames: at most 64 MiB in use, of 64 MiB");
    }
}
