//! Clones of running VMs: each goes on from the same moment, on its own.

use std::borrow::Cow;
use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use gnomon::abi;
use gnomon::addr::{Gfn, Gpa, Pfn};
use gnomon::host_mm::{HostMemory, HostMmConfig};
use gnomon::vmm::boot::TEST_GUEST;
use gnomon::vmm::{Outcome, Vm, VmConfig, VmError, VmObserver};
use iced_x86::code_asm::*;
use libtest_mimic::Trial;

use crate::guest::{FREE, Guest, VALUE, Written, hypercall, power_off, report};
use crate::trial::kvm_trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        kvm_trial("clone_of_one_vcpu", || clone_and_source_part_ways(1)),
        kvm_trial("clone_of_two_vcpus", || clone_and_source_part_ways(2)),
        kvm_trial("clone_of_a_guest_partly_in_swap", clone_of_a_guest_partly_in_swap),
        kvm_trial("clone_of_a_clone", clone_of_a_clone),
        kvm_trial("clone_whose_source_is_killed", clone_whose_source_is_killed),
        kvm_trial("clone_of_what_does_not_run", clone_of_what_does_not_run),
        kvm_trial("clone_maps_the_frames_of_its_source", clone_maps_the_frames_of_its_source),
        kvm_trial("clone_leaves_nothing_behind", clone_leaves_nothing_behind),
        kvm_trial("clones_of_the_test_guest_under_storms", clones_of_the_test_guest_under_storms),
    ]
}

const MINUTE: Duration = Duration::from_secs(60);
/// A word that the guest waits for, in a page of its own.
const FLAG: u64 = FREE;
/// Where the second vCPU says that it is done.
const DONE: u64 = FREE + 0x1000;
/// Pages that the guest writes.
const PAGES: u64 = FREE + 0x10_0000;
/// What registers hold while the guest waits.
const R13: u64 = 0x1313_1313_0000_0001;
const R14: u64 = 0x1414_1414_0000_0002;
const XMM3: u64 = 0x0303_0303_0000_0003;
const XMM4: u64 = 0x0404_0404_0000_0004;

/// Tells the test which phase a guest has come to.
struct Phases(Mutex<Sender<u64>>);

impl VmObserver for Phases {
    fn phase(&self, phase: u64, _first: Gfn, _count: u64) {
        // The test may have seen enough.
        let _ = self.0.lock().expect("nobody panics with it").send(phase);
    }
}

fn phases() -> (Arc<Phases>, Receiver<u64>) {
    let (sender, receiver) = mpsc::channel();
    (Arc::new(Phases(Mutex::new(sender))), receiver)
}

/// Spins until the flag is not 0, and leaves it in RCX.
fn wait_for_flag(a: &mut CodeAssembler) -> Written {
    let mut wait = a.create_label();
    a.set_label(&mut wait)?;
    a.pause()?;
    a.mov(rcx, qword_ptr(FLAG))?;
    a.test(rcx, rcx)?;
    a.je(wait)
}

/// Writes `pages` pages, says so, waits for the flag with something in every kind of register,
/// then writes the flag to each page, and reports the sums of what it wrote before and after, and
/// the registers.
fn patient_guest(pages: u32, vcpus: usize) -> Guest {
    let over_pages = |a: &mut CodeAssembler, body: fn(&mut CodeAssembler) -> Written| {
        let mut next = a.create_label();
        a.mov(rdi, PAGES)?;
        a.mov(esi, 1)?;
        a.set_label(&mut next)?;
        body(a)?;
        a.add(rdi, 0x1000)?;
        a.inc(esi)?;
        a.cmp(esi, pages + 1)?;
        a.jne(next)
    };
    Guest::new(move |a| {
        let mut other = a.create_label();
        if vcpus == 2 {
            a.mov(rdi, 1u64)?;
            a.lea(rsi, ptr(other))?;
            hypercall(a, abi::HC_START_VCPU)?;
        }
        over_pages(a, |a| a.mov(qword_ptr(rdi), rsi))?;
        // FS base.
        a.mov(ecx, 0xc000_0100u32)?;
        a.mov(eax, u32::try_from(PAGES).expect("below 4 GiB"))?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        a.mov(r13, R13)?;
        a.mov(rax, XMM3)?;
        a.movq(xmm3, rax)?;
        a.mov(rdi, abi::PHASE_RUN)?;
        hypercall(a, abi::HC_PHASE)?;
        wait_for_flag(a)?;
        a.xor(ebx, ebx)?;
        over_pages(a, |a| {
            a.add(rbx, qword_ptr(rdi))?;
            a.mov(qword_ptr(rdi + 8), rcx)
        })?;
        report(a, rbx)?;
        a.xor(ebx, ebx)?;
        over_pages(a, |a| a.add(rbx, qword_ptr(rdi + 8)))?;
        report(a, rbx)?;
        report(a, r13)?;
        a.movq(rbx, xmm3)?;
        report(a, rbx)?;
        a.mov(rbx, qword_ptr(0).fs())?;
        report(a, rbx)?;
        if vcpus == 2 {
            let mut wait = a.create_label();
            a.set_label(&mut wait)?;
            a.pause()?;
            a.cmp(qword_ptr(DONE), 0)?;
            a.je(wait)?;
        }
        power_off(a)?;
        a.set_label(&mut other)?;
        a.mov(r14, R14)?;
        a.mov(rax, XMM4)?;
        a.movq(xmm4, rax)?;
        wait_for_flag(a)?;
        report(a, r14)?;
        a.movq(rbx, xmm4)?;
        report(a, rbx)?;
        a.mov(qword_ptr(DONE), 1)?;
        a.hlt()
    })
}

/// What such a guest must have reported, once it has seen `flag`.
fn expected(pages: u32, vcpus: usize, flag: u64) -> Vec<u64> {
    let pages = u64::from(pages);
    let mut values = vec![pages * (pages + 1) / 2, pages * flag, R13, XMM3, 1];
    if vcpus == 2 {
        values.extend([R14, XMM4]);
    }
    values.sort_unstable();
    values
}

/// A patient guest that waits.
fn waiting(host_memory_bytes: u64, pages: u32, vcpus: usize) -> (HostMemory, Vm) {
    let mut mm = HostMemory::new(HostMmConfig::new(host_memory_bytes)).expect("host memory");
    mm.start_reclaim().expect("a thread");
    let (observer, phases) = phases();
    let config = VmConfig {
        memory_bytes: 16 << 20,
        vcpus,
        kernel: Cow::Owned(patient_guest(pages, vcpus).elf()),
        cmdline: String::new(),
        shadow_pages: None,
        observer: Some(observer),
    };
    let mut vm = Vm::new(&config, &mm, Box::new(std::io::sink())).expect("a VM");
    vm.start().expect("threads");
    assert_eq!(phases.recv_timeout(MINUTE), Ok(abi::PHASE_RUN));
    (mm, vm)
}

fn clone(vm: &Vm) -> Vm {
    vm.clone_running(None, Box::new(std::io::sink())).expect("a clone")
}

/// Sets the guest's flag.
fn let_go(vm: &Vm, flag: u64) {
    vm.object().write(Gpa::new(FLAG), &flag.to_le_bytes()).expect("it can be written");
}

/// The guest must power off by itself with these values.
fn reports(mut vm: Vm, expected: &[u64]) {
    let outcome = vm.wait(Some(MINUTE));
    assert!(matches!(outcome, Some(Outcome::PoweredOff)), "{outcome:?}");
    let reports = vm.violations();
    assert!(reports.iter().all(|report| report.kind == VALUE), "no exceptions: {reports:x?}");
    let mut values: Vec<u64> = reports.iter().map(|report| report.gva).collect();
    values.sort_unstable();
    assert_eq!(values, expected);
    let differences = vm.shadow().check_reverse_map();
    assert!(differences.is_empty(), "{differences:?}");
}

fn clone_and_source_part_ways(vcpus: usize) {
    const PAGES: u32 = 100;
    let (mm, vm) = waiting(8 << 20, PAGES, vcpus);
    let twin = clone(&vm);
    let figures = twin.clone_figures().expect("it is a clone");
    assert!(figures.shared_pages >= u64::from(PAGES), "{figures:?}");
    assert!(vm.clone_figures().is_none());
    let_go(&twin, 7);
    reports(twin, &expected(PAGES, vcpus, 7));
    let late = clone(&vm);
    let_go(&vm, 5);
    reports(vm, &expected(PAGES, vcpus, 5));
    let_go(&late, 9);
    reports(late, &expected(PAGES, vcpus, 9));
    assert_eq!(mm.violations().1, 0);
}

fn clone_of_a_guest_partly_in_swap() {
    const PAGES: u32 = 1400;
    let (mm, vm) = waiting(4 << 20, PAGES, 1);
    assert!(mm.stats().swap_slots_used > 300, "{:?}", mm.stats());
    let twin = clone(&vm);
    let shared = twin.clone_figures().expect("it is a clone").shared_pages;
    assert!(shared >= u64::from(PAGES), "{shared} shared pages");
    let_go(&vm, 5);
    let_go(&twin, 7);
    reports(twin, &expected(PAGES, 1, 7));
    reports(vm, &expected(PAGES, 1, 5));
    assert_eq!(mm.violations().1, 0);
}

fn clone_of_a_clone() {
    const PAGES: u32 = 50;
    let (_mm, vm) = waiting(8 << 20, PAGES, 2);
    let one = clone(&vm);
    // The second is made of one that may not have run a single instruction.
    let two = clone(&one);
    for (vm, flag) in [(one, 3), (two, 4), (vm, 5)] {
        let_go(&vm, flag);
        reports(vm, &expected(PAGES, 2, flag));
    }
}

fn clone_whose_source_is_killed() {
    const PAGES: u32 = 50;
    let (_mm, mut vm) = waiting(8 << 20, PAGES, 2);
    let twin = clone(&vm);
    vm.kill();
    assert!(matches!(vm.wait(Some(MINUTE)), Some(Outcome::Killed)));
    drop(vm);
    let_go(&twin, 7);
    reports(twin, &expected(PAGES, 2, 7));
}

fn clone_of_what_does_not_run() {
    let refused = |vm: &Vm| {
        let refused = vm.clone_running(None, Box::new(std::io::sink()));
        let error = refused.err().expect("there is nothing to clone");
        assert!(matches!(error, VmError::NotRunning), "{error}");
        assert!(error.to_string().contains("clone one that was started and is not over"));
    };
    let (mm, mut vm) = waiting(8 << 20, 1, 2);
    vm.kill();
    assert!(vm.wait(Some(MINUTE)).is_some());
    refused(&vm);
    let config = VmConfig {
        memory_bytes: 16 << 20,
        vcpus: 1,
        kernel: Cow::Owned(patient_guest(1, 1).elf()),
        cmdline: String::new(),
        shadow_pages: None,
        observer: None,
    };
    let mut vm = Vm::new(&config, &mm, Box::new(std::io::sink())).expect("a VM");
    refused(&vm);
    vm.start().expect("threads");
    let_go(&vm, 2);
    reports(vm, &expected(1, 1, 2));
}

/// Waits until the host has come to what is to be seen.
fn eventually(what: &str, mut seen: impl FnMut() -> bool) {
    let end = Instant::now() + MINUTE;
    while !seen() {
        assert!(Instant::now() < end, "never seen: {what}");
        std::thread::yield_now();
    }
}

fn clone_maps_the_frames_of_its_source() {
    let (mm, vm) = waiting(8 << 20, 4, 1);
    let twin = clone(&vm);
    let clients = [&vm, &twin].map(|vm| vm.shadow().client_id());
    // Both read the page with the flag, again and again.
    let mapped_by_both = || {
        let flag = vm.object().lock_page(Gpa::new(FLAG).gfn()).expect("it is there").pfn();
        let entries = mm.frame_table().rmap_entries(flag);
        let of: HashSet<_> = entries.iter().map(|entry| entry.client()).collect();
        clients.iter().all(|client| of.contains(client))
    };
    eventually("a frame with reverse-map entries of two VMs", mapped_by_both);
    // One of them leaves; its entries go, and the other's stay.
    drop(vm);
    let of = |client| mm.mappings_of(client);
    assert_eq!(of(clients[0]), 0);
    eventually("the clone's own mappings", || of(clients[1]) > 0);
    let_go(&twin, 7);
    reports(twin, &expected(4, 1, 7));
}

fn clone_leaves_nothing_behind() {
    let (mut mm, vm) = waiting(4 << 20, 1400, 1);
    for flag in 1..=5 {
        let twin = clone(&vm);
        let client = twin.shadow().client_id();
        if flag % 2 == 0 {
            let_go(&twin, flag);
            reports(twin, &expected(1400, 1, flag));
        } else {
            drop(twin);
        }
        assert_eq!(mm.mappings_of(client), 0);
    }
    drop(vm);
    mm.end_reclaim();
    let stats = mm.stats();
    assert_eq!((stats.swap_slots_used, mm.shared_pages()), (0, 0), "{stats:?}");
    // The page of zeros has one frame for each of its numbers.
    assert!(stats.frames_in_use <= 16, "{stats:?}");
}

fn clones_of_the_test_guest_under_storms() {
    let mut host = HostMmConfig::new(12 << 20);
    host.check_evictions = true;
    let mut mm = HostMemory::new(host).expect("host memory");
    mm.start_reclaim().expect("a thread");
    let (observer, phases) = phases();
    let config = VmConfig {
        memory_bytes: 24 << 20,
        vcpus: 2,
        kernel: Cow::Borrowed(TEST_GUEST),
        cmdline: "mode=stress seed=5 fill=1 free=2".to_owned(),
        shadow_pages: None,
        observer: Some(observer),
    };
    let mut vm = Vm::new(&config, &mm, Box::new(std::io::sink())).expect("a VM");
    vm.start().expect("threads");
    assert_eq!(phases.recv_timeout(MINUTE), Ok(abi::PHASE_RUN));

    let frames: Vec<Pfn> = (0..mm.frame_count()).map(Pfn::new).collect();
    let over = AtomicBool::new(false);
    // Also when something below fails: the scope waits for the storm.
    struct Over<'a>(&'a AtomicBool);
    impl Drop for Over<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let mut vms = std::thread::scope(|scope| {
        let _over = Over(&over);
        scope.spawn(|| {
            let mut turns = frames.chunks(16).cycle().enumerate();
            while !over.load(Ordering::Relaxed) {
                let (turn, some) = turns.next().expect("for ever");
                let done = match turn % 3 {
                    0 => mm.evict_frames(some),
                    1 => mm.clean_frames(some),
                    _ => mm.migrate_frames(some),
                };
                done.expect("swap takes them");
            }
        });
        let mut vms = vec![vm];
        for parent in [0, 1, 0] {
            vms.push(clone(&vms[parent]));
            let newest = vms.last().expect("just made");
            eventually("a clone at work", || newest.guest_counters().verified > 500);
        }
        vms
    });
    for vm in &mut vms {
        // Each by itself: the others must go on.
        vm.request_stop();
        let outcome = vm.wait(Some(2 * MINUTE));
        assert!(matches!(outcome, Some(Outcome::PoweredOff)), "{outcome:?}");
        assert_eq!(vm.violation_count(), 0, "{:?}", vm.violations());
        assert_eq!(vm.guest_counters().violations, 0);
    }
    for vm in &vms {
        let differences = vm.shadow().check_reverse_map();
        assert!(differences.is_empty(), "{differences:?}");
    }
    assert_eq!(mm.violations().1, 0, "{:?}", mm.violations().0);
}
