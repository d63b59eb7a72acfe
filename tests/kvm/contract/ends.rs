//! Exit codes of `gnomon`, and the least machine.

use std::fs;

use gnomon::abi;
use iced_x86::code_asm::*;
use libtest_mimic::Trial;

use crate::guest::{CODE, Guest, exit, hypercall, power_off};
use crate::possible::direct_is_possible;
use crate::process::{Finished, run};
use crate::trial::{Ignore, kvm_trial, kvm_trial_or_ignore};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        kvm_trial("exit_codes_of_the_process", exit_codes_of_the_process),
        kvm_trial("the_least_machine", the_least_machine),
        kvm_trial_or_ignore("direct_entry", direct_entry),
    ]
}

fn boot(image: &[u8], options: &[&str]) -> Finished {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("kernel");
    fs::write(&file, image).expect("it can be written");
    let kernel = ["boot", "--kernel", file.to_str().expect("a plain path")];
    run(&[&kernel[..], options].concat())
}

fn exit_codes_of_the_process() {
    let machine = ["--memory", "16M"];
    // Errors and a 0 at the exit port have one code; the sentence tells them apart.
    boot(&Guest::bare(|a| a.ud2()).elf(), &machine).with_code(1).says(&["triple fault"]);
    let outside = Guest::bare(|a| a.mov(rax, qword_ptr(0x4000_0000u64)));
    boot(&outside.elf(), &machine).with_code(1).says(&["neither RAM nor the pinned window"]);
    let unsupported = Guest::bare(|a| a.mov(rax, dr7));
    boot(&unsupported.elf(), &machine).with_code(1).says(&["unsupported instruction"]);
    boot(&Guest::bare(|a| exit(a, 0)).elf(), &machine).with_code(1).says(&["exit code 1"]);
    boot(&Guest::bare(|a| exit(a, 0x80)).elf(), &machine).with_code(1).says(&["exit code 1"]);
    boot(&Guest::bare(power_off).elf(), &machine).with_code(0).says(&["powered off"]);
    boot(&Guest::bare(|a| a.hlt()).elf(), &machine).with_code(0).says(&["halted"]);
    // A violation that the guest reports turns 0 into 1, and leaves other codes alone.
    let violation = |end: fn(&mut CodeAssembler) -> crate::guest::Written| {
        Guest::bare(|a| {
            a.mov(edi, 1)?;
            hypercall(a, abi::HC_VIOLATION)?;
            end(a)
        })
    };
    boot(&violation(power_off).elf(), &machine).with_code(1).says(&["violations: 1"]);
    boot(&violation(|a| exit(a, 3)).elf(), &machine).with_code(7).says(&["violations: 1"]);
}

fn the_least_machine() {
    let image = Guest::bare(power_off).elf();
    boot(&image, &["--memory", "16M", "--host-memory", "4M"]).with_code(0);
    boot(&image, &["--memory", "15M", "--host-memory", "4M"]).with_code(2).says(&["16M"]);
    boot(&image, &["--memory", "16M", "--host-memory", "3M"]).with_code(2).says(&["4M"]);
    // The test guest runs in it as well, with as many vCPUs as there is room for.
    let machine = ["boot", "--memory", "16M", "--host-memory", "4M"];
    run(&[&machine[..], &["--cmdline", "pages=16"]].concat()).with_code(0);
    run(&[&machine[..], &["--vcpus", "200"]].concat()).with_code(2).says(&["200 vCPUs", "87M"]);
}

fn direct_entry() -> Result<(), Ignore> {
    direct_is_possible()?;
    // Bit i of the exit value is set if the i-th is not as it must be.
    let guest = Guest::bare(|a| {
        a.xor(ebx, ebx)?;
        a.mov(rsp, CODE + 0x1000)?;
        a.pushfq()?;
        a.pop(rcx)?;
        for (number, (segment, selector)) in
            [(cs, 0x10), (ss, 0x18), (ds, 0x18), (es, 0x18)].into_iter().enumerate()
        {
            let mut right = a.create_label();
            a.mov(eax, segment)?;
            a.cmp(eax, selector)?;
            a.je(right)?;
            a.or(ebx, 1 << number)?;
            a.set_label(&mut right)?;
        }
        let mut right = a.create_label();
        a.and(ecx, 0x3202)?;
        a.cmp(ecx, 2)?;
        a.je(right)?;
        a.or(ebx, 0x10)?;
        a.set_label(&mut right)?;
        a.mov(eax, ebx)?;
        a.mov(edx, u32::from(abi::PORT_EXIT))?;
        a.out(dx, al)
    });
    boot(&guest.elf(), &["--memory", "16M", "--paging", "direct"])
        .with_code(1)
        .says(&["exit code 1"]);
    Ok(())
}
