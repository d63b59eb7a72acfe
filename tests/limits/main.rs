//! The built program under the limits of its host: what cannot be had is refused before a guest
//! starts, with exit code 2 and one sentence that names the limit and what to do, and nothing is left
//! behind; and what the sentence asks for is enough.

mod apply;
#[allow(dead_code, reason = "other suites do more with processes")]
#[path = "../kvm/common/process.rs"]
mod process;
#[path = "../kvm/common/trial.rs"]
mod trial;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use libtest_mimic::Trial;
use nix::sys::statfs::{TMPFS_MAGIC, statfs};

use apply::Limits;
use process::{Finished, MINUTES, start_command};
use trial::{Ignore, kvm_trial, kvm_trial_or_ignore, trial_without_kvm};

/// Each run has two processors' worth of threads.
const THREADS: usize = 1;
/// A guest that swaps from the beginning and is through in a few seconds.
const BOOT: [&str; 7] = ["boot", "--memory", "16M", "--host-memory", "6M", "--swap-size", "16M"];

fn main() -> ExitCode {
    // In the child, between the limits and the program.
    if let Some(limits) = Limits::of_this_process() {
        return limits.become_gnomon();
    }
    let trials: Vec<Trial> = vec![
        trial_without_kvm("files_of_a_limited_size_are_refused", file_size),
        trial_without_kvm("a_disk_beyond_the_file_size_is_refused", disk),
        trial_without_kvm("address_space_and_private_memory_are_refused", address_space),
        trial_without_kvm("open_files_are_refused", open_files),
        trial_without_kvm("threads_of_a_user_are_refused", threads),
        trial_without_kvm("a_control_groups_memory_is_refused", group_memory),
        trial_without_kvm("a_control_groups_threads_are_refused", group_threads),
        trial_without_kvm("a_small_tmpfs_for_swap_is_refused", small_tmpfs),
        trial_without_kvm("doctor_says_what_boot_would_refuse", doctor),
        kvm_trial("what_the_sentence_asks_for_is_enough", enough),
        kvm_trial_or_ignore("what_is_asked_of_a_control_group_is_enough", enough_in_a_group),
        kvm_trial("limits_that_are_not_needed_may_be_nothing", not_needed),
        kvm_trial_or_ignore("a_limit_met_on_the_way_is_the_hosts_and_no_violation", met_on_the_way),
        kvm_trial("output_beyond_the_file_size_is_lost_and_told", output_beyond_the_file_size),
    ];
    trial::run(trials, THREADS).exit_code()
}

fn run(limits: &Limits, words: &[&str]) -> Finished {
    start_command(limits.command(words), MINUTES).finish()
}

/// Runs it, which must be refused with all these parts; returns the sentence. Its swap file would be
/// in a folder that is then empty.
#[track_caller]
fn refused(limits: &Limits, words: &[&str], parts: &[&str]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let swap = folder.path().join("swap");
    let words = [words, &["--swap-file", swap.to_str().unwrap()]].concat();
    let finished = run(limits, &words).with_code(2).says(parts);
    assert!(finished.stdout.is_empty(), "{finished:#?}");
    assert_eq!(finished.stderr.lines().count(), 1, "one sentence: {finished:#?}");
    assert!(finished.stderr.starts_with("gnomon: "), "{finished:#?}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "something is left behind");
    finished.stderr
}

/// The number that follows `before` in a sentence.
#[track_caller]
fn number(sentence: &str, before: &str) -> u64 {
    let (_, rest) = sentence.split_once(before).unwrap_or_else(|| panic!("{sentence}"));
    let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    rest[..end].parse().unwrap_or_else(|_| panic!("no number behind {before:?} in {sentence}"))
}

fn file_size() -> Result<(), Ignore> {
    for command in ["boot", "stress"] {
        let words = [&[command][..], &BOOT[1..]].concat();
        let small = Limits::default().file_size(4 << 20);
        let said = refused(&small, &words, &["the file of the frames", "ulimit -f"]);
        assert_eq!(number(&said, "raise that limit to "), 6 << 10, "{said}");
        let middle = Limits::default().file_size(12 << 20);
        refused(&middle, &words, &["the swap file", "ulimit -f", "--swap-size"]);
        let direct = [&words[..], &["--paging", "direct"]].concat();
        refused(&middle, &direct, &["the file of a guest's memory", "--memory"]);
    }
    Ok(())
}

fn disk() -> Result<(), Ignore> {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (kernel, disk) = (path("vmlinuz"), path("disk"));
    // No more is looked at before the limits.
    let mut image = vec![0; 0x400];
    image[0x202..0x206].copy_from_slice(b"HdrS");
    fs::write(&kernel, image).unwrap();
    fs::File::create(&disk).unwrap().set_len(1 << 30).unwrap();
    let limits = Limits::default().file_size(64 << 20);
    let words = [&BOOT[..], &["--kernel", &kernel, "--disk", &disk]].concat();
    refused(&limits, &words, &[&disk, "1 GiB", "ulimit -f", ",ro"]);
    let metadata = fs::metadata(&disk).unwrap();
    assert_eq!(metadata.len(), 1 << 30, "the image is as it was");
    Ok(())
}

fn address_space() -> Result<(), Ignore> {
    let limits = Limits::default().address_space(64 << 20);
    let said = refused(&limits, &BOOT, &["address space", "ulimit -v"]);
    assert!(number(&said, "raise that limit to ") > 64 << 10, "{said}");
    refused(&Limits::default().private_memory(8 << 20), &BOOT, &["private memory", "ulimit -d"]);
    Ok(())
}

fn open_files() -> Result<(), Ignore> {
    let limits = Limits::default().open_files(10);
    refused(&limits, &BOOT, &["10 files open", "ulimit -n", "--vcpus"]);
    let many = ["boot", "--memory", "64M", "--vcpus", "64"];
    refused(&Limits::default().open_files(64), &many, &["64 files open"]);
    Ok(())
}

/// Of a user without other processes: root has no such limit, and others may have any number.
fn threads() -> Result<(), Ignore> {
    if !nix::unistd::geteuid().is_root() {
        return Err(Ignore("only root can run a program as another user".to_owned()));
    }
    let limits = Limits::default().threads(1).of_nobody();
    let output = limits.command(&["--version"]).output().unwrap();
    if !output.status.success() {
        return Err(Ignore("the program is in a place that nobody else may read".to_owned()));
    }
    let finished = run(&limits, &BOOT).with_code(2);
    finished.says(&["threads are wanted for 1 vCPUs", "this user may have 1 threads (ulimit -u)"]);
    Ok(())
}

/// A control group of this test, and one in it; removed with the value.
struct Group {
    outer: PathBuf,
    inner: PathBuf,
    /// Where the limit on memory is written.
    memory_file: &'static str,
}

impl Group {
    fn make(controller: &'static str) -> Result<Self, Ignore> {
        let refused = |what: &Path, why: &dyn std::fmt::Display| {
            Ignore(format!("no control group can be made: {}: {why}", what.display()))
        };
        // In the group that this process is in, so that other limits go on counting.
        let (parent, memory_file) =
            apply::own_group(controller).ok_or_else(|| refused(Path::new(controller), &"none"))?;
        let outer = parent.join(format!("gnomon-test-{}-{controller}", std::process::id()));
        fs::create_dir(&outer).map_err(|error| refused(&outer, &error))?;
        let group = Self { inner: outer.join("inner"), outer, memory_file };
        let enable = group.outer.join("cgroup.subtree_control");
        if enable.exists() {
            fs::write(&enable, format!("+{controller}"))
                .map_err(|error| refused(&enable, &error))?;
        }
        fs::create_dir(&group.inner).map_err(|error| refused(&group.inner, &error))?;
        Ok(group)
    }

    fn limit(&self, file: &str, value: u64) -> Result<String, Ignore> {
        let path = self.outer.join(file);
        let shown = path.display().to_string();
        let set = fs::write(&path, value.to_string());
        set.map_err(|error| Ignore(format!("no limit can be set: {shown}: {error}")))?;
        Ok(shown)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        for folder in [&self.inner, &self.outer] {
            // A process that was waited for may take a moment to leave its group.
            for _ in 0..500 {
                if fs::remove_dir(folder).is_ok() || !folder.exists() {
                    break;
                }
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
        }
    }
}

fn group_memory() -> Result<(), Ignore> {
    let group = Group::make("memory")?;
    let file = group.limit(group.memory_file, 8 << 20)?;
    // The limit is the parent's; the group itself has none.
    let limits = Limits::default().in_group(&group.inner);
    for command in ["boot", "stress"] {
        let words = [command, "--memory", "64M", "--host-memory", "32M"];
        refused(&limits, &words, &[&file, "allows 8 MiB", "up to 32 MiB", "beside them"]);
    }
    let direct = ["boot", "--memory", "64M", "--host-memory", "32M", "--paging", "direct"];
    refused(&limits, &direct, &[&file]);
    run(&limits, &["doctor"]).with_code(1);
    group.limit(group.memory_file, 48 << 20)?;
    let words = ["boot", "--host-memory", "64M"];
    let temporary = statfs(&std::env::temp_dir()).expect("it is there");
    if temporary.filesystem_type() == TMPFS_MAGIC {
        // Fewer frames would be more swap, which is the group's memory there.
        refused(&limits, &words, &["put swap on a disk with --swap-file, or give less --memory"]);
    } else {
        let said = refused(&limits, &words, &["--host-memory"]);
        assert!(number(&said, "or give --host-memory ") < 48, "{said}");
    }
    Ok(())
}

fn group_threads() -> Result<(), Ignore> {
    let group = Group::make("pids")?;
    let file = group.limit("pids.max", 3)?;
    let limits = Limits::default().in_group(&group.inner);
    refused(&limits, &[&BOOT[..], &["--vcpus", "4"]].concat(), &[&file, "allows 3", "4 vCPUs"]);
    Ok(())
}

fn small_tmpfs() -> Result<(), Ignore> {
    use nix::mount::{MsFlags, mount};
    use nix::sched::{CloneFlags, unshare};

    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().to_owned();
    // The mount namespace is the thread's and its child's.
    let thread = std::thread::spawn(move || {
        let none = None::<&str>;
        let mounted = unshare(CloneFlags::CLONE_NEWNS)
            .and_then(|()| mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none))
            .and_then(|()| {
                let options = Some("size=1m");
                mount(Some("tmpfs"), &place, Some("tmpfs"), MsFlags::empty(), options)
            });
        mounted.map_err(|errno| Ignore(format!("no tmpfs can be mounted: {errno}")))?;
        let mut command = Limits::default().command(&BOOT);
        command.env("TMPDIR", &place);
        let finished = start_command(command, MINUTES).finish().with_code(2);
        let place = place.to_str().unwrap();
        finished.says(&[
            &format!("{place} is in memory (tmpfs) and has 1 MiB free"),
            "takes up to 16 MiB",
            "--swap-file",
        ]);
        Ok(())
    });
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn doctor() -> Result<(), Ignore> {
    let limits = Limits::default().file_size(1 << 20).open_files(10);
    let finished = run(&limits, &["doctor"]).with_code(1);
    for part in ["missing  file size: ", "ulimit -f", "missing  open files: ", "ulimit -n"] {
        assert!(finished.stdout.contains(part), "no {part:?} in {finished:#?}");
    }
    Ok(())
}

fn enough() {
    let boot = |limits: Limits| {
        let finished = run(&limits, &BOOT).with_code(0);
        assert!(finished.stdout.contains("\nPASS: passed="), "{finished:#?}");
    };
    let asked = |limits: Limits| number(&refused(&limits, &BOOT, &[]), "raise that limit to ");
    // What the program had mapped before it looked differs a little from run to run.
    let spare_kib = 4 << 10;
    let kib = asked(Limits::default().address_space(64 << 20));
    boot(Limits::default().address_space((kib + spare_kib) << 10));
    // And more is no worse: whatever threads the C library would give heaps of their own.
    for percent in [125, 150, 200, 250, 300] {
        boot(Limits::default().address_space((kib * percent / 100) << 10));
    }
    let kib = asked(Limits::default().private_memory(8 << 20));
    boot(Limits::default().private_memory((kib + spare_kib) << 10));
    let files = asked(Limits::default().open_files(10));
    boot(Limits::default().open_files(files));
    let kib = asked(Limits::default().file_size(12 << 20));
    boot(Limits::default().file_size(kib << 10));
}

fn enough_in_a_group() -> Result<(), Ignore> {
    let group = Group::make("memory")?;
    group.limit(group.memory_file, 12 << 20)?;
    let limits = Limits::default().in_group(&group.inner);
    let mut allowed = (12 << 20) + (number(&refused(&limits, &BOOT, &[]), "raise it by ") << 20);
    // The kernel charges a group in portions, and takes back late what a process left: what is taken is
    // not the same from one start to the next, and a little more may be asked for.
    let finished = loop {
        group.limit(group.memory_file, allowed)?;
        let finished = run(&limits, &BOOT);
        if finished.code() != 2 {
            break finished;
        }
        allowed += number(&finished.stderr, "raise it by ") << 20;
        assert!(allowed < 48 << 20, "{finished:#?}");
    };
    finished.with_code(0).says(&["the guest powered off"]);
    Ok(())
}

/// Signals that wait, locked memory: a guest at work is stopped all the same.
fn not_needed() {
    let limits = Limits::default().pending_signals(0).locked_memory(0);
    let words = [&BOOT[..], &["--vcpus", "2", "--cmdline", "mode=stress"]].concat();
    let mut running = start_command(limits.command(&words), MINUTES);
    running.wait_for(process::Stream::Stdout, "Gnomon test guest");
    running.signal(nix::sys::signal::Signal::SIGTERM);
    running.finish().with_code(143).says(&["ended by signal 15"]);
}

/// So few files may be open from the moment on at which the first guest has been started that not all of
/// its clones can be made.
fn met_on_the_way() -> Result<(), Ignore> {
    let folder = tempfile::tempdir().unwrap();
    let report = folder.path().join("report");
    let words = ["stress", "--vms", "16", "--churn", "50ms", "--memory", "16M", "--host-memory"];
    let words = [&words[..], &["8M", "--duration", "60s", "--invalidate", "none"]].concat();
    let words = [&words[..], &["--json", report.to_str().unwrap()]].concat();
    let running = start_command(Limits::default().command(&words), MINUTES);
    let tasks = PathBuf::from(format!("/proc/{}/task", running.id()));
    let has_started = || {
        let names = fs::read_dir(&tasks).unwrap().filter_map(|task| {
            let name = task.ok()?.path().join("comm");
            fs::read_to_string(name).ok()
        });
        // The one that looks on is started after the guest.
        names.into_iter().any(|name| name.starts_with("storm-dirty"))
    };
    while !has_started() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let pid = running.id().to_string();
    let limited = Command::new("prlimit").args(["--pid", &pid, "--nofile=40:40"]).status();
    if !limited.is_ok_and(|status| status.success()) {
        running.kill();
        return Err(Ignore("there is no prlimit to take from a process what it has".to_owned()));
    }
    let finished = running.finish().with_code(1);
    for part in ["CUT SHORT by a limit of this host", "40 open files (ulimit -n): raise"] {
        assert!(finished.stdout.contains(part), "no {part:?} in {finished:#?}");
    }
    for text in [&finished.stdout, &finished.stderr] {
        assert!(!text.contains("violation") && !text.contains("FAILED"), "{finished:#?}");
    }
    let report = fs::read_to_string(&report).unwrap();
    assert!(report.contains("\"result\": \"host_limit\""), "{report}");
    assert!(report.contains("\"total\": 0"), "{report}");
    Ok(())
}

/// The console goes to a file that may not grow: no signal ends the process.
fn output_beyond_the_file_size() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("console");
    let full = 64 << 20;
    fs::File::create(&path).unwrap().set_len(full).unwrap();
    let console = fs::OpenOptions::new().append(true).open(&path).unwrap();
    let mut command: Command = Limits::default().file_size(full).command(&BOOT);
    command.stdin(std::process::Stdio::null()).stdout(console);
    command.stderr(std::process::Stdio::piped());
    let finished = process::spawn(command, MINUTES).finish();
    finished.code();
    finished.says(&["the guest powered off", "could not be written to standard output"]);
    assert_eq!(fs::metadata(&path).unwrap().len(), full);
}
