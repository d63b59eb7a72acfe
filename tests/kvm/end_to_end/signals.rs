//! The end that a signal asks for: whenever it comes, however large the guest, whatever hangs. What the
//! run then says, what it leaves behind, and that the next one can start in its place. (How long it
//! takes is measured by `.ci/ends`.)

use std::fs;
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use gnomon::peer::client::{Client, ClientConfig};
use gnomon::sys::signal::SECOND_AFTER;
use libtest_mimic::Trial;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::possible::direct_is_possible;
use crate::process::{MINUTES, Running, Stream, command, run, spawn, start};
use crate::trial::{kvm_trial, kvm_trial_or_ignore};

pub(crate) fn trials() -> Vec<Trial> {
    let each = |name: &str, body: fn(&'static str)| {
        ["shadow", "direct"].map(|paging| {
            kvm_trial_or_ignore(&format!("signals_{name}_{paging}"), move || {
                if paging == "direct" {
                    direct_is_possible()?;
                }
                body(paging);
                Ok(())
            })
        })
    };
    let boots = each("end_a_boot_of_64g", a_large_boot);
    let starts = each("before_the_guest_runs", before_the_guest_runs);
    let others = vec![
        kvm_trial("signals_cut_the_last_sweep_short", the_last_sweep),
        kvm_trial_or_ignore("signals_cut_the_last_sweep_short_direct", || {
            direct_is_possible()?;
            the_last_sweep_direct();
            Ok(())
        }),
        kvm_trial("signals_of_other_kinds_end_it_with_a_word", other_signals),
        kvm_trial("signals_the_second_one_ends_it_at_once", the_second_signal),
        kvm_trial("signals_one_that_comes_twice_counts_once", one_that_comes_twice),
        kvm_trial("signals_after_sigkill_the_next_one_starts", after_sigkill),
        kvm_trial("signals_end_what_waits_for_a_peer", what_waits_for_a_peer),
        kvm_trial("signals_end_what_nobody_reads", what_nobody_reads),
        kvm_trial("signals_end_a_peer_of_a_stopped_server", a_peer_of_a_stopped_server),
    ];
    boots.into_iter().chain(starts).chain(others).collect()
}

const ALL: [Signal; 4] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT];

/// Those that a run started from here listens to: under `nohup` a hangup is to end nothing.
fn heeded() -> impl Iterator<Item = Signal> {
    let own = fs::read_to_string("/proc/self/status").expect("our own status");
    let is_hangup_ignored = has(&own, "SigIgn:", Signal::SIGHUP);
    ALL.into_iter().filter(move |&signal| !(is_hangup_ignored && signal == Signal::SIGHUP))
}

/// What a run may leave behind, in a folder of its own.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary folder"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().expect("a plain path").to_owned()
    }

    /// Starts `stress` with all that makes files.
    fn stress(&self, arguments: &[&str]) -> Running {
        let mut running =
            start(&self.words(arguments).iter().map(String::as_str).collect::<Vec<_>>());
        if serves_peers(arguments) {
            running.wait_for(Stream::Stderr, "peers are served at ");
        }
        running
    }

    fn words(&self, arguments: &[&str]) -> Vec<String> {
        let made = ["--export-socket", "--swap-file", "--json"];
        let made = if serves_peers(arguments) { &made[..] } else { &made[1..] };
        let made = made.iter().flat_map(|&option| [option.to_owned(), self.text(&option[2..])]);
        let words = ["stress", "--host-memory", "12M", "--vcpus", "2"].map(str::to_owned);
        let given = arguments.iter().map(|&word| word.to_owned());
        words.into_iter().chain(made).chain(given).collect()
    }

    fn report(&self) -> Value {
        let report = fs::read(self.path("json")).expect("a report");
        serde_json::from_slice(&report).expect("JSON")
    }

    /// What is there.
    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.0.path()).expect("our own folder");
        let name = |entry: std::io::Result<fs::DirEntry>| entry.expect("an entry").file_name();
        entries.map(|entry| name(entry).into_string().expect("a plain name")).collect()
    }
}

/// With direct paging nobody is.
fn serves_peers(arguments: &[&str]) -> bool {
    !arguments.contains(&"direct")
}

/// Most of it is never touched; each signal ends it, and is told.
fn a_large_boot(paging: &'static str) {
    for signal in heeded() {
        let place = Place::new();
        let swap = place.text("swap");
        let memory = ["--memory", "64G", "--host-memory", "64M"];
        let mut running =
            start(&[&["boot", "--paging", paging, "--swap-file", &swap][..], &memory].concat());
        running.wait_for(Stream::Stdout, "work: ");
        assert_eq!(place.names(), Vec::<String>::new(), "swap has no name");
        running.signal(signal);
        let number = signal as i32;
        running.finish().with_code(128 + number).says(&[
            &format!("ended by signal {number}"),
            &format!("cut short by signal {number}; not checked: the reverse map (I3)"),
        ]);
    }
}

/// Waits until the process has taken a signal over, or is over itself, which is for the caller to find.
fn await_handler(running: &Running, signal: Signal) {
    await_status(running, |status| has(status, "SigCgt:", signal));
}

/// Waits until the process's `/proc/PID/status` is as wanted, or it is over.
fn await_status(running: &Running, is_wanted: impl Fn(&str) -> bool) {
    let is_over = |status: &str| status.lines().any(|line| line.starts_with("State:\tZ"));
    loop {
        let status =
            fs::read_to_string(format!("/proc/{}/status", running.id())).unwrap_or_default();
        if status.is_empty() || is_over(&status) || is_wanted(&status) {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Whether a signal is in one of the sets of a `/proc/PID/status`: those that have a handler, that are
/// ignored, or that are yet to be delivered.
fn has(status: &str, set: &str, signal: Signal) -> bool {
    let mask = status.lines().find_map(|line| line.strip_prefix(set));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    mask >> (signal as i32 - 1) & 1 == 1
}

fn before_the_guest_runs(paging: &str) {
    let running = start(&["boot", "--paging", paging, "--memory", "64G"]);
    await_handler(&running, Signal::SIGQUIT);
    running.signal(Signal::SIGTERM);
    running.finish().with_code(143).says(&["ended by signal 15"]);
}

/// Signals that would end the process without a word, as when its processor time is used up.
fn other_signals() {
    for signal in [Signal::SIGXCPU, Signal::SIGALRM, Signal::SIGUSR1, Signal::SIGUSR2] {
        let mut running = start(&["boot", "--memory", "16M", "--cmdline", "mode=stress"]);
        running.wait_for(Stream::Stdout, "Gnomon test guest");
        running.signal(signal);
        let code = 128 + signal as i32;
        let said = format!("the guest was ended by signal {}", signal as i32);
        running.finish().with_code(code).says(&[&said]);
    }
}

fn the_last_sweep() {
    cut_sweep(
        &["--memory", "4G"],
        Signal::SIGINT,
        &["last_sweep", "reverse_map", "statistics", "leftovers", "peers"],
    );
}

fn the_last_sweep_direct() {
    let arguments = ["--memory", "4G", "--paging", "direct"];
    let not_checked = ["last_sweep", "reverse_map", "statistics", "leftovers"];
    cut_sweep(&arguments, Signal::SIGTERM, &not_checked);
}

/// A sweep over 4 GiB takes far longer than the few seconds until it is told to be under way.
fn cut_sweep(arguments: &[&str], signal: Signal, not_checked: &[&str]) {
    let place = Place::new();
    let all = [arguments, &["--duration", "1s", "--workload", "zipf"]].concat();
    let mut running = place.stress(&all);
    running.wait_for(Stream::Stderr, "last sweep");
    running.signal(signal);
    let number = signal as i32;
    let finished = running.finish().with_code(128 + number);
    for part in [
        format!(
            "cut short by signal {number}; not checked: the guest's last sweep over its memory"
        ),
        format!("INTERRUPTED by signal {number}"),
    ] {
        assert!(finished.stdout.contains(&part), "no {part:?} in {finished:#?}");
    }
    let report = place.report();
    assert_eq!((&report["result"], &report["signal"]), (&"interrupted".into(), &number.into()));
    let told: Vec<&str> = report["not_checked"]
        .as_array()
        .expect("a list")
        .iter()
        .filter_map(Value::as_str)
        .collect();
    let mut sorted = [told.clone(), not_checked.to_vec()];
    sorted.iter_mut().for_each(|list| list.sort_unstable());
    assert_eq!(sorted[0], sorted[1], "{report:#}");
    let verified = report["guest"]["verified"].as_u64().expect("a number");
    assert!(verified < (4 << 30) / 4096, "not every page was looked at again: {verified}");
    assert_eq!(place.names(), ["json"]);
}

/// Two signals that are there at the same moment, as when `timeout` signals its child and its group:
/// nothing can come between them, and they ask for the same thing.
fn one_that_comes_twice() {
    let place = Place::new();
    let running = place.stress(&["--memory", "48M", "--duration", "1h"]);
    for signal in [Signal::SIGSTOP, Signal::SIGTERM, Signal::SIGINT, Signal::SIGCONT] {
        running.signal(signal);
    }
    let finished = running.finish();
    let code = finished.status.code().expect("it ended by itself");
    assert!([130, 143].contains(&code), "{finished:#?}");
    assert!(finished.stdout.contains(&format!("INTERRUPTED by signal {}", code - 128)));
    let report = place.report();
    assert_eq!(
        (&report["result"], &report["signal"]),
        (&"interrupted".into(), &(code - 128).into())
    );
    assert_eq!(place.names(), ["json"]);
}

fn the_second_signal() {
    let give_up = Instant::now() + MINUTES;
    while !is_ended_by_the_second_signal() {
        assert!(Instant::now() < give_up, "it always comes to its end by itself");
    }
}

/// False if the run was too far on its way to its end by then to need a second one.
fn is_ended_by_the_second_signal() -> bool {
    let place = Place::new();
    let running = place.stress(&["--memory", "48M", "--duration", "1h"]);
    running.signal(Signal::SIGTERM);
    await_status(&running, |status| !has(status, "ShdPnd:", Signal::SIGTERM));
    // Its time goes on, it does not.
    running.signal(Signal::SIGSTOP);
    std::thread::sleep(SECOND_AFTER);
    let was_at_work = place.names() == ["export-socket"];
    running.signal(Signal::SIGINT);
    running.signal(Signal::SIGCONT);
    let finished = running.finish();
    if finished.status.signal().is_none() {
        finished.with_code(143);
        return false;
    }
    assert_eq!(finished.status.signal(), Some(2), "by the signal itself: {finished:#?}");
    if !was_at_work {
        return false;
    }
    assert_eq!(finished.stdout, "");
    assert_eq!(place.names(), Vec::<String>::new());
    next_one(&place);
    true
}

/// A run in the place of the one before.
fn next_one(place: &Place) {
    let finished = place.stress(&["--memory", "48M", "--duration", "500ms"]).finish().with_code(0);
    assert!(finished.stdout.contains("PASSED"), "{finished:#?}");
    assert_eq!(place.names(), ["json"]);
}

fn after_sigkill() {
    let place = Place::new();
    let running = place.stress(&["--memory", "48M", "--duration", "1h"]);
    // As long as it lives nobody takes its place.
    let words = place.words(&["--memory", "48M", "--duration", "1s"]);
    let second = run(&words.iter().map(String::as_str).collect::<Vec<_>>()).with_code(2);
    second.says(&["another process serves this socket"]);
    assert_eq!(place.names(), ["export-socket"], "the other one's is still there");
    running.kill();
    assert_eq!(running.finish().status.signal(), Some(9));
    assert_eq!(place.names(), ["export-socket"], "which nobody could remove");
    next_one(&place);
}

/// A peer that holds pages, and then does not answer any more: whoever wants them waits for a minute.
fn what_waits_for_a_peer() {
    const LIMIT: Duration = Duration::from_secs(60);
    let place = Place::new();
    let limit = LIMIT.as_millis().to_string();
    let mut running =
        place.stress(&["--memory", "48M", "--duration", "1h", "--peer-limit", &limit]);
    let config = ClientConfig {
        duration: Duration::from_secs(3600),
        pages: 256,
        hold: Duration::from_secs(3600),
        seed: 1,
        // It has pages by then, and the next who wants one waits.
        hang_after: Some(20),
    };
    let client = Client::connect(&place.path("export-socket"), config).expect("it is served");
    let peer = std::thread::spawn(move || client.run(|| false));
    // The run is still looked after while everybody runs into it: until nobody gets on any more.
    let mut before = String::new();
    loop {
        let line = running.wait_for(Stream::Stderr, "accesses verified");
        let verified = verified_by(&line).to_owned();
        if verified == before {
            break;
        }
        before = verified;
    }
    running.signal(Signal::SIGTERM);
    running.finish().with_code(143);
    assert_eq!(place.names(), ["json"]);
    let report = place.report();
    assert_eq!(report["result"], "interrupted");
    let peers = |what: &str| report["peers"][what].as_u64().expect("a number");
    assert_eq!(peers("cut_off"), 0, "it had not had its minute: {report:#}");
    assert!(peers("sent") > peers("acknowledged"), "it was waited for: {report:#}");
    // It finds the connection closed, whatever was said last.
    let _ = peer.join().expect("the client does not panic");
}

/// The number that a line of progress tells.
fn verified_by(line: &str) -> &str {
    let before = line.split(" accesses verified").next();
    before.and_then(|text| text.rsplit(' ').next()).expect("a number")
}

/// Standard output is a pipe without room, so that the report of a run that is over cannot be told.
fn what_nobody_reads() {
    let place = Place::new();
    let (reader, writer) =
        nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).expect("a pipe");
    while nix::unistd::write(&writer, &[b'x'; 4096]).is_ok() {}
    fcntl(&writer, FcntlArg::F_SETFL(OFlag::empty())).expect("it blocks");
    let words = place.words(&["--memory", "48M", "--duration", "500ms"]);
    let mut command = command(&words.iter().map(String::as_str).collect::<Vec<_>>());
    command.stdin(Stdio::null()).stdout(writer).stderr(Stdio::piped());
    let running = spawn(command, MINUTES);
    let give_up = Instant::now() + MINUTES;
    // The report goes there first.
    while !place.path("json").exists() && Instant::now() < give_up {
        std::thread::sleep(Duration::from_millis(5));
    }
    running.signal(Signal::SIGQUIT);
    running.finish().with_code(131);
    assert_eq!(place.report()["result"], "passed");
    let mut left = Vec::new();
    let _ = fs::File::from(reader).read_to_end(&mut left);
    assert!(left.iter().all(|&byte| byte == b'x'), "nothing was written");
}

fn a_peer_of_a_stopped_server() {
    let place = Place::new();
    let server = place.stress(&["--memory", "48M", "--duration", "1h"]);
    let peer = start(&["peer", &place.text("export-socket"), "--duration", "1h"]);
    await_handler(&peer, Signal::SIGQUIT);
    server.signal(Signal::SIGSTOP);
    peer.signal(Signal::SIGTERM);
    peer.finish().with_code(143);
    server.signal(Signal::SIGCONT);
    server.signal(Signal::SIGTERM);
    server.finish().with_code(143);
}
