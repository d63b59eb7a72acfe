//! Guests whose pages are taken away under them: code as it runs, page tables as they are walked,
//! stacks as exceptions are pushed. And guests that would like the hypervisor to grow.

use std::time::{Duration, Instant};

use gnomon::abi;
use gnomon::addr::Pfn;
use gnomon::vmm::Vm;
use iced_x86::code_asm::*;
use libtest_mimic::Trial;

use crate::guest::{FREE, Guest, STACK_TOP, Written, attempt, exit, hypercall, power_off, report};
use crate::machine::Machine;
use crate::trial::kvm_trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        kvm_trial("code_evicted_as_it_runs", code_evicted_as_it_runs),
        kvm_trial("tables_evicted_as_they_are_walked", tables_evicted_as_they_are_walked),
        kvm_trial("stack_and_idt_evicted_as_they_are_used", stack_and_idt_evicted_as_they_are_used),
        kvm_trial("a_byte_in_each_2m_of_64g", a_byte_in_each_2m_of_64g),
        kvm_trial("more_data_than_swap_holds", more_data_than_swap_holds),
    ]
}

/// Evicts every page in turn while the guest runs, in as many rounds that found some as there are to
/// be, and until that was `enough`; then asks the guest to stop.
pub(crate) fn evict_all(vm: &Vm, rounds: usize, enough: impl Fn(&Vm) -> bool) {
    let mm = vm.object().host_mm();
    let frames: Vec<Pfn> = (0..mm.frame_count()).map(Pfn::new).collect();
    let mut round = 0;
    let deadline = Instant::now() + Duration::from_secs(60);
    while (round < rounds || !enough(vm)) && Instant::now() < deadline {
        let evict = |some| mm.evict_frames(some).expect("swap takes them");
        // On a busy machine the guest need not have run since the last round.
        round += usize::from(frames.chunks(64).map(evict).sum::<usize>() > 0);
        // The guest gets to touch something in between.
        let faults = vm.counts().faults();
        for _ in 0..10_000 {
            if vm.counts().faults() > faults {
                break;
            }
            std::thread::yield_now();
        }
    }
    assert!(round >= rounds, "{round} rounds found pages");
    vm.request_stop();
}

/// Jumps to `done` once the host wants the guest to stop. Changes RAX.
pub(crate) fn check_stop(a: &mut CodeAssembler, done: CodeLabel) -> Written {
    a.mov(rax, abi::WINDOW_GPA + 8)?;
    a.cmp(dword_ptr(rax), 0)?;
    a.jne(done)
}

pub(crate) fn start_other(a: &mut CodeAssembler, at: CodeLabel) -> Written {
    a.mov(rdi, 1u64)?;
    a.lea(rsi, ptr(at))?;
    a.mov(rcx, 1u64)?;
    hypercall(a, abi::HC_START_VCPU)
}

/// The vCPU that gets here first waits for the other; then the VM powers off. Changes RAX.
pub(crate) fn finish_together(a: &mut CodeAssembler) -> Written {
    const DONE: u64 = 0x3f_0000;
    let mut wait = a.create_label();
    a.lock().add(qword_ptr(DONE), 1)?;
    a.set_label(&mut wait)?;
    a.pause()?;
    a.cmp(qword_ptr(DONE), 2)?;
    a.jne(wait)?;
    power_off(a)
}

fn code_evicted_as_it_runs() {
    // 64 pages of code, each of which adds to a counter on a page of its vCPU's: RDI + page.
    const PAGES: u64 = 64;
    let counters = |vcpu: u64| FREE + 0x10_0000 + vcpu * 0x10_0000;
    let mut guest = Guest::new(|a| {
        let (mut other, mut round, mut call) =
            (a.create_label(), a.create_label(), a.create_label());
        let (mut done, mut check, mut wrong) =
            (a.create_label(), a.create_label(), a.create_label());
        start_other(a, other)?;
        a.xor(edi, edi)?;
        a.set_label(&mut other)?;
        // Stacks apart, counters apart.
        a.mov(rsp, STACK_TOP)?;
        a.mov(rax, rdi)?;
        a.shl(rax, 13)?;
        a.sub(rsp, rax)?;
        a.shl(rdi, 20)?;
        a.add(rdi, i32::try_from(counters(0)).unwrap_or(0))?;
        a.xor(ebx, ebx)?;
        a.set_label(&mut round)?;
        a.inc(rbx)?;
        a.mov(rcx, FREE)?;
        a.mov(r8, rdi)?;
        a.set_label(&mut call)?;
        a.call(rcx)?;
        a.add(rcx, 0x1000)?;
        a.add(r8, 0x1000)?;
        a.cmp(rcx, i32::try_from(FREE + PAGES * 0x1000).unwrap_or(0))?;
        a.jb(call)?;
        check_stop(a, done)?;
        a.jmp(round)?;
        a.set_label(&mut done)?;
        a.mov(rcx, PAGES)?;
        a.set_label(&mut check)?;
        a.cmp(rbx, qword_ptr(rdi))?;
        a.jne(wrong)?;
        a.add(rdi, 0x1000)?;
        a.dec(rcx)?;
        a.jne(check)?;
        report(a, rbx)?;
        finish_together(a)?;
        a.set_label(&mut wrong)?;
        exit(a, 96)
    });
    for page in 0..PAGES {
        // lock inc qword ptr [r8]; ret
        guest = guest.with(FREE + page * 0x1000, vec![0xf0, 0x49, 0xff, 0x00, 0xc3]);
    }
    let machine = Machine { vcpus: 2, within: Duration::from_secs(60), ..Machine::default() };
    let ended = machine.run_while(&guest, |vm| {
        evict_all(vm, 100, |vm| vm.counts().execute_faults > 1000);
    });
    let ended = ended.powered_off();
    assert_eq!(ended.values().len(), 2);
    assert!(ended.counts.execute_faults > 1000, "{ended:?}");
}

/// Tables at [`FREE`] that map the lowest 16 MiB by pages of 4 KiB, and the window.
fn small_pages(guest: Guest) -> Guest {
    let pw = 3;
    let (pdpt, pd) = (FREE + 0x1000, FREE + 0x2000);
    let table = |number: u64| FREE + 0x3000 + number * 0x1000;
    let mut guest = guest
        .with_table(FREE, &[(0, pdpt | pw), (1, 0xb000 | pw)])
        .with_table(pdpt, &[(0, pd | pw)]);
    let directory: Vec<(usize, u64)> = (0..8).zip((0..8).map(|n| table(n) | pw)).collect();
    guest = guest.with_table(pd, &directory);
    for number in 0..8 {
        let entry = |index: u64| ((number * 512 + index) * 0x1000) | pw;
        let entries: Vec<(usize, u64)> = (0..512).zip((0..512).map(entry)).collect();
        guest = guest.with_table(table(number), &entries);
    }
    guest
}

fn tables_evicted_as_they_are_walked() {
    // On 4 KiB tables: a counter on each of 256 pages, `invlpg` of each, a CR3 load each round. In
    // the end the counters are right and each page's entry is accessed and dirty.
    const PAGES: u64 = 256;
    const DATA: u64 = 0x80_0000;
    let guest = Guest::new(|a| {
        let (mut other, mut round, mut page) =
            (a.create_label(), a.create_label(), a.create_label());
        let (mut done, mut check, mut wrong) =
            (a.create_label(), a.create_label(), a.create_label());
        a.mov(rax, FREE)?;
        a.mov(cr3, rax)?;
        start_other(a, other)?;
        a.xor(edi, edi)?;
        a.set_label(&mut other)?;
        a.shl(rdi, 3)?;
        a.xor(ebx, ebx)?;
        a.set_label(&mut round)?;
        a.inc(rbx)?;
        a.lea(rcx, qword_ptr(rdi + DATA))?;
        a.mov(r8, PAGES)?;
        a.set_label(&mut page)?;
        a.inc(qword_ptr(rcx))?;
        a.invlpg(ptr(rcx))?;
        a.add(rcx, 0x1000)?;
        a.dec(r8)?;
        a.jne(page)?;
        a.mov(rax, cr3)?;
        a.mov(cr3, rax)?;
        check_stop(a, done)?;
        a.jmp(round)?;
        a.set_label(&mut done)?;
        a.mov(r8, PAGES)?;
        a.lea(rcx, qword_ptr(rdi + DATA))?;
        // The entries of these pages: table 4 of the eight.
        a.mov(r9, FREE + 0x7000)?;
        a.set_label(&mut check)?;
        a.cmp(rbx, qword_ptr(rcx))?;
        a.jne(wrong)?;
        a.mov(rax, qword_ptr(r9))?;
        a.and(eax, 0xfff)?;
        a.cmp(eax, 0x63)?;
        a.jne(wrong)?;
        a.add(rcx, 0x1000)?;
        a.add(r9, 8)?;
        a.dec(r8)?;
        a.jne(check)?;
        report(a, rbx)?;
        finish_together(a)?;
        a.set_label(&mut wrong)?;
        exit(a, 95)
    });
    let machine = Machine { vcpus: 2, within: Duration::from_secs(60), ..Machine::default() };
    let ended = machine.run_while(&small_pages(guest), |vm| {
        evict_all(vm, 40, |vm| vm.object().host_mm().stats().swap_ins > 1000);
    });
    let ended = ended.powered_off();
    assert_eq!(ended.values().len(), 2);
    assert!(ended.memory.swap_ins > 1000, "{ended:?}");
}

fn stack_and_idt_evicted_as_they_are_used() {
    // Exceptions through handlers that push, call the host, and return; every page on their way may
    // be gone. The guest counts rounds, the host counts deliveries.
    let guest = Guest::new(|a| {
        let (mut round, mut done) = (a.create_label(), a.create_label());
        a.xor(ebx, ebx)?;
        a.set_label(&mut round)?;
        a.inc(rbx)?;
        attempt(a, |a| a.ud2())?;
        a.mov(rax, 1u64 << 40)?;
        attempt(a, |a| a.mov(qword_ptr(rax), rax))?;
        check_stop(a, done)?;
        a.jmp(round)?;
        a.set_label(&mut done)?;
        // The first of vCPU 0's counters.
        a.mov(rax, abi::WINDOW_GPA + 64)?;
        a.mov(qword_ptr(rax), rbx)?;
        power_off(a)
    });
    let machine = Machine { within: Duration::from_secs(60), ..Machine::default() };
    let ended = machine.run_while(&small_pages(guest), |vm| {
        evict_all(vm, 300, |vm| vm.counts().injected > 20);
    });
    let ended = ended.powered_off();
    let rounds = ended.guest_counters.verified;
    assert!(rounds > 10, "{ended:?}");
    assert_eq!(ended.report_count, 2 * rounds, "each round has two exceptions");
    assert_eq!(ended.counts.injected, 2 * rounds);
    assert_eq!(ended.vectors()[..2], [(6, 0), (14, 2)]);
}

/// Bytes of anonymous memory that this process has.
fn anonymous_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("procfs");
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("RssAnon");
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().expect("a number");
    kib * 1024
}

fn a_byte_in_each_2m_of_64g() {
    const STEP: u64 = 2 << 20;
    const MEMORY: u64 = 64 << 30;
    // Each page gets the low byte of its number, then all are checked.
    let guest = Guest::new(|a| {
        let (mut write, mut check, mut wrong) =
            (a.create_label(), a.create_label(), a.create_label());
        a.mov(r8, MEMORY)?;
        a.mov(rcx, FREE)?;
        a.mov(ebx, 1)?;
        a.set_label(&mut write)?;
        a.mov(byte_ptr(rcx), bl)?;
        a.inc(rbx)?;
        a.add(rcx, i32::try_from(STEP).unwrap_or(0))?;
        a.cmp(rcx, r8)?;
        a.jb(write)?;
        a.mov(rcx, FREE)?;
        a.mov(ebx, 1)?;
        a.set_label(&mut check)?;
        a.cmp(byte_ptr(rcx), bl)?;
        a.jne(wrong)?;
        a.inc(rbx)?;
        a.add(rcx, i32::try_from(STEP).unwrap_or(0))?;
        a.cmp(rcx, r8)?;
        a.jb(check)?;
        report(a, rbx)?;
        power_off(a)?;
        a.set_label(&mut wrong)?;
        exit(a, 94)
    });
    let machine = Machine {
        memory_bytes: MEMORY,
        host_memory_bytes: 64 << 20,
        shadow_pages: Some(4096),
        within: Duration::from_secs(120),
        ..Machine::default()
    };
    let before = anonymous_bytes();
    let mut during = 0;
    let ended = machine.run_while(&guest, |vm| {
        let deadline = Instant::now() + Duration::from_secs(120);
        let is_over = || vm.violation_count() > 0 || Instant::now() > deadline;
        while vm.shadow().stats().recycles < 8 && !is_over() {
            during = during.max(anonymous_bytes());
            std::thread::sleep(Duration::from_millis(10));
        }
    });
    let ended = ended.powered_off();
    // Two pages fewer than fit: the first STEP bytes times two hold the boot area and the code.
    assert_eq!(ended.values(), [MEMORY / STEP - FREE / STEP + 1]);
    assert!(ended.shadow.recycles >= 8, "{ended:?}");
    assert!(ended.memory.peak_frames_in_use <= (64 << 20) / 4096);
    // 16 MiB of shadow pages, the object's tables of 32 thousand scattered pages, the ledger.
    let grown = during.saturating_sub(before);
    assert!(grown < 256 << 20, "the hypervisor grew by {grown} bytes");
}

fn more_data_than_swap_holds() {
    use std::borrow::Cow;

    use gnomon::host_mm::{HostMemory, HostMmConfig};
    use gnomon::vmm::{Outcome, VmConfig, VmError};

    // Every word of 16 MiB different, 4 MiB of frames, 4 MiB of swap: it must end with a sentence.
    let guest = Guest::new(|a| {
        let mut fill = a.create_label();
        a.mov(rcx, FREE)?;
        a.set_label(&mut fill)?;
        a.mov(qword_ptr(rcx), rcx)?;
        a.add(rcx, 8)?;
        a.cmp(rcx, 16 << 20)?;
        a.jb(fill)?;
        power_off(a)
    });
    let mut host = HostMmConfig::new(4 << 20);
    host.swap.bytes = 4 << 20;
    let mut mm = HostMemory::new(host).expect("host memory");
    mm.start_reclaim().expect("a thread");
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
    let outcome = vm.wait(Some(Duration::from_secs(60))).expect("it ends");
    match &outcome {
        Outcome::Failed(VmError::Host(error)) => {
            let sentence = error.to_string();
            assert!(sentence.contains("swap is full"), "{sentence}");
        }
        _ => panic!("{outcome:?}"),
    }
    assert_eq!(mm.violations().1, 0);
}
