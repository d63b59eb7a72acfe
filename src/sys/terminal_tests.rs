//! Each test runs a child, the same test program with a variable set, on a terminal of its own: the
//! settings are the terminal's, and the handlers the process's.

use super::*;
use crate::signal::{self, StopNotice};
use nix::pty::openpty;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};

/// Makes a test the child, and says which way it is to end.
const WAY: &str = "GNOMON_TEST_TERMINAL";
const NAME: &str = "terminal::tests::the_terminal_is_as_before_whichever_way_a_process_ends";

fn is_raw(terminal: &OwnedFd) -> bool {
    let flags = termios::tcgetattr(terminal).unwrap().local_flags;
    let raw = !flags.contains(LocalFlags::ICANON);
    assert_eq!(raw, !flags.contains(LocalFlags::ECHO));
    assert_eq!(raw, !flags.contains(LocalFlags::ISIG));
    raw
}

fn child(way: &str, terminal: &OwnedFd) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", NAME, "--nocapture", "--test-threads=1"]).env(WAY, way);
    command.stdin(Stdio::from(terminal.try_clone().unwrap()));
    command.stdout(Stdio::piped()).stderr(Stdio::null());
    // A group that no terminal controls: what happens to it is not this test program's.
    command.process_group(0);
    command.spawn().unwrap()
}

/// Reads up to the line that says that the terminal is raw.
fn await_raw(child: &mut Child) {
    let mut seen = String::new();
    let stdout = child.stdout.as_mut().unwrap();
    while !seen.contains("now raw") {
        let mut byte = [0];
        assert_eq!(stdout.read(&mut byte).unwrap(), 1, "{seen}");
        seen.push(char::from(byte[0]));
    }
}

#[test]
fn the_terminal_is_as_before_whichever_way_a_process_ends() {
    if let Ok(way) = std::env::var(WAY) {
        run_child(&way);
        return;
    }
    use nix::sys::signal::Signal::{
        SIGABRT, SIGALRM, SIGHUP, SIGINT, SIGIO, SIGKILL, SIGPROF, SIGPWR, SIGQUIT, SIGSYS,
        SIGTERM, SIGTRAP, SIGUSR1, SIGUSR2, SIGVTALRM, SIGXCPU,
    };
    for way in ["drop", "panic", "nothing"] {
        let pty = openpty(None, None).unwrap();
        assert!(!is_raw(&pty.slave));
        let mut child = child(way, &pty.slave);
        await_raw(&mut child);
        assert!(is_raw(&pty.slave), "{way}");
        child.stdin.take();
        // What the child waits for.
        std::fs::File::from(pty.master.try_clone().unwrap()).write_all(b"x").unwrap();
        let status = child.wait().unwrap();
        // The last way is the fault that this test is there for: the value is forgotten.
        assert_eq!(is_raw(&pty.slave), way == "nothing", "{way}: {status}");
    }
    // By a fault of its own, as it might be.
    for signal in [SIGABRT, SIGTRAP, SIGSYS] {
        let pty = openpty(None, None).unwrap();
        let mut child = child("signal", &pty.slave);
        await_raw(&mut child);
        let id = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
        nix::sys::signal::kill(id, signal).unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(signal as i32));
        assert!(!is_raw(&pty.slave), "{signal}");
    }
    let others = [SIGXCPU, SIGPWR, SIGALRM, SIGVTALRM, SIGPROF, SIGUSR1, SIGUSR2, SIGIO];
    for signal in [SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGKILL].into_iter().chain(others) {
        let pty = openpty(None, None).unwrap();
        let mut child = child("signal", &pty.slave);
        await_raw(&mut child);
        assert!(is_raw(&pty.slave));
        let id = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
        nix::sys::signal::kill(id, signal).unwrap();
        // The child does not end by the first of them, and does nothing by itself.
        if signal != SIGKILL {
            let mut said = [0; 5];
            child.stdout.as_mut().unwrap().read_exact(&mut said).unwrap();
            assert!(!is_raw(&pty.slave), "{signal}");
            // It was noted before this.
            std::thread::sleep(signal::SECOND_AFTER);
            nix::sys::signal::kill(id, signal).unwrap();
        }
        let ends = if others.contains(&signal) { SIGTERM } else { signal };
        if ends != signal {
            // The second of those ends nobody.
            nix::sys::signal::kill(id, ends).unwrap();
        }
        let status = child.wait().unwrap();
        assert_eq!(status.signal(), Some(ends as i32));
        assert_eq!(is_raw(&pty.slave), signal == SIGKILL, "{signal}");
    }
}

fn run_child(way: &str) {
    // Also where this test program was told to ignore it (`nohup`), as its children then are.
    signal::set_action(libc::SIGHUP, libc::SIG_DFL, 0).unwrap();
    let stop = StopNotice::install().unwrap();
    let raw = Terminal::at_stdin().unwrap();
    assert!(raw.take().unwrap() && raw.take().unwrap());
    println!("now raw");
    match way {
        "signal" => {
            assert!(stop.wait(None).unwrap());
            print!("noted");
            std::io::stdout().flush().unwrap();
            assert!(!raw.take().unwrap(), "never again");
            std::mem::forget(raw);
            loop {
                std::thread::park();
            }
        }
        "panic" => {
            wait_for_key();
            panic!("on purpose");
        }
        "nothing" => {
            wait_for_key();
            std::mem::forget(raw);
        }
        _ => wait_for_key(),
    }
}

fn wait_for_key() {
    let mut key = [0];
    std::io::stdin().read_exact(&mut key).unwrap();
}
