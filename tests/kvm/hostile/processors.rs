//! Several vCPUs: halts, starts, loops that nothing but a kill ends, storms of CR3 loads, and pages
//! that several of them fault on at once.

use std::time::{Duration, Instant};

use gnomon::abi;
use gnomon::vmm::{Outcome, VcpuState, Vm};
use iced_x86::code_asm::*;
use libtest_mimic::Trial;

use crate::guest::{FREE, Guest, Written, attempt, exit, hypercall, power_off, report};
use crate::machine::{Ended, Machine};
use crate::trial::kvm_trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        kvm_trial("halt_of_the_only_vcpu", halt_of_the_only_vcpu),
        kvm_trial("halt_of_one_of_two", halt_of_one_of_two),
        kvm_trial("halt_of_both", halt_of_both),
        kvm_trial("a_halted_vcpu_starts_anew", a_halted_vcpu_starts_anew),
        kvm_trial("starts_that_are_refused", starts_that_are_refused),
        kvm_trial("started_in_the_void", started_in_the_void),
        kvm_trial("a_fault_of_one_ends_all", a_fault_of_one_ends_all),
        kvm_trial("endless_loop_is_killed", endless_loop_is_killed),
        kvm_trial("endless_faults_are_killed", endless_faults_are_killed),
        kvm_trial("dropped_while_running", dropped_while_running),
        kvm_trial("root_storm", root_storm),
        kvm_trial("root_storm_with_enough_pages", root_storm_with_enough_pages),
        kvm_trial("page_shared_by_two", page_shared_by_two),
        kvm_trial("table_changed_by_another", table_changed_by_another),
    ]
}

fn two() -> Machine {
    Machine { vcpus: 2, ..Machine::default() }
}

/// Starts vCPU 1 at `at` with `argument` in its RDI; the result is in RAX.
fn start_other(a: &mut CodeAssembler, at: CodeLabel, argument: u64) -> Written {
    a.mov(rdi, 1u64)?;
    a.lea(rsi, ptr(at))?;
    a.mov(rcx, argument)?;
    hypercall(a, abi::HC_START_VCPU)
}

fn halt_of_the_only_vcpu() {
    let ended = Machine::default().run(&Guest::bare(|a| {
        a.cli()?;
        a.hlt()
    }));
    assert!(matches!(ended.outcome, Outcome::Halted), "{ended:?}");
    assert_eq!(ended.outcome.exit_code(), 0);
}

fn halt_of_one_of_two() {
    let guest = Guest::new(|a| {
        let (mut other, mut again) = (a.create_label(), a.create_label());
        start_other(a, other, 0)?;
        a.hlt()?;
        a.set_label(&mut other)?;
        // Long after vCPU 0 has halted.
        a.mov(ecx, 100_000_000)?;
        a.set_label(&mut again)?;
        a.dec(ecx)?;
        a.jne(again)?;
        exit(a, 20)
    });
    let ended = two().run(&guest);
    assert!(matches!(ended.outcome, Outcome::GuestExit(41)), "{ended:?}");
}

fn halt_of_both() {
    let guest = Guest::new(|a| {
        let mut other = a.create_label();
        start_other(a, other, 0)?;
        a.set_label(&mut other)?;
        a.hlt()
    });
    assert!(matches!(two().run(&guest).outcome, Outcome::Halted));
}

fn a_halted_vcpu_starts_anew() {
    // A hundred times: start it with another argument, wait until it has added that, and halted.
    let guest = Guest::new(|a| {
        let (mut next, mut refused, mut wait) =
            (a.create_label(), a.create_label(), a.create_label());
        let mut other = a.create_label();
        a.mov(ebx, 100)?;
        a.set_label(&mut next)?;
        a.mov(r13, qword_ptr(FREE))?;
        a.set_label(&mut refused)?;
        a.mov(rdi, 1u64)?;
        a.lea(rsi, ptr(other))?;
        a.mov(rcx, rbx)?;
        hypercall(a, abi::HC_START_VCPU)?;
        // It may not have got to its `hlt` yet.
        a.cmp(rax, 2)?;
        a.je(refused)?;
        a.set_label(&mut wait)?;
        a.pause()?;
        a.cmp(r13, qword_ptr(FREE))?;
        a.je(wait)?;
        a.dec(ebx)?;
        a.jne(next)?;
        a.mov(rbx, qword_ptr(FREE))?;
        report(a, rbx)?;
        power_off(a)?;
        a.set_label(&mut other)?;
        a.lock().add(qword_ptr(FREE), rdi)?;
        a.hlt()
    });
    assert_eq!(two().run(&guest).powered_off().values(), [5050]);
}

fn starts_that_are_refused() {
    let guest = Guest::new(|a| {
        let mut other = a.create_label();
        start_other(a, other, 0)?;
        a.mov(rbx, rax)?;
        report(a, rbx)?;
        start_other(a, other, 0)?;
        a.mov(rbx, rax)?;
        report(a, rbx)?;
        power_off(a)?;
        a.set_label(&mut other)?;
        a.pause()?;
        a.jmp(other)
    });
    let ended = two().run(&guest).powered_off();
    assert_eq!(ended.values(), [0, abi::START_ALREADY_RUNNING]);
}

fn started_in_the_void() {
    // At an address that is usable, but not mapped: its #PF finds no stack (RSP is 0).
    let guest = Guest::new(|a| {
        a.mov(rdi, 1u64)?;
        a.mov(rsi, 1u64 << 40)?;
        hypercall(a, abi::HC_START_VCPU)?;
        a.hlt()
    });
    two().run(&guest).failed_with(&["vCPU 1 at RIP 0x10000000000", "triple fault"]);
}

fn a_fault_of_one_ends_all() {
    let guest = Guest::new(|a| {
        let (mut other, mut forever) = (a.create_label(), a.create_label());
        start_other(a, other, 0)?;
        a.cli()?;
        a.set_label(&mut forever)?;
        a.jmp(forever)?;
        a.set_label(&mut other)?;
        a.ud2()
    });
    two().run(&guest).failed_with(&["vCPU 1", "triple fault", "exception 6"]);
}

/// Kills the VM once all vCPUs run: nothing else ends it.
fn killed(machine: &Machine, guest: &Guest) -> Ended {
    let ended = machine.run_while(guest, |vm| {
        wait_until(|| vm.vcpu_states().iter().all(|(life, _)| *life == VcpuState::Running));
        vm.kill();
    });
    assert!(matches!(ended.outcome, Outcome::Killed), "{ended:?}");
    assert_eq!(ended.outcome.exit_code(), 130);
    ended
}

pub(crate) fn wait_until(mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < deadline, "it did not come to that");
        std::thread::yield_now();
    }
}

fn endless_loop_is_killed() {
    let guest = Guest::new(|a| {
        let (mut other, mut forever) = (a.create_label(), a.create_label());
        start_other(a, other, 0)?;
        a.set_label(&mut other)?;
        a.cli()?;
        a.set_label(&mut forever)?;
        a.jmp(forever)
    });
    killed(&two(), &guest);
}

fn endless_faults_are_killed() {
    // Exceptions without end on one, emulated instructions on the other.
    let guest = Guest::new(|a| {
        let (mut other, mut faults, mut forever) =
            (a.create_label(), a.create_label(), a.create_label());
        start_other(a, other, 0)?;
        a.lea(r15, ptr(faults))?;
        a.set_label(&mut faults)?;
        a.ud2()?;
        a.set_label(&mut other)?;
        a.mov(rax, cr3)?;
        a.set_label(&mut forever)?;
        a.mov(cr3, rax)?;
        a.jmp(forever)
    });
    let ended = killed(&two(), &guest);
    assert_eq!(ended.vectors().first().copied().unwrap_or((6, 0)), (6, 0));
}

fn dropped_while_running() {
    use std::borrow::Cow;

    use gnomon::host_mm::{HostMm, HostMmConfig};
    use gnomon::vmm::VmConfig;

    let guest = Guest::new(|a| {
        let mut forever = a.create_label();
        a.set_label(&mut forever)?;
        a.inc(qword_ptr(FREE))?;
        a.jmp(forever)
    });
    let mm = HostMm::new(HostMmConfig::new(8 << 20)).expect("host memory");
    for _ in 0..5 {
        let config = VmConfig {
            memory_bytes: 16 << 20,
            vcpus: 1,
            kernel: Cow::Owned(guest.elf()),
            cmdline: String::new(),
            shadow_pages: None,
            observer: None,
        };
        let mut vm = Vm::new(&config, &mm, Box::new(std::io::sink())).expect("a VM");
        vm.start().expect("threads");
        wait_until(|| vm.counts().write_faults > 0);
        drop(vm);
        assert_eq!(mm.stats().frames_in_use, 0, "its frames are free again");
    }
}

/// Distinct roots in a storm; together they need many times the shadow pages that there are.
const ROOTS: u64 = 300;

/// Both vCPUs load one root after the other. Each root maps itself at slot 5, so that a marker in
/// its last entry, which is not present, tells whose translations are in use.
fn storm_of_roots(shadow_pages: Option<u32>) -> Ended {
    const ROOT_0: u64 = FREE;
    const ROUNDS: u32 = 1500;
    let guest = Guest::new(|a| {
        let (mut make, mut other) = (a.create_label(), a.create_label());
        let (mut next, mut wrong, mut wait) =
            (a.create_label(), a.create_label(), a.create_label());
        // Root n lies at FREE + n pages: slots 0 and 1 as in the boot tables, 5 itself, 511 n.
        a.mov(rcx, ROOT_0)?;
        a.mov(r8, ROOT_0 + ROOTS * 0x1000)?;
        a.set_label(&mut make)?;
        a.mov(qword_ptr(rcx), 0xa003)?;
        a.lea(rax, ptr(rcx + 3))?;
        a.mov(qword_ptr(rcx + 5 * 8), rax)?;
        a.lea(rax, ptr(rcx))?;
        a.mov(qword_ptr(rcx + 511 * 8), rax)?;
        a.add(rcx, 0x1000)?;
        a.cmp(rcx, r8)?;
        a.jb(make)?;
        start_other(a, other, 7)?;
        a.mov(rdi, 13u64)?;
        // vCPU 0 strides by 13 roots, vCPU 1 by 7.
        a.set_label(&mut other)?;
        a.mov(ebx, ROUNDS)?;
        a.xor(ecx, ecx)?;
        a.mov(r10, 5u64 << 39 | 5 << 30 | 5 << 21 | 5 << 12)?;
        a.set_label(&mut next)?;
        a.add(rcx, rdi)?;
        a.mov(rax, rcx)?;
        a.xor(edx, edx)?;
        a.mov(r9, ROOTS)?;
        a.div(r9)?;
        a.shl(rdx, 12)?;
        a.add(rdx, i32::try_from(ROOT_0).unwrap_or(0))?;
        a.mov(cr3, rdx)?;
        a.cmp(rdx, qword_ptr(r10 + 511 * 8))?;
        a.jne(wrong)?;
        a.dec(ebx)?;
        a.jne(next)?;
        // The one that is done first waits for the other.
        a.lock().add(qword_ptr(0x3f_0000), 1)?;
        a.set_label(&mut wait)?;
        a.pause()?;
        a.cmp(qword_ptr(0x3f_0000), 2)?;
        a.jne(wait)?;
        power_off(a)?;
        a.set_label(&mut wrong)?;
        exit(a, 99)
    });
    let machine = Machine { shadow_pages, within: Duration::from_secs(60), ..two() };
    machine.run(&guest).powered_off()
}

fn root_storm() {
    let ended = storm_of_roots(Some(64));
    assert!(ended.shadow.recycles > 20, "{ended:?}");
}

fn root_storm_with_enough_pages() {
    let ended = storm_of_roots(Some(8192));
    assert_eq!(ended.shadow.recycles, 0, "{ended:?}");
}

fn page_shared_by_two() {
    // Both add to one counter on each of 512 pages, ten times, with page tables of their own making
    // dropped by a CR3 load after each round: they fault on the same pages at the same time.
    const PAGES: u32 = 512;
    const ROUNDS: u32 = 10;
    let guest = Guest::new(|a| {
        let (mut other, mut round, mut page) =
            (a.create_label(), a.create_label(), a.create_label());
        let (mut wait, mut sum) = (a.create_label(), a.create_label());
        start_other(a, other, 0)?;
        a.set_label(&mut other)?;
        a.mov(ebx, ROUNDS)?;
        a.set_label(&mut round)?;
        a.mov(rcx, FREE)?;
        a.mov(r8, u64::from(PAGES))?;
        a.set_label(&mut page)?;
        a.lock().add(qword_ptr(rcx), 1)?;
        a.add(rcx, 0x1000)?;
        a.dec(r8)?;
        a.jne(page)?;
        a.mov(rax, cr3)?;
        a.mov(cr3, rax)?;
        a.dec(ebx)?;
        a.jne(round)?;
        a.lock().add(qword_ptr(0x3f_0000), 1)?;
        a.set_label(&mut wait)?;
        a.pause()?;
        a.cmp(qword_ptr(0x3f_0000), 2)?;
        a.jne(wait)?;
        a.xor(ebx, ebx)?;
        a.mov(rcx, FREE)?;
        a.mov(r8, u64::from(PAGES))?;
        a.set_label(&mut sum)?;
        a.add(rbx, qword_ptr(rcx))?;
        a.add(rcx, 0x1000)?;
        a.dec(r8)?;
        a.jne(sum)?;
        // Either vCPU may get here; both sums are the same.
        exit_if_not(a, rbx, 2 * PAGES * ROUNDS)?;
        power_off(a)
    });
    // Half the memory that it takes: pages are evicted all the time.
    let machine = Machine { host_memory_bytes: 4 << 20, ..two() };
    machine.run(&guest).powered_off();
}

/// Ends the VM with a code other than 0 unless `register` has the value. Changes RAX and RDX.
fn exit_if_not(a: &mut CodeAssembler, register: AsmRegister64, value: u32) -> Written {
    let mut right = a.create_label();
    a.mov(rax, u64::from(value))?;
    a.cmp(register, rax)?;
    a.je(right)?;
    exit(a, 98)?;
    a.set_label(&mut right)?;
    a.nop()
}

fn table_changed_by_another() {
    // vCPU 1 flips the entry of a page between two frames without end while vCPU 0 reads through
    // it, invalidating now and then: it always sees one of the two frames, and never faults.
    const TABLES: u64 = FREE;
    const GVA: u64 = 1 << 39;
    let frame = |number: u64| FREE + 0x1_0000 + number * 0x1000;
    let guest = Guest::new(|a| {
        let (mut other, mut next, mut flip) =
            (a.create_label(), a.create_label(), a.create_label());
        let (mut good, mut wrong) = (a.create_label(), a.create_label());
        a.mov(rax, TABLES)?;
        a.mov(cr3, rax)?;
        start_other(a, other, 0)?;
        a.mov(ecx, 20_000)?;
        a.mov(rdi, GVA)?;
        a.set_label(&mut next)?;
        a.mov(rbx, qword_ptr(rdi))?;
        a.cmp(rbx, 1)?;
        a.je(good)?;
        a.cmp(rbx, 2)?;
        a.jne(wrong)?;
        a.set_label(&mut good)?;
        a.invlpg(ptr(rdi))?;
        a.dec(ecx)?;
        a.jne(next)?;
        attempt(a, |a| a.nop())?;
        power_off(a)?;
        a.set_label(&mut wrong)?;
        exit(a, 97)?;
        a.set_label(&mut other)?;
        a.mov(r8, frame(0) | 0x63)?;
        a.mov(r9, frame(1) | 0x63)?;
        a.set_label(&mut flip)?;
        a.mov(qword_ptr(TABLES + 0x3000), r8)?;
        a.mov(qword_ptr(TABLES + 0x3000), r9)?;
        a.jmp(flip)
    })
    .with_table(TABLES, &[(0, 0xa000 | 3), (1, (TABLES + 0x1000) | 3)])
    .with_table(TABLES + 0x1000, &[(0, (TABLES + 0x2000) | 3)])
    .with_table(TABLES + 0x2000, &[(0, (TABLES + 0x3000) | 3)])
    .with_table(TABLES + 0x3000, &[(0, frame(0) | 0x63)])
    .with_table(frame(0), &[(0, 1)])
    .with_table(frame(1), &[(0, 2)]);
    let ended = two().run(&guest).powered_off();
    assert_eq!(ended.vectors(), []);
}
