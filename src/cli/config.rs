//! The second stage of the command line: what was written, resolved against this host.
//!
//! Guarantee: what comes out can be run as far as can be known without starting; what cannot is a
//! [`UsageError`], one sentence with the value, what is wrong with it and what to do. Files are
//! read and looked at, none is left behind.

use std::borrow::Cow;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use clap::ValueEnum;

use super::args::{
    BootArgs, HostArgs, Invalidate, PolicyName, SabotageName, StressArgs, Workload, name_of,
};
use super::limits::{self, Folder, HostLimits, Needs, Shape, SwapInMemory};
use super::paging;
use super::report::json;
use super::values::{Size, size};
use crate::abi;
use crate::host_mm::{
    HostMmConfig, MAX_HOST_MEMORY_BYTES, MIN_HOST_MEMORY_BYTES, ReclaimPolicy, SwapConfig,
};
use crate::lab::inject::{concerns_peers, plan};
use crate::lab::text::human_bytes;
use crate::lab::{Invalidation, Paging, PeersPlan, Plan, SetupPlan, StormPlan};
use crate::peer::server::check_path;
use crate::sys::names::folder_of;
use crate::vmm::boot::TEST_GUEST;
use crate::vmm::linux::KernelKind;
use crate::vmm::{HostKind, VmConfig};

/// Least memory of a guest: below it there is room for hardly more than its kernel.
const MIN_MEMORY_BYTES: u64 = 16 << 20;
/// Memory of the test guest that all its vCPUs share, and that of each.
const TEST_GUEST_BYTES: u64 = 2 << 20;
const TEST_GUEST_VCPU_BYTES: u64 = 432 << 10;
/// Size of swap that nobody chose, unless the guest is larger.
const DEFAULT_SWAP_BYTES: u64 = 1 << 30;
/// Most bytes of a command line, without its NUL.
const MAX_CMDLINE_BYTES: u64 = abi::CMDLINE_BYTES - 1;

/// A command line that cannot be run, in one sentence.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct UsageError(pub(crate) String);

/// Returns a [`UsageError`] from the function.
macro_rules! refuse {
    ($($word:tt)*) => { return Err(UsageError(format!($($word)*))) };
}
pub(crate) use refuse;

/// What every guest is run with.
#[derive(Clone)]
pub(crate) struct MachineConfig {
    pub(crate) setup: SetupPlan,
    pub(crate) notes: Notes,
}

/// What is known of a run beside how it is to be.
#[derive(Clone)]
pub(crate) struct Notes {
    /// What it takes of the host.
    pub(crate) needs: Needs,
    /// What is allowed, but may not be what was meant; a sentence each.
    pub(crate) warnings: Vec<String>,
}

/// `gnomon stress`, ready to run.
#[derive(Clone)]
pub(crate) struct StressConfig {
    pub(crate) plan: Plan,
    pub(crate) notes: Notes,
    pub(crate) workloads: Vec<Workload>,
    /// Percentage of page accesses by DMA.
    pub(crate) dma: u8,
    pub(crate) json: Option<PathBuf>,
    pub(crate) sabotage: Option<SabotageName>,
    pub(crate) policy: PolicyName,
}

/// Resolves `gnomon boot` of this kernel, or of the test guest.
pub(crate) fn boot(
    args: &BootArgs,
    kernel: Option<Vec<u8>>,
    limits: &HostLimits,
) -> Result<MachineConfig, UsageError> {
    refuse_peer_faults(&args.host, "boot serves no peers: use stress --export-socket")?;
    let (kernel, default_cmdline) = match kernel {
        None => (Cow::Borrowed(TEST_GUEST), "mode=boot"),
        Some(kernel) => (Cow::Owned(kernel), ""),
    };
    let cmdline = args.cmdline.as_deref().unwrap_or(default_cmdline);
    check_cmdline(cmdline)?;
    let sizes =
        Sizes { memory: args.memory, host_memory: args.host_memory, vcpus: args.vcpus, vms: 1 };
    let seed = args.seed.unwrap_or_else(new_seed);
    let machine = machine(&sizes, &args.host, limits, kernel, cmdline.to_owned(), seed)?;
    check_needs(&machine.notes.needs, limits)?;
    Ok(machine)
}

/// Refuses what the host does not allow.
pub(crate) fn check_needs(needs: &Needs, limits: &HostLimits) -> Result<(), UsageError> {
    match limits::shortages(needs, limits).into_iter().next() {
        Some(shortage) => Err(UsageError(shortage.sentence)),
        None => Ok(()),
    }
}

/// One access in fifty gives its page back.
const GUEST_FREES: &str = " free=2";

/// Kinds of invalidation that want pages given back.
const GIVEN_BACK: [Invalidation; 3] =
    [Invalidation::Free, Invalidation::Zero, Invalidation::Remove];

/// Resolves `gnomon stress`.
pub(crate) fn stress(args: &StressArgs, limits: &HostLimits) -> Result<StressConfig, UsageError> {
    let workloads = without_repeats(&args.workload);
    let paging = paging::resolve(args.host.paging, TEST_GUEST, args.memory.bytes());
    let invalidations = match &args.invalidate {
        Some(list) => {
            let all = Invalidate::value_variants().iter().filter_map(|kind| kind.kind());
            invalidations("--invalidate", &all.collect::<Vec<_>>(), list)?
        }
        None => paging::default_invalidations(paging),
    };
    paging::check(paging, args, &invalidations)?;
    let seed = args.seed.unwrap_or_else(new_seed);
    let names: Vec<String> = workloads.iter().map(|&workload| name_of(workload)).collect();
    let mut cmdline = format!("mode=stress workload={} seed={seed}", names.join(","));
    if invalidations.iter().any(|kind| GIVEN_BACK.contains(kind)) {
        cmdline += GUEST_FREES;
    }
    if args.dma != 0 {
        cmdline += &format!(" dma={}", args.dma);
    }
    check_churn(args)?;
    let sizes = Sizes {
        memory: args.memory,
        host_memory: args.host_memory,
        vcpus: args.vcpus,
        // One that is asked to finish lives on next to the one that takes its place.
        vms: args.vms + usize::from(args.churn.is_some()),
    };
    let mut machine =
        machine(&sizes, &args.host, limits, Cow::Borrowed(TEST_GUEST), cmdline, seed)?;
    machine.notes.needs.add_threads(invalidations.len() as u64);
    if args.export_socket.is_some() {
        machine.notes.needs.add_peers();
    }
    check_needs(&machine.notes.needs, limits)?;
    machine.setup.host.policy = ReclaimPolicy::from(args.policy);
    machine.setup.host.sabotage = args.sabotage.map(Into::into);
    machine.setup.host.check_evictions = true;
    if let Paging::Direct(removal) = &mut machine.setup.paging {
        *removal = paging::removal(&invalidations);
    }
    if let Some(path) = &args.json {
        json::check_writable(path).map_err(|error| UsageError(error.to_string()))?;
    }
    let MachineConfig { setup, notes } = machine;
    let plan = Plan {
        setup,
        vms: args.vms,
        churn: args.churn,
        duration: args.duration,
        storm: StormPlan { kinds: invalidations, rate: args.rate, seed },
        fail_fast: args.fail_fast || args.sabotage.is_some(),
        until_oracle: args.until_oracle,
        peers: peers(args)?,
    };
    Ok(StressConfig {
        plan,
        notes,
        workloads,
        dma: args.dma,
        json: args.json.clone(),
        sabotage: args.sabotage,
        policy: args.policy,
    })
}

fn check_churn(args: &StressArgs) -> Result<(), UsageError> {
    if args.sabotage == Some(SabotageName::SkipCloneProtect) && args.churn.is_none() {
        refuse!(
            "--sabotage skip-clone-protect shows when a VM at work is cloned: add --vms 2 --churn 1s"
        );
    }
    if args.churn.is_some() && args.vms < 2 {
        refuse!("--churn wants another VM to clone when one is ended: add --vms 2");
    }
    Ok(())
}

fn peers(args: &StressArgs) -> Result<Option<PeersPlan>, UsageError> {
    let Some(socket) = args.export_socket.clone() else {
        refuse_peer_faults(&args.host, "without --export-socket there are no peers: give it, too")?;
        return Ok(None);
    };
    if cfg!(not(feature = "export-notifier")) {
        refuse!("--export-socket needs a gnomon that was built with export-notifier");
    }
    check_path(&socket).map_err(|error| UsageError(format!("--export-socket {error}")))?;
    Ok(Some(PeersPlan { socket, limit: args.peer_limit }))
}

/// Refuses faults of peers where there are none.
pub(crate) fn refuse_peer_faults(host: &HostArgs, why: &str) -> Result<(), UsageError> {
    match host.inject.iter().find(|item| concerns_peers(item)) {
        Some(item) => refuse!("--inject {item}: {why}"),
        None => Ok(()),
    }
}

/// The part of the machine that has other defaults for each command.
pub(crate) struct Sizes {
    pub(crate) memory: Size,
    pub(crate) host_memory: Size,
    pub(crate) vcpus: usize,
    /// VMs that there may be at a time.
    pub(crate) vms: usize,
}

impl Sizes {
    /// Memory of all VMs in bytes.
    fn all_memory(&self) -> u64 {
        self.memory.bytes().saturating_mul(self.vms as u64)
    }
}

/// Refuses what only shadow paging has.
fn refuse_shadow_options(host: &HostArgs, kernel: &[u8]) -> Result<(), UsageError> {
    let given = [
        (
            host.paranoid,
            "--paranoid watches frames that get other pages, and with direct paging none does",
        ),
        (
            host.assume_host.is_some(),
            "--assume-host says what shadow paging takes KVM for, and with direct paging nothing asks",
        ),
    ];
    match given.iter().find(|(is_given, _)| *is_given) {
        None => Ok(()),
        // Linux cannot have the other paging.
        Some((_, why)) if KernelKind::of(kernel).is_linux() => refuse!("{why}: leave it out"),
        Some((_, why)) => refuse!("{why}: leave it out, or use --paging shadow"),
    }
}

pub(crate) fn machine(
    sizes: &Sizes,
    host: &HostArgs,
    limits: &HostLimits,
    kernel: Cow<'static, [u8]>,
    cmdline: String,
    seed: u64,
) -> Result<MachineConfig, UsageError> {
    check_sizes(sizes, limits)?;
    // Only the built-in guest is borrowed.
    if matches!(kernel, Cow::Borrowed(_)) {
        check_test_guest(sizes)?;
    }
    let memory_bytes = sizes.memory.bytes();
    let paging = paging::resolve(host.paging, &kernel, memory_bytes);
    if paging != Paging::Shadow {
        refuse_shadow_options(host, &kernel)?;
    }
    let swap = swap(sizes.all_memory(), host)?;
    let look = || Folder::look_at(swap_folder(&swap));
    let folder = limits.swap_folder.clone().unwrap_or_else(look);
    let warnings = warnings(sizes, host, &swap, &folder, limits);
    let shape = Shape {
        memory_bytes,
        host_memory_bytes: sizes.host_memory.bytes(),
        vcpus: sizes.vcpus as u64,
        vms: sizes.vms as u64,
        is_direct: paging != Paging::Shadow,
    };
    let mut needs = Needs::of(shape, swap.bytes);
    needs.swap_in_memory = SwapInMemory::at(&folder, most_swapped(sizes, &swap));
    if let Cow::Owned(image) = &kernel {
        needs.add_image(image.len() as u64);
    }
    let vm = VmConfig {
        memory_bytes,
        vcpus: sizes.vcpus,
        kernel,
        cmdline,
        shadow_pages: None,
        observer: None,
    };
    let host_mm = HostMmConfig {
        swap,
        placement: paging.placement(memory_bytes),
        paranoid: host.paranoid,
        inject: plan(host.inject.clone(), seed),
        ..HostMmConfig::new(sizes.host_memory.bytes())
    };
    let assume_host = host.assume_host.map(HostKind::from);
    Ok(MachineConfig {
        setup: SetupPlan { vm, host: host_mm, paging, assume_host },
        notes: Notes { needs, warnings },
    })
}

fn check_sizes(sizes: &Sizes, limits: &HostLimits) -> Result<(), UsageError> {
    let &Sizes { memory, host_memory, vcpus, .. } = sizes;
    let (least, most) = (size(MIN_MEMORY_BYTES), size(abi::MAX_MEMORY_BYTES));
    if memory < least {
        refuse!("--memory {memory} is too little for a guest: give at least {least}");
    }
    if memory > most {
        refuse!("--memory {memory} is more than a guest can have: give at most {most}");
    }
    let least = size(MIN_HOST_MEMORY_BYTES);
    if host_memory < least {
        refuse!(
            "--host-memory {host_memory} is too little for a guest to get past a single instruction for sure: give at least {least}"
        );
    }
    let most = size(MAX_HOST_MEMORY_BYTES);
    if host_memory > most {
        refuse!("--host-memory {host_memory} is more than can be managed: give at most {most}");
    }
    if let Some(most) = limits.max_vcpus
        && vcpus > most
    {
        refuse!(
            "--vcpus {vcpus} is more than this host's KVM runs in one guest: give at most {most}"
        );
    }
    Ok(())
}

/// What the test guest needs for its stacks, tables and least work set, as measured: 388 pages, and 107
/// for each vCPU.
fn check_test_guest(sizes: &Sizes) -> Result<(), UsageError> {
    let &Sizes { memory, vcpus, .. } = sizes;
    let needed = TEST_GUEST_BYTES + vcpus as u64 * TEST_GUEST_VCPU_BYTES;
    let least = size(needed.next_multiple_of(1 << 20));
    if memory < least {
        refuse!(
            "--memory {memory} is too little for the test guest with {vcpus} vCPUs: give at least {least}, or fewer --vcpus"
        );
    }
    Ok(())
}

fn swap(memory_bytes: u64, host: &HostArgs) -> Result<SwapConfig, UsageError> {
    let default = || memory_bytes.max(DEFAULT_SWAP_BYTES);
    let swap = SwapConfig {
        path: host.swap_file.clone(),
        dir: None,
        bytes: host.swap_size.map_or_else(default, Size::bytes),
    };
    if swap.slots().is_err() {
        refuse!("--swap-size {} is more than swap can have: give less", size(swap.bytes));
    }
    if let Some(path) = &swap.path {
        if path.symlink_metadata().is_ok() {
            refuse!(
                "--swap-file {} exists already, and a swap file is made anew, without a name: name another place, or remove it if nothing uses it",
                path.display()
            );
        }
        let folder = folder_of(path);
        if !folder.is_dir() {
            refuse!(
                "--swap-file {}: {} is not a directory; make it, or name another place",
                path.display(),
                folder.display()
            );
        }
    }
    Ok(swap)
}

fn warnings(
    sizes: &Sizes,
    host: &HostArgs,
    swap: &SwapConfig,
    folder: &Folder,
    limits: &HostLimits,
) -> Vec<String> {
    let mut warnings = Vec::new();
    let needed = sizes.all_memory().saturating_sub(sizes.host_memory.bytes());
    if let Some(swap_size) = host.swap_size
        && swap_size.bytes() < needed
    {
        warnings.push(format!(
            "warning: --memory {}{} is more than --host-memory {} and --swap-size {swap_size} together hold: a guest that uses all of it will be ended",
            sizes.memory,
            if sizes.vms > 1 { format!(" for each of up to {} VMs", sizes.vms) } else { String::new() },
            sizes.host_memory
        ));
    }
    // More than that and its own swap is refused.
    if let Some(available) = limits.available_bytes
        && sizes.host_memory.bytes() > available
    {
        warnings.push(format!(
            "warning: --host-memory {} is more than the {} that this host has available without its own swap",
            sizes.host_memory,
            human_bytes(available)
        ));
    }
    let shown = folder.path.display();
    if needed > 0 && folder.is_in_memory {
        warnings.push(format!(
            "warning: {} is in memory (tmpfs), so swapping to it frees nothing, and a guest that uses all of its memory takes up to {} of the host's: put swap on a disk with --swap-file",
            shown,
            human_bytes(folder.free_bytes.unwrap_or(needed).min(needed))
        ));
    }
    let wanted = needed.min(swap.bytes);
    // In memory that is refused.
    if let Some(free) = folder.free_bytes
        && !folder.is_in_memory
        && free < wanted
    {
        warnings.push(format!(
            "warning: {} has {} free, and swap may want {}: a guest that uses all of its memory will be ended; put swap elsewhere with --swap-file",
            shown,
            human_bytes(free),
            human_bytes(wanted)
        ));
    }
    warnings
}

/// Most bytes that swap can take, if it is wanted at all. A page that came back keeps its slot until it
/// is written to.
fn most_swapped(sizes: &Sizes, swap: &SwapConfig) -> u64 {
    match sizes.all_memory() > sizes.host_memory.bytes() {
        true => sizes.all_memory().min(swap.bytes),
        false => 0,
    }
}

/// The directory that swap will be in.
fn swap_folder(swap: &SwapConfig) -> PathBuf {
    swap.path.as_deref().map_or_else(std::env::temp_dir, |path| folder_of(path).to_owned())
}

pub(crate) fn check_cmdline(cmdline: &str) -> Result<(), UsageError> {
    if cmdline.len() as u64 > MAX_CMDLINE_BYTES {
        refuse!("--cmdline has {} bytes: shorten it to {MAX_CMDLINE_BYTES} or less", cmdline.len());
    }
    if let Some(at) = cmdline.find('\0') {
        refuse!("--cmdline has a NUL at byte {at}, where it would end: leave it out");
    }
    Ok(())
}

fn without_repeats<T: Copy + PartialEq>(list: &[T]) -> Vec<T> {
    let mut kept = Vec::new();
    for &item in list {
        if !kept.contains(&item) {
            kept.push(item);
        }
    }
    kept
}

/// The kinds of invalidation that `option`, which takes the kinds `of`, was given; empty if it is none.
pub(crate) fn invalidations(
    option: &str,
    of: &[Invalidation],
    list: &[Invalidate],
) -> Result<Vec<Invalidation>, UsageError> {
    let kinds = without_repeats(list);
    if kinds.len() > 1 && kinds.contains(&Invalidate::None) {
        refuse!(
            "{option} none stands alone: leave out either none or the others of {}",
            names_of(of)
        );
    }
    Ok(kinds.into_iter().filter_map(Invalidate::kind).collect())
}

/// Kinds of invalidation as they are written.
pub(crate) fn names_of(kinds: &[Invalidation]) -> String {
    kinds.iter().map(|kind| kind.name()).collect::<Vec<_>>().join(", ")
}

/// A seed that differs from run to run, short enough to type.
pub(crate) fn new_seed() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mixed = now.as_nanos() ^ (u128::from(std::process::id()) << 20);
    u64::try_from(mixed % 1_000_000_007).unwrap_or(1)
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
