//! The built program with guests on real KVM: exit codes, output that goes away, signals, reports.

#[path = "../../common/bzimage.rs"]
mod bzimage;
mod linux;
#[path = "../common/patience.rs"]
mod patience;
#[path = "../common/process.rs"]
#[allow(dead_code, reason = "the other suites need more of it")]
mod process;
#[path = "../common/trial.rs"]
mod trial;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, ExitCode, Output, Stdio};
use std::time::{Duration, Instant};

use libtest_mimic::Trial;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, pipe2};
use patience::{at_least, until_enough};
use serde_json::Value;
use trial::{kvm_trial, kvm_trial_or_ignore};

/// Each run has two processors' worth of threads.
const THREADS: usize = 1;
/// No run here takes nearly as long.
const LIMIT: Duration = Duration::from_secs(120);

/// A guest that swaps from the beginning and is through in a few seconds.
const BOOT: [&str; 5] = ["boot", "--memory", "16M", "--host-memory", "6M"];
const STRESS: [&str; 7] = ["stress", "--memory", "48M", "--host-memory", "12M", "--vcpus", "2"];

fn main() -> ExitCode {
    let trials: Vec<Trial> = vec![
        kvm_trial("boot_ends_with_the_guests_exit_code", boot_ends_with_the_guests_exit_code),
        kvm_trial("boot_outlives_its_readers", boot_outlives_its_readers),
        kvm_trial("boot_ends_at_a_signal", boot_ends_at_a_signal),
        kvm_trial("boot_ends_though_nobody_reads", boot_ends_though_nobody_reads),
        kvm_trial("output_that_cannot_be_written_is_told", output_that_cannot_be_written_is_told),
        kvm_trial("boot_removes_its_swap_file", boot_removes_its_swap_file),
        kvm_trial("stress_reports_a_clean_run", stress_reports_a_clean_run),
        kvm_trial("a_trace_follows_a_page", a_trace_follows_a_page),
        kvm_trial("stress_ends_at_a_signal", stress_ends_at_a_signal),
        kvm_trial("stress_ends_at_the_first_violation", stress_ends_at_the_first_violation),
        kvm_trial("stress_names_a_corrupt_page", stress_names_a_corrupt_page),
        kvm_trial("stress_counts_a_lost_guest_as_a_failure", stress_counts_a_lost_guest),
        kvm_trial("doctor_says_that_boot_works", doctor_says_that_boot_works),
        kvm_trial_or_ignore(
            "stock_kernels_are_refused_where_ring_0_is_emulated",
            linux::stock_kernels_are_refused_where_ring_0_is_emulated,
        ),
        kvm_trial_or_ignore("block_devices_are_disks", linux::block_devices_are_disks),
    ];
    trial::run(trials, THREADS).exit_code()
}

fn gnomon(words: &[&[&str]]) -> Command {
    let mut command = Command::new(process::gnomon());
    command.args(words.concat()).stdin(Stdio::null());
    command
}

fn piped(words: &[&[&str]]) -> Child {
    gnomon(words).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Waits for the end, but not for ever; a child that hangs is killed and the test fails.
#[track_caller]
fn end_of(mut child: Child) -> Output {
    let begun = Instant::now();
    // The pipes are drained meanwhile, or a chatty child would block on them.
    let readers = [
        child.stdout.take().map(|pipe| drain(Box::new(pipe))),
        child.stderr.take().map(|pipe| drain(Box::new(pipe))),
    ];
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if begun.elapsed() > LIMIT {
            child.kill().unwrap();
            panic!("did not end within {LIMIT:?}");
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    let [stdout, stderr] =
        readers.map(|reader| reader.map_or_else(Vec::new, |reader| reader.join().unwrap()));
    let said = String::from_utf8_lossy(&stderr);
    assert!(!said.contains("panicked"), "{said}");
    Output { status, stdout, stderr }
}

fn drain(mut pipe: Box<dyn Read + Send>) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        pipe.read_to_end(&mut bytes).unwrap();
        bytes
    })
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[track_caller]
fn assert_ends(words: &[&[&str]], code: i32) -> (String, String) {
    let output = end_of(piped(words));
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "{words:?}\n{stdout}\n{stderr}");
    (stdout, stderr)
}

fn boot_ends_with_the_guests_exit_code() {
    let (console, summary) = assert_ends(&[&BOOT], 0);
    assert!(console.contains("\nPASS: passed="), "{console}");
    assert!(console.contains("command line: mode=boot"), "{console}");
    for part in ["the guest powered off after", "faults: ", " evictions", "of 6 MiB"] {
        assert!(summary.contains(part), "no {part:?} in: {summary}");
    }
    let quiet = assert_ends(&[&BOOT, &["--cmdline", "workload=seq pages=64", "--vcpus", "2"]], 0);
    assert!(quiet.0.contains("2 vCPUs"), "{}", quiet.0);
}

/// As in `gnomon boot | head -1`, with nobody left to read either stream.
fn boot_outlives_its_readers() {
    let mut child = piped(&[&BOOT]);
    let mut console = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    console.read_line(&mut line).unwrap();
    assert!(line.starts_with("Gnomon test guest"), "{line}");
    drop((console, child.stderr.take()));
    let output = end_of(child);
    let code = output.status.code();
    assert_eq!(code, Some(1), "the guest powered off, and its console could not be written");
}

fn boot_ends_at_a_signal() {
    for (signal, code) in [(Signal::SIGINT, 130), (Signal::SIGTERM, 143)] {
        let mut child = piped(&[&BOOT, &["--cmdline", "mode=stress"]]);
        let mut console = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        console.read_line(&mut line).unwrap();
        kill(Pid::from_raw(child.id().try_into().unwrap()), signal).unwrap();
        let output = end_of(child);
        assert_eq!(output.status.code(), Some(code));
        let summary = text(&output.stderr);
        assert!(summary.contains("ended by signal"), "{summary}");
        assert!(summary.contains("evictions"), "{summary}");
    }
}

/// A pipe without room.
fn full_pipe() -> (OwnedFd, OwnedFd) {
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).unwrap();
    while nix::unistd::write(&writer, &[b'x'; 4096]).is_ok() {}
    // As a shell's pipe is.
    fcntl(&writer, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
    (reader, writer)
}

/// Whether the process has a vCPU of which the system call in which it is (its number first) is as asked
/// for.
fn has_vcpu(id: u32, is_it: impl Fn(&str) -> bool) -> bool {
    let Ok(tasks) = fs::read_dir(format!("/proc/{id}/task")) else { return false };
    tasks.flatten().any(|task| {
        let told = |name| fs::read_to_string(task.path().join(name)).unwrap_or_default();
        told("comm").starts_with("vcpu") && is_it(&told("syscall"))
    })
}

/// Whether a vCPU of the process waits for room in its output: `poll` (7), not `write` (1).
fn a_vcpu_waits_to_print(id: u32) -> bool {
    has_vcpu(id, |call| call.starts_with("7 "))
}

fn boot_ends_though_nobody_reads() {
    let (_reader, writer) = full_pipe();
    let child = gnomon(&[&BOOT]).stdout(writer).stderr(Stdio::piped()).spawn().unwrap();
    let begun = Instant::now();
    while !a_vcpu_waits_to_print(child.id()) {
        assert!(begun.elapsed() < LIMIT, "no vCPU ever waited");
        std::thread::sleep(Duration::from_millis(5));
    }
    kill(Pid::from_raw(child.id().try_into().unwrap()), Signal::SIGTERM).unwrap();
    let output = end_of(child);
    let summary = text(&output.stderr);
    assert_eq!(output.status.code(), Some(143), "{summary}");
    assert!(summary.contains("ended by signal"), "{summary}");
    assert!(summary.contains("console could not be written"), "{summary}");
}

/// A run is not a success if nobody can have what it said.
fn output_that_cannot_be_written_is_told() {
    let quick = ["--cmdline", "workload=seq pages=64 ops=1"];
    let short = ["--duration", "1s", "--invalidate", "none"];
    for (words, lost) in [([&BOOT[..], &quick], true), ([&STRESS[..], &short], false)] {
        let full = fs::File::options().write(true).open("/dev/full").unwrap();
        let child = gnomon(&words).stdout(full).stderr(Stdio::piped()).spawn().unwrap();
        let output = end_of(child);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{words:?}: {said}");
        let sentence = "cannot write all of its output to standard output: No space left";
        assert_eq!(said.matches(sentence).count(), 1, "{words:?}: {said}");
        assert_eq!(said.contains("bytes of the guest's console"), lost, "{words:?}: {said}");
    }
    // Closed, not sent to where nobody reads it.
    let child = Command::new("sh")
        .args(["-c", r#"exec "$0" "$@" >&-"#])
        .arg(process::gnomon())
        .args([&BOOT[..], &quick].concat())
        .stderr(Stdio::piped())
        .spawn();
    let output = end_of(child.unwrap());
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("Bad file descriptor"), "{said}");
}

fn boot_removes_its_swap_file() {
    let folder = tempfile::tempdir().unwrap();
    let swap = folder.path().join("swap");
    let words = ["--swap-file", swap.to_str().unwrap(), "--swap-size", "32M"];
    let (_, summary) = assert_ends(&[&BOOT, &words], 0);
    assert!(!summary.contains("swap: 0 pages in"), "it was used: {summary}");
    assert!(!swap.exists());
}

fn report(path: &std::path::Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn stress_reports_a_clean_run() {
    let some_of_everything = [
        "/guest/verified",
        "/guest/writes",
        "/faults/read",
        "/host/swap_ins",
        "/storms/0/done",
        "/storms/1/done",
        "/fault_latency/all/p99_ns",
        "/memory/peak_resident_bytes",
    ]
    .map(|figure| (figure, 1));
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("report.json");
    let report = until_enough(2, |duration| {
        let words = ["--duration", duration, "--seed", "11", "--json", json.to_str().unwrap()];
        let (table, _) = assert_ends(&[&STRESS, &words], 0);
        assert!(table.contains("no violations") && table.contains("seed 11"), "{table}");
        let report = report(&json);
        assert_eq!(report["result"], "passed");
        assert_eq!(report["not_checked"], serde_json::json!([]));
        assert_eq!(report["config"]["seed"], 11);
        assert_eq!(report["violations"]["total"], 0);
        at_least(&report, &some_of_everything).map(|()| report)
    });
    let budget = 12 << 20;
    assert_eq!(report["memory"]["budget_bytes"], budget);
    assert!(report["memory"]["peak_resident_bytes"].as_u64().unwrap() <= budget);
    // 20,000 a second, as far as a busy host allows.
    let tried = report["storms"][0]["tried"].as_f64().unwrap();
    let worked = report["worked_seconds"].as_f64().unwrap();
    assert!(tried > 0.0 && tried <= 20_000.0 * worked + 64.0, "{tried} pages in {worked} s");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "only the report");
}

/// A frame that was taken from a page had its flush in between, and then another page.
fn a_trace_follows_a_page() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("trace.json");
    let words = ["boot", "--memory", "16M", "--host-memory", "6M", "--paging", "shadow", "--trace"];
    assert_ends(&[&words, &[file.to_str().unwrap()]], 0);
    let text = fs::read_to_string(&file).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let evicted = lines.iter().find(|line| line["message"] == "evict" && line["object"] == 0);
    let pfn = &evicted.expect("16M do not fit into 6M")["pfn"];
    let life: Vec<&str> = lines
        .iter()
        .filter(|line| line["pfn"] == *pfn)
        .map(|line| line["message"].as_str().unwrap())
        .collect();
    let mut rest = life.iter();
    for step in ["own", "install", "invalidate", "flush", "evict", "own"] {
        assert!(rest.any(|found| *found == step), "no {step} in its place: {life:?}");
    }
    assert!(lines.iter().any(|line| line["message"] == "shadow fault" && line["gva"].is_u64()));
}

fn stress_ends_at_a_signal() {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("report.json");
    let child = piped(&[&STRESS, &["--duration", "1h", "--json", json.to_str().unwrap()]]);
    // The signal has its handler before the guest is made; until then it would just end the child.
    let pid = child.id();
    while !has_vcpu(pid, |_| true) {
        std::thread::sleep(Duration::from_millis(10));
    }
    kill(Pid::from_raw(pid.try_into().unwrap()), Signal::SIGTERM).unwrap();
    let output = end_of(child);
    assert_eq!(output.status.code(), Some(143), "{}", text(&output.stderr));
    let told = text(&output.stdout);
    assert!(told.contains("INTERRUPTED by signal 15"), "{told}");
    assert!(told.contains("cut short by signal 15; not checked: the guest's last sweep"), "{told}");
    let report = report(&json);
    assert_eq!((&report["result"], &report["signal"]), (&"interrupted".into(), &15.into()));
    let not_checked = serde_json::json!(["last_sweep", "reverse_map", "statistics", "leftovers"]);
    assert_eq!(report["not_checked"], not_checked, "{report:#}");
}

fn stress_ends_at_the_first_violation() {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("report.json");
    let words =
        ["--duration", "100s", "--sabotage", "drop-dirty", "--json", json.to_str().unwrap()];
    let (table, notes) = assert_ends(&[&STRESS, &words], 1);
    assert!(notes.contains("sabotage drop-dirty: broken on purpose"), "{notes}");
    assert!(table.contains("sabotage drop-dirty was caught after"), "{table}");
    let report = report(&json);
    assert_eq!((&report["result"], &report["cut_short"]), (&"failed".into(), &true.into()));
    assert!(
        report["detection"]["seconds"].as_f64().unwrap() <= report["seconds"].as_f64().unwrap()
    );
    let first = report["violations"]["first"][0]["text"].as_str().unwrap();
    assert!(first.contains("guest frame 0x"), "names its page: {first}");
}

fn stress_names_a_corrupt_page() {
    let (table, _) =
        assert_ends(&[&STRESS, &["--duration", "100s", "--sabotage", "swap-corrupt"]], 1);
    assert!(table.contains("was caught after") && table.contains("checksums of swap"), "{table}");
    assert!(table.contains("does not hold what page 0x"), "{table}");
}

/// A guest that runs out of swap cannot go on: no oracle says so, the end of the run does.
fn stress_counts_a_lost_guest() {
    let (table, notes) = assert_ends(&[&STRESS, &["--duration", "100s", "--swap-size", "4M"]], 1);
    assert!(notes.contains("warning: --memory 48M is more than"), "{notes}");
    assert!(table.contains("violations: 1\n") && table.contains("swap is full"), "{table}");
    assert!(table.contains("FAILED after"), "{table}");
}

fn doctor_says_that_boot_works() {
    let (lines, _) = assert_ends(&[&["doctor"]], 0);
    assert!(lines.ends_with("gnomon boot can work here\n"), "{lines}");
    for line in lines.lines().rev().skip(1) {
        let status = line.split_whitespace().next().unwrap();
        assert!(["ok", "limited"].contains(&status), "{line}");
    }
    let (json, _) = assert_ends(&[&["doctor", "--json"]], 0);
    let diagnosis: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(diagnosis["can_boot"], true);
    assert_eq!(diagnosis["findings"].as_array().unwrap().len(), lines.lines().count() - 1);
}
