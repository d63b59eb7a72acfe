//! Runs that are ended from outside by signals, and outputs that go nowhere. (More of both: the
//! suite `kvm_cli`.)

use std::fs;
use std::process::Stdio;

use gnomon::abi;
use iced_x86::code_asm::*;
use libtest_mimic::Trial;
use nix::sys::signal::Signal;

use crate::guest::Guest;
use crate::process::{MINUTES, Stream, command, spawn, start};
use crate::trial::kvm_trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        kvm_trial("sigint_ends_a_boot", || a_signal_ends_a_boot(Signal::SIGINT, 130)),
        kvm_trial("sigterm_ends_a_boot", || a_signal_ends_a_boot(Signal::SIGTERM, 143)),
        kvm_trial("standard_output_full", standard_output_full),
        kvm_trial("standard_error_that_is_full_is_told_by_the_exit_code", standard_error_full),
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

fn standard_output_full() {
    let mut command = command(&["boot", "--memory", "16M", "--host-memory", "6M"]);
    let full = fs::OpenOptions::new().write(true).open("/dev/full").expect("/dev/full");
    command.stdin(Stdio::null()).stdout(full).stderr(Stdio::piped());
    let said = ["the guest powered off", "cannot write all of its output"];
    spawn(command, MINUTES).finish().with_code(1).says(&said);
}

/// The guest is through, but nothing could be said of it: a script goes by the exit code.
fn standard_error_full() {
    let mut command = command(&["boot", "--memory", "16M", "--host-memory", "6M"]);
    let full = fs::OpenOptions::new().write(true).open("/dev/full").expect("/dev/full");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(full);
    let mut child = command.spawn().expect("it starts");
    let mut stdout = String::new();
    std::io::Read::read_to_string(&mut child.stdout.take().expect("piped"), &mut stdout)
        .expect("text");
    assert!(stdout.contains("PASS: passed="), "{stdout}");
    assert_eq!(child.wait().expect("our own child").code(), Some(1));
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
}
