//! `--paging direct`: the same guests, on a machine whose privileged mode and page tables are theirs.

use std::fs;

use iced_x86::code_asm::*;
use libtest_mimic::Trial;
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::guest::{CODE, Guest, exit};
use crate::patience::{at_least, until_enough};
use crate::possible::direct_is_possible;
use crate::process::{Finished, Stream, run, start};
use crate::trial::{Ignore, kvm_trial_or_ignore};

pub(crate) fn trials() -> Vec<Trial> {
    let trial = |name: &str, body: fn()| {
        kvm_trial_or_ignore(name, move || -> Result<(), Ignore> {
            direct_is_possible()?;
            body();
            Ok(())
        })
    };
    vec![
        trial("direct_boot", boots),
        trial("direct_stress", stress_finds_nothing),
        trial("direct_interrupted_calls", interrupted_calls_cost_nothing),
        trial("direct_halt", a_halted_machine_is_over),
        trial("direct_exit_codes_and_strings", ports_take_strings),
        trial("direct_triple_fault", a_triple_fault_is_told),
        trial("direct_no_memory", where_there_is_no_memory),
        trial("direct_signal", a_signal_ends_it),
        trial("direct_lost_page", a_page_that_cannot_be_had_ends_it),
    ]
}

/// Boots a guest of so much memory.
fn boot(guest: &Guest, vcpus: &str) -> Finished {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("kernel");
    fs::write(&file, guest.elf()).expect("it can be written");
    let kernel = file.to_str().expect("a plain path");
    let machine = ["boot", "--paging", "direct", "--memory", "16M", "--vcpus", vcpus];
    run(&[&machine[..], &["--kernel", kernel]].concat())
}

fn boots() {
    for vcpus in ["1", "2"] {
        let memory = ["--memory", "64M", "--host-memory", "16M", "--vcpus", vcpus];
        let finished = run(&[&["boot", "--paging", "direct"], &memory[..]].concat()).with_code(0);
        let said = &finished.stdout;
        assert!(said.contains("PASS: passed=") && !said.contains("FAIL"), "{finished:#?}");
        assert!(said.contains("PASS paging: "), "its own page tables: {finished:#?}");
        finished.says(&["the guest powered off", "of the window", "frames: at most "]);
    }
}

fn number(report: &Value, pointer: &str) -> u64 {
    let value = report.pointer(pointer).and_then(Value::as_u64);
    value.unwrap_or_else(|| panic!("no number at {pointer}: {report:#}"))
}

/// Runs with these options, without a violation and within the ration, until each of the counts is
/// above 0.
fn is_clean(options: &[&str], counts: &[&str]) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let json = folder.path().join("report.json");
    let report = ["stress", "--paging", "direct", "--json", json.to_str().expect("a plain path")];
    let machine = ["--memory", "96M", "--host-memory", "24M", "--vcpus", "2"];
    let floors: Vec<(&str, u64)> = counts.iter().map(|&count| (count, 1)).collect();
    until_enough(4, |duration| {
        let words = [&report[..], &machine, &["--duration", duration], options].concat();
        let finished = run(&words).with_code(0);
        assert!(finished.stdout.contains("PASSED"), "{finished:#?}");
        let report: Value =
            serde_json::from_slice(&fs::read(&json).expect("a report")).expect("JSON");
        assert_eq!(report["config"]["paging"], "direct");
        assert_eq!(number(&report, "/violations/total"), 0, "{report:#}");
        let budget = number(&report, "/config/host_memory_bytes");
        for peak in ["/memory/peak_frame_bytes", "/memory/peak_resident_bytes"] {
            let bytes = number(&report, peak);
            assert!(bytes > 0 && bytes <= budget, "{peak}: {bytes} of {budget} bytes");
        }
        for storm in report["storms"].as_array().expect("a list") {
            assert!(storm["broken"].is_null(), "{storm:#}");
        }
        at_least(&report, &floors)
    });
}

fn stress_finds_nothing() {
    is_clean(
        &[],
        &[
            "/guest/verified",
            "/guest/paging_ops",
            "/guest/dma_ops",
            "/host/evictions",
            "/host/swap_ins",
            "/host/cleans",
            "/host/pages_freed",
            "/direct/installs",
            "/direct/upgrades",
            "/direct/invalidated",
            "/direct/write_protected",
            "/direct/removed",
            "/iotlb/invalidated",
            "/storms/0/done",
            "/storms/1/done",
        ],
    );
}

/// The window's own calls raise events, and must not be made twice.
fn interrupted_calls_cost_nothing() {
    is_clean(
        &["--inject", "eintr=0.3,short-write@1/9"],
        &["/direct/aged_zaps", "/injected/items/0/struck", "/injected/items/1/struck"],
    );
}

fn a_halted_machine_is_over() {
    // The second vCPU is never started.
    let guest = Guest::bare(|a| a.hlt());
    boot(&guest, "2").with_code(0).says(&["every vCPU halted"]);
}

fn ports_take_strings() {
    const TEXT: &[u8] = b"by the string\n";
    let at = CODE + 0x800;
    let guest = Guest::bare(|a| {
        a.mov(rsi, at)?;
        a.mov(ecx, u32::try_from(TEXT.len()).expect("short"))?;
        a.mov(edx, u32::from(gnomon::abi::PORT_SERIAL))?;
        a.rep().outsb()?;
        exit(a, 20)
    });
    let finished = boot(&guest.with(at, TEXT.to_vec()), "1").with_code(41);
    assert!(finished.stdout.contains("by the string"), "{finished:#?}");
}

fn a_triple_fault_is_told() {
    // There is no IDT.
    let guest = Guest::bare(|a| a.ud2());
    boot(&guest, "1").with_code(1).says(&["triple fault", "vCPU 0 at RIP"]);
}

fn where_there_is_no_memory() {
    for write in [false, true] {
        let guest = Guest::bare(|a| {
            a.mov(rbx, 0x3000_0000u64)?;
            if write { a.mov(qword_ptr(rbx), rax) } else { a.mov(rax, qword_ptr(rbx)) }
        });
        boot(&guest, "1").with_code(1).says(&["guest-physical 0x30000000", "neither RAM"]);
    }
}

fn a_signal_ends_it() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let kernel = folder.path().join("kernel");
    let endless = Guest::bare(|a| {
        let mut forever = a.create_label();
        a.mov(edx, u32::from(gnomon::abi::PORT_SERIAL))?;
        for byte in *b"here\n" {
            a.mov(eax, u32::from(byte))?;
            a.out(dx, al)?;
        }
        a.set_label(&mut forever)?;
        a.jmp(forever)
    });
    fs::write(&kernel, endless.elf()).expect("it can be written");
    let swap = folder.path().join("swap");
    let (kernel, swap_file) = (kernel.to_str().expect("plain"), swap.to_str().expect("plain"));
    let machine = ["boot", "--paging", "direct", "--memory", "16M", "--vcpus", "2"];
    let mut running =
        start(&[&machine[..], &["--kernel", kernel, "--swap-file", swap_file]].concat());
    running.wait_for(Stream::Stdout, "here");
    running.signal(Signal::SIGTERM);
    running.finish().with_code(143).says(&["ended by signal 15"]);
    assert!(!swap.exists(), "the swap file is gone");
}

/// The vCPU waits in the kernel for a page that will not come.
fn a_page_that_cannot_be_had_ends_it() {
    let machine = ["boot", "--paging", "direct", "--memory", "64M", "--host-memory", "16M"];
    let finished = run(&[&machine[..], &["--inject", "swap-read=EIO@1+"]].concat()).with_code(1);
    let finished = finished.says(&["direct paging: guest frame 0x", "cannot be brought in"]);
    assert!(!finished.stderr.contains("I3: "), "{finished:#?}");
}
