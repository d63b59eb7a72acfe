//! `gnomon stress --export-socket` with `gnomon peer` at the other end: pages of a guest in another
//! process, and what comes of processes that do not behave.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use libtest_mimic::Trial;
use serde_json::Value;
use tempfile::TempDir;

use crate::patience::{at_least, until_enough};
use crate::process::{Finished, Running, Stream, run, start};
use crate::trial::kvm_trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        kvm_trial("peers_come_and_go", peers_come_and_go),
        kvm_trial("peers_that_hang_are_cut_off", peers_that_hang_are_cut_off),
        kvm_trial("peers_that_are_killed_leave_nothing_behind", peers_that_are_killed),
        kvm_trial("peers_inject_hang", || injected("peer-hang@20", "200", "in time")),
        kvm_trial("peers_inject_kill", || {
            injected("peer-kill@20", PATIENT, "an injected fault dropped it");
        }),
        kvm_trial("peers_inject_what_never_strikes", what_never_strikes),
        Trial::test("peers_without_a_server", || {
            without_a_server();
            Ok(())
        }),
    ]
}

/// The longest limit there is, in milliseconds: no peer is cut off because the machine is busy.
const PATIENT: &str = "60000";
const EVERYTHING: &str = "reclaim,clean,migrate,merge,cow,zero,remap,free";

/// A run that serves peers.
struct Served {
    folder: TempDir,
    run: Running,
}

impl Served {
    fn start(arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = |name: &str| folder.path().join(name).to_str().expect("a plain path").to_owned();
        let (socket, json) = (path("socket"), path("report.json"));
        let all = ["stress", "--memory", "48M", "--host-memory", "12M", "--vcpus", "2"];
        let served = ["--invalidate", EVERYTHING, "--export-socket", &socket, "--json", &json];
        let mut run = start(&[&all[..], &served, arguments].concat());
        run.wait_for(Stream::Stderr, "peers are served at ");
        Self { folder, run }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    fn finish(self) -> (Finished, Value) {
        let finished = self.run.finish();
        assert!(!self.folder.path().join("socket").exists(), "the socket goes with the run");
        let report = fs::read(self.folder.path().join("report.json")).expect("a report");
        (finished, serde_json::from_slice(&report).expect("JSON"))
    }

    /// Ends well, whatever the peers did.
    fn passes(self) -> (Finished, Value) {
        let (finished, report) = self.finish();
        let finished = finished.with_code(0);
        assert_eq!(report["result"], "passed", "{report:#}");
        (finished, report)
    }
}

fn peer(socket: &Path, arguments: &[&str]) -> Running {
    start(&[&["peer", socket.to_str().expect("a plain path")], arguments].concat())
}

fn number(report: &Value, pointer: &str) -> u64 {
    let value = report.pointer(pointer).and_then(Value::as_u64);
    value.unwrap_or_else(|| panic!("no number at {pointer}: {report:#}"))
}

/// The figure in the row of a peer's table that begins so.
fn row(finished: &Finished, begin: &str) -> u64 {
    let line = finished.stdout.lines().find(|line| line.trim_start().starts_with(begin));
    let line = line.unwrap_or_else(|| panic!("no row {begin:?}: {finished:#?}"));
    let figure = line.trim_start()[begin.len()..].split_whitespace().next().expect("a figure");
    figure.replace(',', "").parse().expect("a number")
}

/// What a peer came to that was to end before the run does; the machine may be too slow for that.
fn before_the_end(peer: Running) -> Result<Finished, String> {
    let peer = peer.finish();
    let too_late = peer.stderr.contains("cannot connect")
        || peer.stderr.contains("the connection ended")
        || peer.stdout.contains("when the run ended");
    match too_late {
        true => Err(format!("the run was over before the peer was: {peer:#?}")),
        false => Ok(peer),
    }
}

fn peers_come_and_go() {
    until_enough(6, |duration| {
        let served = Served::start(&["--duration", duration, "--peer-limit", PATIENT]);
        let mode = served.socket().metadata().expect("a socket").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let stays = peer(&served.socket(), &["--duration", "1h", "--seed", "1"]);
        let visits: Result<Vec<()>, String> = ["2", "3"]
            .map(|seed| {
                let visitor = peer(&served.socket(), &["--duration", "1s", "--seed", seed]);
                let visitor = before_the_end(visitor)?.with_code(0);
                assert!(visitor.stdout.contains("PASSED after"), "{visitor:#?}");
                Ok(())
            })
            .into_iter()
            .collect();
        let stayed = stays.finish();
        let (finished, report) = served.passes();
        visits?;
        at_least(&report, &[("/peers/served", 3), ("/peers/lent", 100), ("/peers/sent", 11)])?;
        let stayed = stayed.with_code(0);
        assert!(stayed.stdout.contains("when the run ended: no violations"), "{stayed:#?}");
        let counts = ["pages mapped", "pages invalidated", "freed slots found empty"]
            .map(|figure| row(&stayed, figure));
        if counts[0] <= 100 || counts[1] <= 10 || counts[2] <= 10 {
            return Err(format!("{stayed:#?}"));
        }
        assert!(finished.stdout.contains("peers gave pages up within"), "{finished:#?}");
        assert_eq!((number(&report, "/peers/served"), number(&report, "/peers/cut_off")), (3, 0));
        let sent = number(&report, "/peers/sent");
        assert!(number(&report, "/peers/acknowledged") <= sent, "{report:#}");
        Ok(())
    });
}

fn peers_that_hang_are_cut_off() {
    until_enough(2, |duration| {
        let served = Served::start(&["--duration", duration, "--peer-limit", "200"]);
        let hangs = peer(&served.socket(), &["--hang-after", "5", "--duration", "1h"]);
        let hung = before_the_end(hangs);
        let (finished, report) = served.passes();
        let hung = hung?.with_code(1).says(&[
            "this peer was cut off: it did not acknowledge an invalidation in time",
            "what it had mapped was taken from it",
        ]);
        assert_eq!(row(&hung, "violations"), 0, "{hung:#?}");
        finished.says(&["peer 1 was cut off: it did not acknowledge"]);
        assert_eq!(number(&report, "/peers/cut_off"), 1);
        Ok(())
    });
}

fn peers_that_are_killed() {
    until_enough(2, |duration| {
        let served = Served::start(&["--duration", duration, "--peer-limit", PATIENT]);
        for _ in 0..3 {
            let victim = peer(&served.socket(), &["--duration", "1h"]);
            // Time to connect and to get pages, on most machines.
            std::thread::sleep(std::time::Duration::from_millis(700));
            victim.kill();
            victim.finish();
        }
        let (finished, report) = served.passes();
        at_least(&report, &[("/peers/cut_off", 3)])?;
        finished.says(&["peer 3 was cut off: it hung up without a word"]);
        assert_eq!((number(&report, "/peers/served"), number(&report, "/peers/cut_off")), (3, 3));
        Ok(())
    });
}

/// Where `limit` must not be what cuts a peer off, it is [`PATIENT`].
fn injected(item: &str, limit: &str, why: &str) {
    until_enough(2, |duration| {
        let arguments = ["--duration", duration, "--peer-limit", limit, "--inject", item];
        let served = Served::start(&arguments);
        let victim = peer(&served.socket(), &["--duration", "1h"]);
        let victim = before_the_end(victim);
        let (finished, report) = served.finish();
        if finished.stdout.contains(" never struck: ") {
            return Err(format!("{finished:#?}"));
        }
        let finished = finished.with_code(0);
        assert_eq!(report["result"], "passed", "{report:#}");
        victim?.with_code(1).says(&["this peer was cut off: ", why]);
        let name = report.pointer("/config/inject/0").and_then(Value::as_str).expect("an item");
        assert!(finished.stdout.contains(&format!("injected {name}: struck ")), "{finished:#?}");
        finished.says(&["peer 1 was cut off: ", why]);
        assert_eq!(number(&report, "/injected/pages/lost"), 0);
        assert_eq!(number(&report, "/violations/total"), 0);
        Ok(())
    });
}

fn what_never_strikes() {
    let served = Served::start(&["--duration", "1s", "--inject", "peer-kill"]);
    let (finished, _) = served.finish();
    let said = "--inject peer-kill@1 never struck: there were 0 invalidations sent to peers";
    assert!(finished.with_code(1).stdout.contains(said));
}

fn without_a_server() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("nobody");
    let path = path.to_str().expect("a plain path");
    run(&["peer", path])
        .with_code(1)
        .says(&["cannot connect", "gnomon stress with --export-socket"]);
    // Somebody, but no server of pages: it hangs up at once.
    let listener = std::os::unix::net::UnixListener::bind(path).expect("a socket");
    let deaf = std::thread::spawn(move || drop(listener.accept()));
    run(&["peer", path]).with_code(1).says(&["the connection ended without a word"]);
    deaf.join().expect("it accepts");
}
