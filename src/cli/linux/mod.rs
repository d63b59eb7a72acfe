//! `gnomon boot` of a Linux kernel: its console at standard input and output.
//!
//! Guarantee: that of a run ([`mod@super::run`]); the exit code is 0 if the guest powered off, reset its machine or
//! was ended by Ctrl-A x, unless a check found something. How it went is told after the terminal has been given
//! back.

mod config;
mod console;
mod disks;
mod escape;
mod keys;

use std::sync::Arc;
use std::time::Duration;

use super::boot::{frames_line, swap_line, window_line};
use super::config::{UsageError, names_of};
use super::ending::Ending;
use super::hint;
use super::output::{self, StdoutConsole, printable};
use super::refusal::{from_mm, from_vm};
use super::run::{self, Guest};
use crate::direct_mmu::DirectConfig;
use crate::host_mm::{HostMemory, HostMm, MemoryObject, MmError};
use crate::lab::text::human_count;
use crate::lab::{self, Check, EndCheck, Judge, Objects, Paging, StormPlan, Storms, Violations};
use crate::sys::job_control::ContinueNotice;
use crate::virtio::{Balloon, Device};
use crate::vmm::linux::{LinuxError, LinuxImage, LinuxVm};
use crate::vmm::{Outcome, Removal, VmError};

use config::Images;
pub(crate) use config::{LinuxConfig, Resolved, resolve};
use console::Console;
pub(crate) use disks::DiskArg;
use disks::Disks;

/// That of every Linux guest.
const PAGING: Paging = Paging::Direct(Removal::Free);

fn refused_memory(error: MmError) -> anyhow::Error {
    from_mm(error, PAGING)
}

/// Boots the guest, waits for its end and returns the exit code.
///
/// # Errors
/// If the guest cannot be started.
pub(crate) fn run(mut config: LinuxConfig) -> anyhow::Result<u8> {
    let ending = Ending::install()?;
    let continued = ContinueNotice::install()?;
    // Disks before memory: what the user can mend is said first.
    let disks = Disks::open(&config.disks)?;
    let mut memory = HostMemory::new(config.host.clone()).map_err(refused_memory)?;
    let object = memory.create_object(mm_bytes(&config)).map_err(refused_memory)?;
    let balloon = config.balloon.then(|| Arc::new(Balloon::new(object.clone())));
    let mut devices = disks.devices();
    devices.extend(balloon.clone().map(|it| it as Arc<dyn Device>));
    let screen = StdoutConsole::new();
    let images = std::mem::take(&mut config.images);
    let vm = make(&config, images, &object, devices, screen.clone())?;
    memory.start_reclaim().map_err(refused_memory)?;
    for warning in config.warnings.iter().chain(&disks.warnings()) {
        output::note(warning);
    }
    if let Some(line) = lab::announcement(&config.host.inject) {
        output::note(line);
    }
    if let Some(line) = storm_announcement(&config) {
        output::note(line);
    }
    let LinuxConfig { storm, host, .. } = config;
    let objects = Arc::<Objects>::default();
    objects.add(vm.object());
    let judge = Judge::new(host.inject.clone(), hint::of);
    let storms = Storms::start(judge, &memory, &objects, &storm)?;
    let input = vm.input();
    let console = Some(Console::open(move |keys| input.send(keys))?);
    let continues = continued.count();
    let budget = host.host_memory_bytes;
    let guest =
        Booted { storms, vm, memory, balloon, disks, console, continued, continues, budget };
    run::to_the_end(guest, &ending, &screen)
}

/// A Linux guest with its devices.
struct Booted {
    // In the order in which they go.
    storms: Storms,
    vm: LinuxVm,
    memory: HostMemory,
    balloon: Option<Arc<Balloon>>,
    disks: Disks,
    /// Until the terminal is given back.
    console: Option<Console>,
    continued: ContinueNotice,
    /// How often the process had been continued when the guest was last told.
    continues: u64,
    /// Bytes of host memory.
    budget: u64,
}

impl Guest for Booted {
    fn start(&mut self) -> anyhow::Result<()> {
        Ok(self.vm.start()?)
    }

    fn wait(&mut self, timeout: Duration) -> Option<Outcome> {
        self.vm.wait(Some(timeout))
    }

    fn kill(&mut self) {
        self.vm.kill();
    }

    fn tend(&mut self) {
        self.disks.tell();
        let continues = self.continued.count();
        if continues != self.continues {
            self.continues = continues;
            self.vm.tell_of_pause();
        }
    }

    fn is_ended_by_user(&self) -> bool {
        self.console.as_ref().is_some_and(Console::is_ended)
    }

    fn settle(&mut self, is_at_rest: bool) {
        self.storms.stop();
        if is_at_rest {
            self.vm.stop_devices();
        }
        self.console = None;
    }

    /// No storm runs any more, nor, if the guest is at rest, a vCPU or a device.
    fn check(&self, is_at_rest: bool) -> Violations {
        let mm = self.host_mm();
        let resident = mm.resident_bytes().unwrap_or(0);
        let mut found = lab::of_host(mm, is_at_rest, resident);
        let reverse_map = (EndCheck::ReverseMap, is_at_rest);
        found.look_at_rest(reverse_map, Check::ReverseMap, || self.vm.check_reverse_map());
        let broken = self.storms.counts().into_iter().filter_map(|count| count.broken);
        found.add(Check::Run, broken, 0);
        found
    }

    fn host_mm(&self) -> &Arc<HostMm> {
        &self.memory
    }

    fn memory(&self) -> impl Iterator<Item = &Arc<MemoryObject>> {
        std::iter::once(self.vm.object())
    }

    fn figures(&self) -> Vec<String> {
        let stats = self.host_mm().stats();
        let window = window_line(&self.vm.paging().stats());
        let mut lines = vec![window, swap_line(&stats), frames_line(&stats, self.budget)];
        lines.extend(self.balloon.as_ref().map(|balloon| {
            let stats = balloon.stats();
            format!(
                "balloon: {} pages put in, {} reported free; {} given up",
                human_count(stats.inflated),
                human_count(stats.reported),
                human_count(stats.given_up)
            )
        }));
        lines.extend(self.storms.counts().iter().map(|count| {
            format!(
                "storm {}: {} pages of {} tried",
                count.kind,
                human_count(count.done),
                human_count(count.tried)
            )
        }));
        lines
    }

    fn troubles(&self) -> Vec<String> {
        let mut lines = self.disks.report();
        lines.extend(self.vm.device_failures().iter().map(|failure| printable(failure)));
        lines
    }

    fn lost_console_bytes(&self) -> u64 {
        self.vm.lost_console_bytes()
    }
}

/// What is told before a run with a storm.
fn storm_announcement(config: &LinuxConfig) -> Option<String> {
    let StormPlan { kinds, rate, seed } = &config.storm;
    let names = names_of(kinds);
    let rate = human_count(u64::from(*rate));
    (!kinds.is_empty()).then(|| {
        format!("storm on purpose: {names}, {rate} pages a second of each, with seed {seed}")
    })
}

/// What is in `images` is in the guest's memory afterwards, and nowhere else.
fn make(
    config: &LinuxConfig,
    images: Images,
    object: &Arc<MemoryObject>,
    devices: Vec<Arc<dyn Device>>,
    screen: StdoutConsole,
) -> anyhow::Result<LinuxVm> {
    let image = LinuxImage {
        kernel: &images.kernel,
        initrd: images.initrd.as_deref(),
        cmdline: config.cmdline.as_bytes(),
        vcpus: config.vcpus,
        devices: devices.len(),
    };
    let vm = LinuxVm::new(&image, object, DirectConfig::default(), devices, Box::new(screen));
    vm.map_err(|error| match error {
        VmError::Linux(error @ LinuxError::Host { .. }) => error.into(),
        VmError::Linux(error) => UsageError(format!("cannot boot Linux: {error}")).into(),
        other => from_vm(other, PAGING),
    })
}

fn mm_bytes(config: &LinuxConfig) -> u64 {
    match config.host.placement {
        crate::host_mm::Placement::Identity { guest_bytes } => guest_bytes,
        crate::host_mm::Placement::Anywhere => 0,
    }
}

#[cfg(test)]
mod tests;
