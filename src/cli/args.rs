//! The command line as it is written: first of two stages, without side effects.
//!
//! What a value means for this host (does the file exist, does KVM run so many vCPUs, does swap
//! suffice) is the second stage's matter, in [`config`](super::config).

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::Duration;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Args, Parser, Subcommand, ValueEnum};

use super::inject::{self, parse_injection};
use super::linux::DiskArg;
use super::values::{
    Size, parse_duration, parse_limit, parse_pages, parse_percent, parse_rate, parse_seed,
    parse_vcpus, parse_vms,
};
use crate::host_mm::{Injection, ReclaimPolicy, Sabotage};
use crate::lab::Invalidation;
use crate::vmm::HostKind;

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

/// A workload of the test guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Workload {
    /// Sweeps, first page to last
    Seq,
    /// Every page as likely
    Random,
    /// A few pages often, most rarely
    Zipf,
    /// A pointer chase through all pages
    Chase,
    /// Counters that all vCPUs add to
    Shared,
    /// Changes of the guest's own page tables
    Paging,
    /// A hot set in steady use while the rest is scanned
    Hotscan,
}

/// [`Invalidation`] as it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Invalidate {
    /// Evict pages to swap
    Reclaim,
    /// Make pages read-only, harvest their dirty state and write them back
    Clean,
    /// Move pages to other frames
    Migrate,
    /// Merge pages with copies of themselves, and with the same page of another VM
    Merge,
    /// Share pages with a snapshot, so that their next write copies them
    Cow,
    /// Let pages of zeros share one; the guest gives pages back, reads and writes them
    Zero,
    /// Map ranges to other pages, which are copies
    Remap,
    /// Have the guest give pages back
    Free,
    /// Have the guest give pages back, and remove them from its window (direct paging)
    Remove,
    /// Nothing but what memory pressure brings about
    None,
}

impl Invalidate {
    /// What is to be forced, if anything is.
    pub(crate) fn kind(self) -> Option<Invalidation> {
        Some(match self {
            Self::Reclaim => Invalidation::Reclaim,
            Self::Clean => Invalidation::Clean,
            Self::Migrate => Invalidation::Migrate,
            Self::Merge => Invalidation::Merge,
            Self::Cow => Invalidation::Cow,
            Self::Zero => Invalidation::Zero,
            Self::Remap => Invalidation::Remap,
            Self::Free => Invalidation::Free,
            Self::Remove => Invalidation::Remove,
            Self::None => return None,
        })
    }
}

/// How a guest's memory is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum PagingMode {
    /// Page tables of Gnomon's own: for guests that keep to docs/guest-abi.md
    Shadow,
    /// A window that the kernel maps and Gnomon fills (needs userfaultfd): for any guest
    Direct,
    /// Shadow for guests that keep to docs/guest-abi.md, direct for others
    Auto,
}

/// [`ReclaimPolicy`] as it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum PolicyName {
    /// Pages in use stay
    Clock,
    /// Oldest first, for comparison
    Fifo,
}

/// [`HostKind`] as it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum HostKindName {
    /// It shadows page tables in software: right on every host
    Shadow,
    /// Nested paging
    Tdp,
}

impl From<HostKindName> for HostKind {
    fn from(name: HostKindName) -> Self {
        match name {
            HostKindName::Shadow => Self::Shadow,
            HostKindName::Tdp => Self::Tdp,
        }
    }
}

/// [`Sabotage`] as it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum SabotageName {
    /// Mappings are cleared, but what processors cache of them lives on
    SkipFlush,
    /// The dirty state that an invalidation harvests is thrown away
    DropDirty,
    /// Mappings are installed without their reverse-map entry
    ForgetRmap,
    /// A fault installs its mapping although an invalidation overlapped it
    LateInstall,
    /// Frames are given to new pages before the flush
    EarlyReuse,
    /// Pages that a clone shares stay writable for its source (with --churn)
    SkipCloneProtect,
    /// A device's flush does not wait for its accesses in flight
    SkipIotlbWait,
    /// Now and then a bit of a page in swap flips
    SwapCorrupt,
    /// Pages stay writable while they are written out (direct paging)
    SkipWp,
    /// That pages of the window were removed is not heeded (direct paging)
    DropEvent,
}

impl From<PolicyName> for ReclaimPolicy {
    fn from(name: PolicyName) -> Self {
        match name {
            PolicyName::Clock => Self::Clock,
            PolicyName::Fifo => Self::Fifo,
        }
    }
}

impl From<SabotageName> for Sabotage {
    fn from(name: SabotageName) -> Self {
        match name {
            SabotageName::SkipFlush => Self::SkipFlush,
            SabotageName::DropDirty => Self::DropDirty,
            SabotageName::ForgetRmap => Self::ForgetRmap,
            SabotageName::LateInstall => Self::LateInstall,
            SabotageName::EarlyReuse => Self::EarlyReuse,
            SabotageName::SkipCloneProtect => Self::SkipCloneProtect,
            SabotageName::SkipIotlbWait => Self::SkipIotlbWait,
            SabotageName::SwapCorrupt => Self::SwapCorrupt,
            SabotageName::SkipWp => Self::SkipWriteProtect,
            SabotageName::DropEvent => Self::DropEvent,
        }
    }
}

/// The value as it is written on the command line.
pub(crate) fn name_of(value: impl ValueEnum) -> String {
    let value = value.to_possible_value();
    value.map_or_else(String::new, |value| value.get_name().to_owned())
}

/// What the help says of the value.
pub(crate) fn description_of(value: impl ValueEnum) -> String {
    let value = value.to_possible_value();
    let help = value.as_ref().and_then(|value| value.get_help());
    help.map_or_else(String::new, ToString::to_string)
}

/// The command line of these words. What begins with a minus and a digit is the value of the option
/// before it, with a unit, too: clap takes `-1s` for options of one letter.
///
/// # Errors
/// As clap: see [`complaint`].
pub(crate) fn parse(words: impl IntoIterator<Item = OsString>) -> Result<Cli, clap::Error> {
    let mut joined: Vec<OsString> = Vec::new();
    for word in words {
        match joined.last_mut() {
            Some(option) if is_option(option) && is_negative(&word) => {
                option.push("=");
                option.push(word);
            }
            _ => joined.push(word),
        }
    }
    Cli::try_parse_from(joined)
}

/// Whether a word is an option whose value is another word, if it has one.
fn is_option(word: &OsStr) -> bool {
    let bytes = word.as_bytes();
    bytes.len() > 2 && bytes.starts_with(b"--") && !bytes.contains(&b'=')
}

fn is_negative(word: &OsStr) -> bool {
    matches!(word.as_bytes(), [b'-', digit, ..] if digit.is_ascii_digit())
}

/// What clap has to say about a command line, in one sentence; `None` if it is help or the version
/// that the user asked for.
pub(crate) fn complaint(error: &clap::Error) -> Option<String> {
    let text = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => text.clone(),
        Some(ContextValue::Strings(texts)) => texts.join(", "),
        _ => String::new(),
    };
    let sentence = match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => return None,
        ErrorKind::ValueValidation => {
            let reason = std::error::Error::source(error).map(ToString::to_string);
            let value = text(ContextKind::InvalidValue);
            let usage = text(ContextKind::InvalidArg);
            let option = option_name(&usage);
            format!("{option} {value:?}: {}", reason.unwrap_or_default())
        }
        ErrorKind::InvalidValue => {
            let (value, option) = (text(ContextKind::InvalidValue), text(ContextKind::InvalidArg));
            let valid = text(ContextKind::ValidValue);
            match (value.is_empty(), valid.is_empty()) {
                (true, true) => format!("{option} needs a value"),
                (true, false) => format!("{option} needs a value: one of {valid}"),
                _ => format!(
                    "{} {value:?} does not exist; choose from {valid}",
                    option_name(&option)
                ),
            }
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand | ErrorKind::MissingSubcommand => {
            "no command given; use one of boot, stress, peer, doctor".to_owned()
        }
        _ => first_paragraphs(&error.render().to_string()),
    };
    Some(format!("{sentence} (gnomon --help tells more)"))
}

/// `--memory` of `--memory <SIZE>`.
fn option_name(usage: &str) -> &str {
    usage.split_whitespace().next().unwrap_or(usage)
}

/// Clap's own message and its tips, joined to one line, without the usage.
fn first_paragraphs(rendered: &str) -> String {
    let message = rendered.strip_prefix("error: ").unwrap_or(rendered);
    let said = message.split("\n\n").take_while(|paragraph| {
        !paragraph.starts_with("Usage:") && !paragraph.starts_with("For more")
    });
    let words: Vec<&str> = said.flat_map(str::split_whitespace).collect();
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn complaint_about(words: &[&str]) -> String {
        let words = ["gnomon"].iter().chain(words).map(OsString::from);
        complaint(&parse(words).unwrap_err()).unwrap()
    }

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

    #[test]
    fn kinds_of_invalidation_are_written_as_reports_have_them() {
        for &kind in Invalidate::value_variants() {
            let name = kind.kind().map_or("none", Invalidation::name);
            assert_eq!(name_of(kind), name);
        }
    }

    #[test]
    fn every_sabotage_has_its_name() {
        let names: Vec<String> =
            SabotageName::value_variants().iter().map(|&v| name_of(v)).collect();
        assert_eq!(
            names,
            [
                "skip-flush",
                "drop-dirty",
                "forget-rmap",
                "late-install",
                "early-reuse",
                "skip-clone-protect",
                "skip-iotlb-wait",
                "swap-corrupt",
                "skip-wp",
                "drop-event"
            ]
        );
        for &name in SabotageName::value_variants() {
            assert!(!description_of(name).is_empty());
        }
    }

    #[test]
    fn bad_values_are_one_sentence_with_the_value_and_the_remedy() {
        let cases: [(&[&str], &[&str]); 16] = [
            (&["stress", "--dma", "101"], &["--dma \"101\"", "0 to 100"]),
            (&["boot", "--memory", "12Q"], &["--memory \"12Q\"", "such as 256M"]),
            (&["boot", "--memory", "0"], &["--memory \"0\"", "give at least 4K"]),
            (&["boot", "--host-memory", "5000"], &["--host-memory \"5000\"", "8192"]),
            (&["boot", "--vcpus", "0"], &["--vcpus \"0\"", "1 to 1023"]),
            (&["stress", "--vms", "0"], &["--vms \"0\"", "1 to 64"]),
            (&["stress", "--churn", "1"], &["--churn \"1\"", "such as 30s"]),
            (&["stress", "--duration", "30"], &["--duration \"30\"", "such as 30s"]),
            (&["stress", "--duration", "-1s"], &["--duration \"-1s\"", "below 0", "such as 30s"]),
            (&["stress", "--churn", "-2m"], &["--churn \"-2m\"", "below 0"]),
            (&["boot", "--memory", "-1M"], &["--memory \"-1M\"", "such as 256M"]),
            (&["stress", "--rate", "-5/s"], &["--rate \"-5/s\"", "such as 20000/s"]),
            (&["stress", "--rate", "0/s"], &["--rate \"0/s\"", "--invalidate none"]),
            (&["stress", "--seed", "x"], &["--seed \"x\"", "whole number"]),
            (
                &["stress", "--sabotage", "gremlin"],
                &["--sabotage \"gremlin\"", "skip-flush", "swap-corrupt"],
            ),
            (&["stress", "--workload", "seq,walk"], &["\"walk\"", "hotscan"]),
        ];
        for (words, parts) in cases {
            let said = complaint_about(words);
            assert!(!said.contains('\n'), "{said}");
            for part in parts {
                assert!(said.contains(part), "{words:?}: {said}");
            }
        }
    }

    #[test]
    fn bad_options_and_commands_are_one_line() {
        for (words, part) in [
            (&["boot", "--memmory", "1G"][..], "--memmory"),
            (&["boot", "--memory"], "--memory <SIZE> needs a value"),
            (&["stress", "--sabotage"], "skip-flush"),
            (&["dance"], "dance"),
            (&[], "boot, stress, peer, doctor"),
            (&["boot", "surplus"], "surplus"),
            (&["boot", "--vcpus", "1", "--vcpus", "2"], "--vcpus"),
        ] {
            let said = complaint_about(words);
            assert!(said.contains(part), "{words:?}: {said}");
            assert!(!said.contains('\n') && !said.contains("Usage"), "{said}");
        }
    }

    #[test]
    fn help_and_version_are_no_complaints() {
        for word in ["--help", "--version"] {
            let error = Cli::try_parse_from(["gnomon", word]).unwrap_err();
            assert_eq!(complaint(&error), None);
        }
    }
}
