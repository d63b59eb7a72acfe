//! `gnomon boot` of a Linux kernel, resolved against this host.

use std::path::Path;

use super::disks::DiskArg;
use crate::cli::args::{BootArgs, PagingMode};
use crate::cli::config::{self, Sizes, UsageError, refuse};
use crate::cli::kernel_file;
use crate::cli::limits::HostLimits;
use crate::cli::values::size;
use crate::host_mm::HostMmConfig;
use crate::lab::{Invalidation, StormPlan};
use crate::virtio::DiskMode;
use crate::vmm::linux::KernelKind;
use crate::vmm::linux::layout::{MAX_MEMORY_BYTES, MAX_VIRTIO_DEVICES};

/// What can be done to pages that keep their frames.
const STORMS: [Invalidation; 2] = [Invalidation::Reclaim, Invalidation::Clean];
/// Pages a second of each kind of storm, unless it is said.
const DEFAULT_STORM_RATE: u32 = 20_000;

/// What is loaded into a guest's memory, as it was read.
#[derive(Default)]
pub(crate) struct Images {
    pub(super) kernel: Vec<u8>,
    pub(super) initrd: Option<Vec<u8>>,
}

/// A guest that boots Linux, ready to run.
pub(crate) struct LinuxConfig {
    pub(super) images: Images,
    pub(super) cmdline: String,
    pub(super) vcpus: usize,
    pub(super) disks: Vec<DiskArg>,
    pub(super) balloon: bool,
    /// What is forced on its pages.
    pub(super) storm: StormPlan,
    pub(super) host: HostMmConfig,
    pub(super) warnings: Vec<String>,
}

/// What `gnomon boot` boots.
pub(crate) enum Resolved {
    /// Linux.
    Linux(Box<LinuxConfig>),
    /// Another kernel, or none that was named.
    Other(Option<Vec<u8>>),
}

/// Resolves `gnomon boot` if the kernel that it names is one of Linux.
pub(crate) fn resolve(
    args: &BootArgs,
    kernel: Option<Vec<u8>>,
    limits: &HostLimits,
) -> Result<Resolved, UsageError> {
    match kernel {
        Some(kernel) if KernelKind::of(&kernel).is_linux() => {
            Ok(Resolved::Linux(Box::new(linux(args, kernel, limits)?)))
        }
        other => {
            refuse_linux_options(args)?;
            Ok(Resolved::Other(other))
        }
    }
}

fn linux(args: &BootArgs, kernel: Vec<u8>, limits: &HostLimits) -> Result<LinuxConfig, UsageError> {
    config::refuse_peer_faults(&args.host, "boot serves no peers: use stress --export-socket")?;
    if args.host.paging == PagingMode::Shadow {
        refuse!(
            "--paging shadow is for guests that keep to the guest ABI, and Linux does not: leave it out"
        );
    }
    let devices = args.disk.len() + usize::from(args.balloon);
    if devices > MAX_VIRTIO_DEVICES {
        refuse!("{devices} devices: a Linux guest has at most {MAX_VIRTIO_DEVICES}; name fewer");
    }
    if args.memory.bytes() > MAX_MEMORY_BYTES {
        refuse!(
            "--memory {} is more than a Linux guest can have: give at most {}",
            args.memory,
            size(MAX_MEMORY_BYTES)
        );
    }
    let storm = storm(args)?;
    let sizes =
        Sizes { memory: args.memory, host_memory: args.host_memory, vcpus: args.vcpus, vms: 1 };
    let cmdline = args.cmdline.clone().unwrap_or_default();
    config::check_cmdline(&cmdline)?;
    let seed = args.seed.unwrap_or_else(config::new_seed);
    // With the kernel it knows that paging is direct.
    let mut machine = config::machine(&sizes, &args.host, limits, kernel.into(), cmdline, seed)?;
    // The console has two, storms one each.
    machine.notes.needs.add_threads(2 + storm.len() as u64);
    machine.notes.needs.add_devices(devices as u64);
    for disk in args.disk.iter().filter(|disk| disk.mode == DiskMode::ReadWrite) {
        // Devices have no such limit.
        file_bytes(&disk.path).inspect(|&bytes| machine.notes.needs.add_disk(&disk.path, bytes));
    }
    let initrd = args.initrd.as_deref();
    // One that is larger than the guest has its own sentence, and is not read either.
    let fits = |bytes: &u64| *bytes <= args.memory.bytes();
    machine.notes.needs.add_image(initrd.and_then(file_bytes).filter(fits).unwrap_or(0));
    config::check_needs(&machine.notes.needs, limits)?;
    let read = |path| kernel_file::read_file("--initrd", path, args.memory.bytes(), initrd_advice);
    Ok(LinuxConfig {
        images: Images {
            kernel: machine.setup.vm.kernel.into_owned(),
            initrd: initrd.map(read).transpose()?,
        },
        cmdline: machine.setup.vm.cmdline,
        vcpus: machine.setup.vm.vcpus,
        disks: args.disk.clone(),
        balloon: args.balloon,
        host: HostMmConfig { check_evictions: !storm.is_empty(), ..machine.setup.host },
        storm: StormPlan {
            kinds: storm,
            rate: args.storm_rate.unwrap_or(DEFAULT_STORM_RATE),
            seed,
        },
        warnings: machine.notes.warnings,
    })
}

/// The size of a file, if it is one: whether it can be opened is looked at later.
fn file_bytes(path: &Path) -> Option<u64> {
    let file = std::fs::metadata(path).ok().filter(std::fs::Metadata::is_file);
    file.map(|file| file.len())
}

/// The kinds of `--storm`.
fn storm(args: &BootArgs) -> Result<Vec<Invalidation>, UsageError> {
    let kinds = config::invalidations("--storm", &STORMS, &args.storm)?;
    if let Some(&other) = kinds.iter().find(|kind| !STORMS.contains(kind)) {
        refuse!(
            "--storm {}: the pages of a Linux guest keep their frames; choose of {}",
            other.name(),
            config::names_of(&STORMS)
        );
    }
    if kinds.is_empty() && args.storm_rate.is_some() {
        refuse!("--storm-rate without a storm does nothing: add --storm, or leave it out");
    }
    Ok(kinds)
}

/// What to do about a RAM disk of more bytes than the guest's memory has.
fn initrd_advice(bytes: u64) -> &'static str {
    if bytes < MAX_MEMORY_BYTES { "choose more --memory" } else { kernel_file::NAME_A_SMALLER_ONE }
}

/// Refuses what only Linux guests have.
fn refuse_linux_options(args: &BootArgs) -> Result<(), UsageError> {
    let given = [
        ("--initrd", args.initrd.is_some()),
        ("--disk", !args.disk.is_empty()),
        ("--balloon", args.balloon),
        ("--storm", !args.storm.is_empty()),
        ("--storm-rate", args.storm_rate.is_some()),
    ];
    if let Some((option, _)) = given.into_iter().find(|(_, is_given)| *is_given) {
        let why = match &args.kernel {
            None => "name one with --kernel".to_owned(),
            Some(path) => format!("--kernel {} is none", path.display()),
        };
        refuse!("{option} is for a Linux kernel, a bzImage or vmlinux: {why}");
    }
    Ok(())
}
