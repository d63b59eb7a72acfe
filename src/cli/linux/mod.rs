//! `gnomon boot` of a Linux kernel: its console at standard input and output.
//!
//! Guarantee: the exit code is 0 if the guest powered off, reset its machine or was ended by Ctrl-A x,
//! unless a check found something; 128 + N after signal N; 1 otherwise. A summary on standard error
//! tells how it went, after the terminal has been given back.

mod config;
mod console;
mod disks;
mod escape;
mod keys;

use std::sync::Arc;
use std::time::Instant;

use super::boot::{KILL_TIMEOUT, frames_line, swap_line, window_line};
use super::config::{UsageError, names_of};
use super::ending::{self, Ending, TICK};
use super::fleet::Objects;
use super::injected::{self, Injected};
use super::machine::{from_mm, from_vm};
use super::output::{self, StdoutConsole, printable};
use super::paging::Paging;
use super::stress::Storms;
use super::values::human_count;
use super::violations::{self, Check, EndCheck, Violations};
use super::{EXIT_FAILURE, boot, exit_code_of_signal};
use crate::direct_mmu::DirectConfig;
use crate::host_mm::{HostMemory, HostMm, MemoryObject, MmError};
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

/// How a run ended.
enum End {
    /// By the guest, or by something that went wrong.
    Outcome(Outcome),
    /// By a signal.
    Signal(i32),
    /// By the user at the console.
    Typed,
    /// A vCPU did not stop; the signal that asked for the end, if one did.
    Stuck(Option<i32>),
}

/// Boots the guest, waits for its end and returns the exit code.
///
/// # Errors
/// If the guest cannot be started.
pub(crate) fn run(mut config: LinuxConfig) -> anyhow::Result<u8> {
    let ending = Ending::install()?;
    let continued = ContinueNotice::install()?;
    // Disks before memory: what the user can mend is said first.
    let mut disks = Disks::open(&config.disks)?;
    let mut mm = HostMemory::new(config.host.clone()).map_err(refused_memory)?;
    let object = mm.create_object(mm_bytes(&config)).map_err(refused_memory)?;
    let balloon = config.balloon.then(|| Arc::new(Balloon::new(object.clone())));
    let mut devices = disks.devices();
    devices.extend(balloon.clone().map(|it| it as Arc<dyn Device>));
    let screen = StdoutConsole::new();
    let images = std::mem::take(&mut config.images);
    let mut vm = make(&config, images, &object, devices, screen.clone())?;
    mm.start_reclaim().map_err(refused_memory)?;
    for warning in config.warnings.iter().chain(&disks.warnings()) {
        output::note(warning);
    }
    if let Some(line) = injected::announcement(&config.host.inject) {
        output::note(line);
    }
    if let Some(line) = storm_announcement(&config) {
        output::note(line);
    }
    let LinuxConfig { storm, storm_rate, seed, host, .. } = config;
    let objects = Arc::<Objects>::default();
    objects.add(vm.object());
    let mut storms = Storms::start(&mm, &objects, &storm, storm_rate, seed)?;
    let input = vm.input();
    let console = Console::open(move |keys| input.send(keys))?;
    let begun = Instant::now();
    vm.start()?;
    ending.phase("running the guest");
    let end = wait(&mut vm, (&ending, continued), &console, &screen, &mut disks);
    let elapsed = begun.elapsed();
    storms.stop();
    if !end.is_stuck() {
        // A vCPU that hangs may do so in one of them.
        vm.stop_devices();
    }
    drop(console);
    ending.phase("checking what is left");

    let mut found = collect(&vm, !end.is_stuck(), &mm, &storms);
    let injected = conclude(&end, vm.object(), &mut found);
    let stats = mm.stats();
    output::note(format!("{} after {:.2} s", end.sentence(), elapsed.as_secs_f64()));
    output::note(window_line(&vm.paging().stats()));
    output::note(swap_line(&stats));
    output::note(frames_line(&stats, host.host_memory_bytes));
    if let Some(balloon) = balloon {
        let stats = balloon.stats();
        output::note(format!(
            "balloon: {} pages put in, {} reported free; {} given up",
            human_count(stats.inflated),
            human_count(stats.reported),
            human_count(stats.given_up)
        ));
    }
    for count in storms.counts() {
        output::note(format!(
            "storm {}: {} pages of {} tried",
            count.kind,
            human_count(count.done),
            human_count(count.tried)
        ));
    }
    for line in injected {
        output::note(line);
    }
    for trouble in disks.report() {
        output::note(trouble);
    }
    for failure in vm.device_failures() {
        output::note(printable(&failure));
    }
    for line in boot::complaints(&found, vm.lost_console_bytes(), ending.signal()) {
        output::note(line);
    }
    ending::let_go((storms, vm, object, mm));
    Ok(end.exit_code(&found))
}

/// What is told before a run with a storm.
fn storm_announcement(config: &LinuxConfig) -> Option<String> {
    let LinuxConfig { storm, storm_rate, seed, .. } = config;
    let kinds = names_of(storm);
    let rate = human_count(u64::from(*storm_rate));
    (!storm.is_empty()).then(|| {
        format!("storm on purpose: {kinds}, {rate} pages a second of each, with seed {seed}")
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

/// Waits for the end of the guest, a signal, or Ctrl-A x.
fn wait(
    vm: &mut LinuxVm,
    (ending, continued): (&Ending, ContinueNotice),
    console: &Console,
    screen: &StdoutConsole,
    disks: &mut Disks,
) -> End {
    let mut continues = continued.count();
    loop {
        disks.tell();
        if continued.count() != continues {
            continues = continued.count();
            vm.tell_of_pause();
        }
        if let Some(outcome) = vm.wait(Some(TICK)) {
            return End::Outcome(outcome);
        }
        let asked = match ending.signal() {
            Some(signal) => End::Signal(signal),
            None if console.is_ended() => End::Typed,
            None => continue,
        };
        ending.phase("waiting for the vCPUs to stop");
        screen.give_up();
        vm.kill();
        return match ending::wait_for(KILL_TIMEOUT, |tick| vm.wait(Some(tick))) {
            Some(Outcome::Killed) => asked,
            // It was faster.
            Some(outcome) => End::Outcome(outcome),
            None => End::Stuck(ending.signal()),
        };
    }
}

impl End {
    fn sentence(&self) -> String {
        match self {
            Self::Outcome(outcome) => boot::how_it_ended(Some(outcome), None),
            Self::Signal(signal) => boot::how_it_ended(Some(&Outcome::Killed), Some(*signal)),
            Self::Typed => "the guest was ended by Ctrl-A x".to_owned(),
            Self::Stuck(signal) => boot::how_it_ended(None, *signal),
        }
    }

    fn is_stuck(&self) -> bool {
        matches!(self, Self::Stuck(_))
    }

    /// Whether it was not the guest's own end: it may have had no time for what was asked for.
    fn is_early(&self) -> bool {
        !matches!(
            self,
            Self::Outcome(Outcome::PoweredOff | Outcome::Rebooted | Outcome::Halted)
                | Self::Outcome(Outcome::GuestExit(_))
        )
    }

    fn exit_code(&self, found: &Violations) -> u8 {
        let code = match self {
            Self::Outcome(outcome) => outcome.exit_code(),
            Self::Signal(signal) | Self::Stuck(Some(signal)) => {
                return exit_code_of_signal(*signal);
            }
            Self::Typed => 0,
            Self::Stuck(None) => EXIT_FAILURE,
        };
        if code == 0 && found.total > 0 { EXIT_FAILURE } else { code }
    }
}

/// Everything that the checks have found; no storm runs any more, nor, if the guest is at rest, a vCPU or
/// a device.
fn collect(vm: &LinuxVm, is_at_rest: bool, mm: &HostMm, storms: &Storms) -> Violations {
    let resident = mm.resident_bytes().unwrap_or(0);
    let mut found = violations::of_host(mm, is_at_rest, resident);
    let reverse_map = (EndCheck::ReverseMap, is_at_rest);
    found.look_at_rest(reverse_map, Check::ReverseMap, || vm.check_reverse_map());
    found.add(Check::Run, storms.counts().into_iter().filter_map(|count| count.broken), 0);
    found
}

/// Ends the injection: what is to be told of it. What is wrong is added to `found`. Nothing of it if a
/// vCPU still runs.
fn conclude(end: &End, object: &Arc<MemoryObject>, found: &mut Violations) -> Vec<String> {
    if end.is_stuck() {
        return Vec::new();
    }
    let Some(injected) = Injected::conclude(object.host_mm(), [object]) else {
        return Vec::new();
    };
    injected.add_violations(found, end.is_early());
    injected.lines()
}

#[cfg(test)]
mod tests;
