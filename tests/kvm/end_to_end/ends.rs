//! Runs that are ended from outside: by signals, and by readers who have seen enough.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::time::Duration;

use gnomon::abi;
use iced_x86::code_asm::*;
use libtest_mimic::Trial;
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::guest::Guest;
use crate::process::{MINUTES, Stream, command, spawn, start};
use crate::trial::kvm_trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        kvm_trial("sigint_ends_a_boot", || a_signal_ends_a_boot(Signal::SIGINT, 130)),
        kvm_trial("sigterm_ends_a_boot", || a_signal_ends_a_boot(Signal::SIGTERM, 143)),
        kvm_trial("sigint_ends_a_stress_run", sigint_ends_a_stress_run),
        kvm_trial("standard_output_closed_early", standard_output_closed_early),
        kvm_trial("standard_output_full", standard_output_full),
        kvm_trial("standard_error_closed_early", standard_error_closed_early),
    ]
}

/// A guest that prints a line and then loops for ever.
fn endless() -> Guest {
    Guest::bare(|a| {
        let mut forever = a.create_label();
        a.mov(edx, u32::from(abi::PORT_SERIAL))?;
        for byte in *b"here\n" {
            a.mov(eax, u32::from(byte))?;
            a.out(dx, al)?;
        }
        a.cli()?;
        a.set_label(&mut forever)?;
        a.jmp(forever)
    })
}

fn a_signal_ends_a_boot(signal: Signal, code: i32) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let kernel = folder.path().join("kernel");
    fs::write(&kernel, endless().elf()).expect("it can be written");
    let swap = folder.path().join("swap");
    let (kernel, swap_file) = (kernel.to_str().expect("plain"), swap.to_str().expect("plain"));
    let arguments =
        ["boot", "--memory", "16M", "--kernel", kernel, "--swap-file", swap_file, "--vcpus", "2"];
    let mut running = start(&arguments);
    running.wait_for(Stream::Stdout, "here");
    running.signal(signal);
    let said = format!("ended by signal {}", signal as i32);
    running.finish().with_code(code).says(&[&said, "faults: "]);
    assert!(!swap.exists(), "the swap file is gone");
}

fn sigint_ends_a_stress_run() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let json = folder.path().join("report.json");
    let file = json.to_str().expect("a plain path");
    let arguments =
        ["stress", "--memory", "48M", "--host-memory", "16M", "--duration", "10m", "--json", file];
    let mut running = start(&arguments);
    running.wait_for(Stream::Stderr, "accesses verified");
    running.signal(Signal::SIGINT);
    let finished = running.finish().with_code(130);
    assert!(finished.stdout.contains("signal 2"), "{finished:#?}");
    let report: Value = serde_json::from_slice(&fs::read(&json).expect("a report")).expect("JSON");
    assert_eq!(report["result"], "interrupted");
    assert_eq!(report["signal"], 2);
    assert_eq!(report["violations"]["total"], 0);
    let seconds = report["seconds"].as_f64().expect("a number");
    assert!(seconds < 120.0, "its last sweep took {seconds} s");
}

/// `gnomon boot | head -1`.
fn standard_output_closed_early() {
    let mut command = command(&["boot", "--memory", "32M", "--host-memory", "16M"]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("it starts");
    let mut first = String::new();
    let stdout = child.stdout.take().expect("a pipe");
    BufReader::with_capacity(64, stdout).read_line(&mut first).expect("a line");
    assert!(first.contains("Gnomon test guest"), "{first:?}");
    // The reader is gone; the guest goes on and ends as it always does.
    let output = child.wait_with_output().expect("our own child");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    assert!(stderr.contains("the guest powered off"), "{stderr}");
    assert!(stderr.contains("could not be written to standard output"), "{stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
}

fn standard_output_full() {
    let mut command = command(&["boot", "--memory", "32M", "--host-memory", "16M"]);
    let full = fs::OpenOptions::new().write(true).open("/dev/full").expect("/dev/full");
    command.stdin(Stdio::null()).stdout(full).stderr(Stdio::piped());
    spawn(command, MINUTES).finish().with_code(0).says(&["the guest powered off"]);
}

fn standard_error_closed_early() {
    let mut command = command(&[
        "stress",
        "--memory",
        "32M",
        "--host-memory",
        "16M",
        "--duration",
        "1s",
        "--vcpus",
        "1",
    ]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("it starts");
    drop(child.stderr.take());
    let running = child.wait_with_output().expect("our own child");
    assert_eq!(running.status.code(), Some(0));
    let stdout = String::from_utf8_lossy(&running.stdout);
    assert!(stdout.contains("PASSED"), "{stdout}");
    let _ = Duration::ZERO;
}
