//! The command line as it is written: first of two stages, without side effects.
//!
//! What a value means for this host (does the file exist, does KVM run so many vCPUs, does swap
//! suffice) is the second stage's matter, in [`config`](super::config).

mod names;
mod parse;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use super::inject::{self, parse_injection};
use super::linux::DiskArg;
use super::values::{
    Size, parse_duration, parse_limit, parse_pages, parse_percent, parse_rate, parse_seed,
    parse_vcpus, parse_vms,
};
use crate::host_mm::Injection;

pub(crate) use names::{
    HostKindName, Invalidate, PagingMode, PolicyName, SabotageName, Workload, description_of,
    name_of,
};
pub(crate) use parse::{complaint, parse};

const EXIT_CODES: &str = "Exit codes: 0 success; 1 failure, violations found, or output that could not be written; 2 a command line that cannot be run; 128 + N ended by signal N. boot: the guest's own.";

/// Runs guests on KVM with their memory rationed, swapped and translated by Gnomon itself.
#[derive(Debug, Parser)]
#[command(name = "gnomon", version, max_term_width = 100, after_help = EXIT_CODES)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Boot a guest with its console on standard output
    Boot(BootArgs),
    /// Run the test guest under a storm of invalidations and check every access
    Stress(StressArgs),
    /// Map pages of a guest that another process stresses, and check what comes
    Peer(PeerArgs),
    /// Say what this machine offers and what is missing
    Doctor(DoctorArgs),
}

/// Options of every command that runs a guest.
#[derive(Debug, Args)]
pub(crate) struct HostArgs {
    /// Place of the file for evicted pages, which is made anew and has no name there, so that it is
    /// gone with the run [default: in the temporary directory]
    #[arg(long, value_name = "PATH")]
    pub(crate) swap_file: Option<PathBuf>,
    /// Size of swap; a sparse file [default: the memory of all guests, at least 1G]
    #[arg(long, value_name = "SIZE", allow_negative_numbers = true)]
    pub(crate) swap_size: Option<Size>,
    /// Write what happens to each page to this file, as JSON lines (see docs/tracing.md; large)
    #[arg(long, value_name = "FILE")]
    pub(crate) trace: Option<PathBuf>,
    /// How the guest's memory is mapped
    #[arg(long, value_name = "MODE", value_enum, default_value = "auto")]
    pub(crate) paging: PagingMode,
    /// Have the kernel watch for accesses to freed frames (shadow paging; needs userfaultfd; slower)
    #[arg(long)]
    pub(crate) paranoid: bool,
    #[arg(long, value_name = "LIST", help = inject::HELP, value_delimiter = ',', value_parser = parse_injection)]
    pub(crate) inject: Vec<Injection>,
    /// Take this host's KVM for one of this kind instead of probing it (shadow paging; for tests)
    #[arg(long, value_name = "KIND", value_enum)]
    pub(crate) assume_host: Option<HostKindName>,
}

#[derive(Debug, Args)]
pub(crate) struct BootArgs {
    /// Memory of the guest
    #[arg(long, value_name = "SIZE", allow_negative_numbers = true, default_value = "256M")]
    pub(crate) memory: Size,
    /// Frames of host memory that the guest's memory has to get by with
    #[arg(long, value_name = "SIZE", allow_negative_numbers = true, default_value = "64M")]
    pub(crate) host_memory: Size,
    /// Number of virtual processors
    #[arg(long, value_name = "N", allow_negative_numbers = true, default_value = "1", value_parser = parse_vcpus)]
    pub(crate) vcpus: usize,
    /// Command line of the guest
    #[arg(long, value_name = "STR", allow_hyphen_values = true)]
    pub(crate) cmdline: Option<String>,
    /// Kernel to boot: a Linux bzImage or vmlinux, or an ELF image that keeps to the guest ABI; may be
    /// compressed by gzip or zstd
    /// [default: the built-in test guest]
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: Option<PathBuf>,
    /// Linux: initial RAM disk
    #[arg(long, value_name = "FILE")]
    pub(crate) initrd: Option<PathBuf>,
    /// Linux: raw image of a disk or a block device, /dev/vda and so on; with ,ro only to be read, by
    /// default ,rw; with ,raw also if it looks like an image of another format. May be given again
    #[arg(long, value_name = "FILE[,ro|,rw][,raw]")]
    pub(crate) disk: Vec<DiskArg>,
    /// Linux: give the guest a balloon, by which pages that it frees leave their frames at once
    #[arg(long)]
    pub(crate) balloon: bool,
    /// Linux: force invalidations of these kinds on its pages all the time [of: reclaim, clean]
    #[arg(
        long, value_name = "LIST", value_delimiter = ',', num_args = 0..=1, require_equals = true,
        default_missing_value = "reclaim,clean", hide_possible_values = true
    )]
    pub(crate) storm: Vec<Invalidate>,
    /// Linux: pages a second of each kind of --storm [default: 20000/s]
    #[arg(long, value_name = "N/s", allow_negative_numbers = true, value_parser = parse_rate)]
    pub(crate) storm_rate: Option<u32>,
    /// Seed of the random choices of --inject and --storm [default: a new one, which is told]
    #[arg(long, value_name = "S", allow_negative_numbers = true, value_parser = parse_seed)]
    pub(crate) seed: Option<u64>,
    #[command(flatten)]
    pub(crate) host: HostArgs,
}

#[derive(Debug, Args)]
pub(crate) struct StressArgs {
    /// Memory of the guest
    #[arg(long, value_name = "SIZE", allow_negative_numbers = true, default_value = "512M")]
    pub(crate) memory: Size,
    /// Frames of host memory that the guest's memory has to get by with
    #[arg(long, value_name = "SIZE", allow_negative_numbers = true, default_value = "128M")]
    pub(crate) host_memory: Size,
    /// Number of virtual processors
    #[arg(long, value_name = "N", allow_negative_numbers = true, default_value = "2", value_parser = parse_vcpus)]
    pub(crate) vcpus: usize,
    /// Number of VMs over the same frames: clones of the first, made once that has begun to work
    #[arg(long, value_name = "N", allow_negative_numbers = true, default_value = "1", value_parser = parse_vms)]
    pub(crate) vms: usize,
    /// End a VM and clone another one this often (with --vms 2 or more)
    #[arg(long, value_name = "TIME", allow_negative_numbers = true, value_parser = parse_duration)]
    pub(crate) churn: Option<Duration>,
    /// How long the guest works before its last sweep over all memory (500ms, 30s, 2m, 1h)
    #[arg(long, value_name = "TIME", allow_negative_numbers = true, default_value = "30s", value_parser = parse_duration)]
    pub(crate) duration: Duration,
    /// What the guest does, in turn
    #[arg(
        long,
        value_name = "LIST",
        value_enum,
        value_delimiter = ',',
        default_value = "seq,random,zipf,chase,shared,paging"
    )]
    pub(crate) workload: Vec<Workload>,
    /// Percentage of its page accesses that the DMA device makes instead
    #[arg(long, value_name = "PERCENT", allow_negative_numbers = true, default_value = "5", value_parser = parse_percent)]
    pub(crate) dma: u8,
    /// What is forced upon its pages meanwhile [default: reclaim,clean; with direct paging
    /// free,remove, too]
    #[arg(long, value_name = "LIST", value_enum, value_delimiter = ',')]
    pub(crate) invalidate: Option<Vec<Invalidate>>,
    /// Pages a second of each kind of invalidation
    #[arg(long, value_name = "N/s", allow_negative_numbers = true, default_value = "20000/s", value_parser = parse_rate)]
    pub(crate) rate: u32,
    /// Seed of all random choices [default: a new one, which the report tells]
    #[arg(long, value_name = "S", allow_negative_numbers = true, value_parser = parse_seed)]
    pub(crate) seed: Option<u64>,
    /// Write the report to this file as JSON, too
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Break one rule on purpose: the run must then find violations
    #[arg(long, value_name = "NAME", value_enum)]
    pub(crate) sabotage: Option<SabotageName>,
    /// End the run at the first violation (implied by --sabotage)
    #[arg(long)]
    pub(crate) fail_fast: bool,
    /// Go on with a sabotage until the guest's oracle notices, whatever other checks have found: for
    /// tests of the oracle
    #[arg(long, hide = true, requires = "sabotage")]
    pub(crate) until_oracle: bool,
    /// Which pages are evicted first
    #[arg(long, value_name = "NAME", value_enum, default_value = "clock")]
    pub(crate) policy: PolicyName,
    /// Lend pages of the guest to other processes (gnomon peer) that connect to this socket
    #[arg(long, value_name = "PATH")]
    pub(crate) export_socket: Option<PathBuf>,
    /// Time in which a peer must give up a page, or is cut off, in milliseconds
    #[arg(long, value_name = "MS", allow_negative_numbers = true, default_value = "1000", value_parser = parse_limit)]
    pub(crate) peer_limit: Duration,
    #[command(flatten)]
    pub(crate) host: HostArgs,
}

#[derive(Debug, Args)]
pub(crate) struct PeerArgs {
    /// The socket of gnomon stress --export-socket
    #[arg(value_name = "PATH")]
    pub(crate) socket: PathBuf,
    /// How long to stay, if the run does not end before (500ms, 30s, 2m, 1h)
    #[arg(long, value_name = "TIME", allow_negative_numbers = true, default_value = "10s", value_parser = parse_duration)]
    pub(crate) duration: Duration,
    /// Most pages held at a time
    #[arg(long, value_name = "N", allow_negative_numbers = true, default_value = "256", value_parser = parse_pages)]
    pub(crate) pages: usize,
    /// Time after which a page is given up, on average, in milliseconds
    #[arg(long, value_name = "MS", allow_negative_numbers = true, default_value = "100", value_parser = parse_limit)]
    pub(crate) hold_ms: Duration,
    /// Seed of the random choices [default: a new one, which is told]
    #[arg(long, value_name = "S", allow_negative_numbers = true, value_parser = parse_seed)]
    pub(crate) seed: Option<u64>,
    /// Answer nothing any more after so many invalidations: a bad peer, to see it cut off
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub(crate) hang_after: Option<u64>,
}

#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// Print the findings as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn stress(words: &[&str]) -> StressArgs {
        let words = ["gnomon", "stress"].iter().chain(words);
        match Cli::try_parse_from(words).unwrap().command {
            Command::Stress(args) => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_definition_holds_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn defaults_are_those_of_the_help() {
        let args = stress(&[]);
        assert_eq!(args.memory.bytes(), 512 << 20);
        assert_eq!(args.host_memory.bytes(), 128 << 20);
        assert_eq!((args.vcpus, args.rate, args.dma), (2, 20_000, 5));
        assert_eq!((args.vms, args.churn), (1, None));
        assert_eq!(args.duration, Duration::from_secs(30));
        assert_eq!(args.workload.len(), 6);
        assert!(!args.workload.contains(&Workload::Hotscan));
        assert_eq!(args.invalidate, None);
        assert_eq!(args.policy, PolicyName::Clock);
        assert!(args.sabotage.is_none() && !args.fail_fast && args.seed.is_none());
    }

    #[test]
    fn lists_are_separated_by_commas() {
        let args = stress(&["--workload", "hotscan,seq", "--invalidate=none"]);
        assert_eq!(args.workload, [Workload::Hotscan, Workload::Seq]);
        assert_eq!(args.invalidate, Some(vec![Invalidate::None]));
    }
}
