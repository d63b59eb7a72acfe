//! Each test runs a child, the same test program with variables set, on a terminal of its own: the
//! settings are the terminal's, handlers and jobs the process's.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::pty::openpty;
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{LocalFlags, tcgetattr};
use nix::unistd::{Pid, tcgetpgrp};

use super::*;

/// Makes a test the child, which writes down here what happens to it.
const FOLDER: &str = "GNOMON_TEST_CONSOLE";
/// How many keys may wait in it.
const AHEAD: &str = "GNOMON_TEST_CONSOLE_AHEAD";
const NAME: &str = "cli::linux::console::tests::a_shell_stops_it_and_lets_it_go_on";
/// Until something that must happen is given up.
const GIVE_UP: Duration = Duration::from_secs(120);

/// What the child does: it shows that it runs, and what it gets.
fn run_child(folder: &Path) {
    let log =
        |name: &str| OpenOptions::new().create(true).append(true).open(folder.join(name)).unwrap();
    fs::write(folder.join("pid"), std::process::id().to_string()).unwrap();
    let (keys, mut beats) = (log("keys"), log("beats"));
    let go = folder.join("go");
    let ahead = std::env::var(AHEAD).map_or(KEYS_AHEAD, |ahead| ahead.parse().unwrap());
    // A guest that reads nothing until it may.
    let send = move |some: &[u8]| {
        while !go.exists() {
            std::thread::sleep(Duration::from_millis(5));
        }
        (&keys).write_all(some).is_ok()
    };
    let console = Console::open_with(send, ahead).unwrap();
    while !console.is_ended() {
        beats.write_all(b".").unwrap();
        std::thread::sleep(Duration::from_millis(10));
    }
    drop(console);
    fs::write(folder.join("ended"), "").unwrap();
}

/// The test's end of a terminal, and what the child writes down.
struct Rig {
    folder: tempfile::TempDir,
    keyboard: File,
    screen: OwnedFd,
    child: Child,
}

impl Rig {
    /// A child with a terminal as its standard input.
    fn new(make: impl FnOnce(&Path) -> Command) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let pty = openpty(None, None).unwrap();
        let mut command = make(folder.path());
        let end = || Stdio::from(pty.slave.try_clone().unwrap());
        command.stdin(end()).stdout(end()).stderr(end()).env(FOLDER, folder.path());
        let child = command.spawn().unwrap();
        let keyboard = File::from(pty.master.try_clone().unwrap());
        let mut reader = File::from(pty.master);
        // What is said there is nobody's concern, but has to go somewhere.
        std::thread::spawn(move || while reader.read(&mut [0; 4096]).is_ok_and(|read| read > 0) {});
        Self { folder, keyboard, screen: pty.slave, child }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.file(name)).unwrap_or_default()
    }

    fn go(&self) {
        fs::write(self.file("go"), "").unwrap();
    }

    #[track_caller]
    fn until(&self, what: &str, mut is_so: impl FnMut(&Self) -> bool) {
        let begun = Instant::now();
        while !is_so(self) {
            let keys = String::from_utf8_lossy(&self.read("keys")).into_owned();
            assert!(begun.elapsed() < GIVE_UP, "not seen: {what}; keys {keys:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[track_caller]
    fn type_in(&self, keys: &[u8]) {
        (&self.keyboard).write_all(keys).unwrap();
    }

    /// Shells have settings of their own to edit lines; this is one that they leave alone.
    fn is_raw(&self) -> bool {
        !tcgetattr(&self.screen).unwrap().local_flags.contains(LocalFlags::IEXTEN)
    }

    fn pid(&self) -> Option<Pid> {
        String::from_utf8(self.read("pid")).ok()?.parse().ok().map(Pid::from_raw)
    }

    fn signal(&self, signal: Signal) {
        kill(self.pid().unwrap(), signal).unwrap();
    }

    fn is_stopped(&self) -> bool {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid().unwrap())).unwrap();
        stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T'))
    }

    /// The shell has the terminal.
    fn is_at_prompt(&self) -> bool {
        let shell = i32::try_from(self.child.id()).unwrap();
        tcgetpgrp(&self.keyboard).unwrap() == Pid::from_raw(shell)
    }

    #[track_caller]
    fn await_keys(&self, keys: &[u8]) {
        self.until("keys", |rig| rig.read("keys").ends_with(keys));
    }

    /// That it runs.
    #[track_caller]
    fn await_beats(&self) {
        let before = self.read("beats").len();
        self.until("that it runs", |rig| rig.read("beats").len() > before + 5);
    }
}

fn program(command: &mut Command) -> &mut Command {
    command.args(["--exact", NAME, "--nocapture", "--test-threads=1"])
}

#[test]
fn a_shell_stops_it_and_lets_it_go_on() {
    if let Some(folder) = std::env::var_os(FOLDER) {
        run_child(Path::new(&folder));
        return;
    }
    for shell in [&["sh", "-i"][..], &["bash", "--norc", "--noediting", "-i"]] {
        let is_there = Command::new(shell[0]).args(["-c", "exit"]).status().is_ok();
        assert!(is_there || shell[0] != "sh");
        if is_there {
            under_shell(shell);
        }
    }
}

fn under_shell(shell: &[&str]) {
    let mut rig = Rig::new(|_| {
        let mut command = Command::new("setsid");
        command.arg("-c").args(shell).env_remove("ENV");
        command
    });
    rig.go();
    let program = std::env::current_exe().unwrap();
    let job = format!("{} --exact {NAME} --nocapture --test-threads=1", program.display());

    rig.type_in(format!("{job}\n").as_bytes());
    rig.until("raw", Rig::is_raw);
    rig.type_in(b"a\x03");
    rig.await_keys(b"a\x03");

    // Stopped by a signal that can be caught: the shell has its terminal back.
    rig.signal(Signal::SIGTSTP);
    rig.until("a prompt", Rig::is_at_prompt);
    assert!(rig.is_stopped() && !rig.is_raw(), "{shell:?}");
    rig.type_in(b"fg\n");
    rig.until("raw again", Rig::is_raw);
    rig.type_in(b"b\x1a\x03");
    rig.await_keys(b"b\x1a\x03");

    // By one that cannot.
    rig.signal(Signal::SIGSTOP);
    rig.until("a prompt", Rig::is_at_prompt);
    rig.type_in(b"fg\n");
    rig.await_beats();
    rig.until("raw after SIGSTOP", Rig::is_raw);
    rig.type_in(b"c\x03");
    rig.await_keys(b"c\x03");

    // In the background it goes on and leaves the terminal alone.
    rig.signal(Signal::SIGTSTP);
    rig.until("a prompt", Rig::is_at_prompt);
    rig.type_in(b"bg\n");
    rig.await_beats();
    assert!(!rig.is_stopped() && !rig.is_raw() && rig.is_at_prompt(), "{shell:?}");
    rig.type_in(b"fg\n");
    rig.until("raw from the background", Rig::is_raw);
    rig.type_in(b"d\x03");
    rig.await_keys(b"d\x03");
    rig.type_in(b"\x01x");
    rig.until("the end", |rig| rig.file("ended").exists());
    rig.until("a prompt", Rig::is_at_prompt);
    assert!(!rig.is_raw());
    fs::remove_file(rig.file("ended")).unwrap();

    // Begun in the background.
    rig.type_in(format!("{job} &\n").as_bytes());
    rig.await_beats();
    assert!(!rig.is_stopped() && !rig.is_raw() && rig.is_at_prompt(), "{shell:?}");
    rig.type_in(b"fg\n");
    rig.until("raw", Rig::is_raw);
    rig.type_in(b"e\x03");
    rig.await_keys(b"e\x03");
    rig.type_in(b"\x01x");
    rig.until("the end", |rig| rig.file("ended").exists());
    rig.until("a prompt", Rig::is_at_prompt);
    assert!(!rig.is_raw(), "as before the first time");
    rig.type_in(b"exit\n");
    rig.child.wait().unwrap();
}

/// A child on a terminal that no shell controls, with so many keys ahead of a guest that reads nothing.
fn held(ahead: usize) -> Rig {
    let rig = Rig::new(|_| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        program(&mut command).env(AHEAD, ahead.to_string());
        command
    });
    rig.until("raw", Rig::is_raw);
    rig
}

#[test]
fn nothing_is_lost_however_fast_it_comes() {
    let mut rig = held(1000);
    fcntl(&rig.keyboard, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    let keys: Vec<u8> = (0..600_000u32).map(|n| b'!' + (n % 93).to_le_bytes()[0]).collect();
    let mut rest = &keys[..];
    let mut was_held = false;
    while !rest.is_empty() {
        match (&rig.keyboard).write(rest) {
            Ok(taken) => rest = &rest[taken..],
            Err(error) => {
                assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                if !was_held {
                    was_held = true;
                    rig.go();
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
    assert!(was_held, "the terminal holds back who types");
    rig.until("all keys", |rig| rig.read("keys").len() >= keys.len());
    assert_eq!(rig.read("keys"), keys);
    rig.type_in(b"\x01x");
    assert!(rig.child.wait().unwrap().success());
    assert!(!rig.is_raw());
}

#[test]
fn it_is_ended_by_keys_behind_others_that_the_guest_does_not_read() {
    let mut rig = held(KEYS_AHEAD);
    rig.type_in(&[b'.'; 200_000]);
    rig.type_in(b"\x01x");
    assert!(rig.child.wait().unwrap().success());
    assert!(rig.read("keys").is_empty() && !rig.is_raw());
}
