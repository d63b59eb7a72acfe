//! `gnomon boot --kernel`: guests of others.

use std::fs;
use std::process::Command;

use iced_x86::code_asm::*;
use libtest_mimic::Trial;

use crate::guest::{CODE, Guest, exit};
use crate::process::{find_program, run};
use crate::trial::{Needs, kvm_trial, kvm_trial_with};

/// Source of the example, embedded so that it is there where the repository is not.
const HELLO: &str = include_str!("../../../guest/examples/hello.S");

pub(crate) fn trials() -> Vec<Trial> {
    const CC: &[Needs] = &[c_compiler];
    vec![
        kvm_trial_with("kernel_hello", CC, kernel_hello),
        kvm_trial("kernel_exit_codes", kernel_exit_codes),
        kvm_trial("kernel_that_triple_faults", kernel_that_triple_faults),
        kvm_trial("kernel_with_an_unknown_instruction", kernel_with_an_unknown_instruction),
        kvm_trial("kernel_that_reaches_out", kernel_that_reaches_out),
        kvm_trial("kernels_that_are_none", kernels_that_are_none),
    ]
}

fn c_compiler() -> Result<(), String> {
    match find_program("cc") {
        Some(_) => Ok(()),
        None => Err("no C compiler: there is no cc in PATH".to_owned()),
    }
}

/// Writes the guest to a file and boots it.
fn boot(guest: &[u8]) -> crate::process::Finished {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("kernel");
    fs::write(&file, guest).expect("it can be written");
    run(&["boot", "--memory", "16M", "--kernel", file.to_str().expect("a plain path")])
}

fn kernel_hello() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    fs::write(folder.path().join("hello.S"), HELLO).expect("it can be written");
    // As its own comment says to build it.
    let line = HELLO.lines().find_map(|line| line.strip_prefix(" *   cc "));
    let mut words = line.expect("a command line in the comment").split_whitespace();
    let built = Command::new("cc").current_dir(folder.path()).args(&mut words).status();
    assert!(built.expect("cc runs").success());
    let hello = folder.path().join("hello");
    let finished = run(&["boot", "--kernel", hello.to_str().expect("a plain path")]).with_code(0);
    assert_eq!(finished.stdout, "Hello from a guest of Gnomon\r\n");
    finished.says(&["the guest powered off"]);
}

fn kernel_exit_codes() {
    for (value, code) in [(0, 1), (1, 3), (20, 41), (0x7f, 255)] {
        boot(&Guest::bare(|a| exit(a, value)).elf()).with_code(code).says(&["exit code"]);
    }
}

fn kernel_that_triple_faults() {
    let finished = boot(&Guest::bare(|a| a.ud2()).elf()).with_code(1);
    let rip = format!("RIP {CODE:#x}");
    finished.says(&["gnomon: the guest was ended: vCPU 0 at", &rip, "triple fault"]);
}

fn kernel_with_an_unknown_instruction() {
    let finished = boot(&Guest::bare(|a| a.mov(dr7, rax)).elf()).with_code(1);
    finished.says(&["unsupported instruction `mov dr7,rax`", "RIP 0x200000"]);
}

fn kernel_that_reaches_out() {
    let guest = Guest::bare(|a| {
        a.mov(rax, 0x12_3456_7000u64)?;
        a.mov(rbx, qword_ptr(rax))
    });
    boot(&guest.elf()).with_code(1).says(&["guest-physical 0x1234567000", "RIP 0x20000"]);
}

fn kernels_that_are_none() {
    let elf = Guest::bare(|a| a.hlt()).elf();
    let cases: [(&[u8], &str); 4] = [
        (b"", "is empty"),
        (b"#!/bin/sh\n", "nor an ELF file (it begins with"),
        (&elf[..70], "kernel image"),
        (&elf[..elf.len() - 1], "the file ends"),
    ];
    for (bytes, part) in cases {
        let finished = boot(bytes).with_code(2).says(&[part]);
        assert_eq!(finished.stderr.lines().count(), 1, "{finished:#?}");
        assert_eq!(finished.stdout, "");
    }
    run(&["boot", "--kernel", "/no/such/file"]).with_code(2).says(&["/no/such/file"]);
    run(&["boot", "--kernel", "/"]).with_code(2);
}
