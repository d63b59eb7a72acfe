//! Guests that misuse the DMA device, and pages that go away under it.

use std::mem::offset_of;
use std::time::{Duration, Instant};

use gnomon::abi::{self, DmaDescriptor};
use gnomon::vmm::Vm;
use iced_x86::code_asm::*;
use libtest_mimic::Trial;

use crate::guest::{CODE, FREE, Guest, Written, power_off, report};
use crate::machine::Machine;
use crate::pressure::{check_stop, evict_all, finish_together, start_other};
use crate::processors::wait_until;
use crate::trial::kvm_trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        kvm_trial("dma_descriptors_of_every_kind", dma_descriptors_of_every_kind),
        kvm_trial("dma_doorbells_without_end", dma_doorbells_without_end),
        kvm_trial("dma_descriptor_that_changes", dma_descriptor_that_changes),
        kvm_trial("dma_over_its_own_descriptor", dma_over_its_own_descriptor),
        kvm_trial("dma_on_evicted_pages", dma_on_evicted_pages),
        kvm_trial("dma_busy_as_the_guest_is_killed", dma_busy_as_the_guest_is_killed),
        kvm_trial("dma_busy_as_the_guest_ends", dma_busy_as_the_guest_ends),
    ]
}

/// Where the descriptors of a test are, one after the other.
const DESCRIPTORS: u64 = FREE;
/// What they may work on, up to the end of RAM.
const DATA: u64 = FREE + 0x10_0000;
const RAM: u64 = 16 << 20;

const STATUS: u64 = offset_of!(DmaDescriptor, status) as u64;
const SOURCE: u64 = offset_of!(DmaDescriptor, source) as u64;
const RESULT: u64 = offset_of!(DmaDescriptor, result) as u64;

#[derive(Clone, Copy, Debug)]
struct Wanted {
    command: u32,
    source: u64,
    destination: u64,
    bytes: u64,
}

impl Wanted {
    fn raw(&self) -> Vec<u8> {
        let fields = [u64::from(self.command), self.source, self.destination, self.bytes, 0x55];
        let mut raw: Vec<u8> = fields.iter().flat_map(|field| field.to_le_bytes()).collect();
        raw.resize(usize::try_from(abi::DMA_ALIGN).expect("small"), 0);
        raw
    }

    /// By the words of the contract.
    fn is_good(&self) -> bool {
        let in_ram = |at: u64| at.checked_add(self.bytes).is_some_and(|end| end <= RAM);
        let apart = self.source.abs_diff(self.destination) >= self.bytes;
        (1..=0x1_0000).contains(&self.bytes)
            && match self.command {
                1 => in_ram(self.source) && in_ram(self.destination) && apart,
                2 => in_ram(self.destination),
                3 => in_ram(self.source),
                _ => false,
            }
    }
}

/// Rings for the descriptor at the address in a register. Changes RAX and RDX.
fn ring(a: &mut CodeAssembler, address: AsmRegister64) -> Written {
    a.mov(rax, address)?;
    a.shr(rax, 7)?;
    a.mov(edx, u32::from(abi::PORT_DMA))?;
    a.out(dx, eax)
}

/// Waits for the status of the descriptor at the address in a register.
fn wait(a: &mut CodeAssembler, address: AsmRegister64) -> Written {
    let mut again = a.create_label();
    a.set_label(&mut again)?;
    a.pause()?;
    a.cmp(dword_ptr(address + STATUS), 0)?;
    a.je(again)
}

fn dma_descriptors_of_every_kind() {
    // Good and bad ones side by side: each number is often at a bound.
    let mut state = 1u64;
    let mut pick = |values: &[u64]| {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        values[usize::try_from(state >> 33).expect("31 bits") % values.len()]
    };
    let addresses = [
        DATA,
        DATA + 0x777,
        DATA + 0x8_0001,
        RAM - 0x1_0000,
        RAM - 3,
        RAM,
        abi::WINDOW_GPA,
        u64::MAX - 4,
    ];
    let lengths = [1, 7, 0x1000, 0x1_0000, 0x1_0001, 0, u64::MAX, 0x8888];
    let all: Vec<Wanted> = (0..500)
        .map(|_| Wanted {
            command: u32::try_from(pick(&[0, 1, 1, 2, 3, 4, 0xffff_ffff])).expect("32 bits"),
            source: pick(&addresses),
            destination: pick(&addresses),
            bytes: pick(&lengths),
        })
        .collect();
    let end = DESCRIPTORS + all.len() as u64 * abi::DMA_ALIGN;
    let guest = Guest::new(|a| {
        let (mut next, mut refused) = (a.create_label(), a.create_label());
        a.mov(rcx, DESCRIPTORS)?;
        a.xor(ebx, ebx)?;
        a.set_label(&mut next)?;
        ring(a, rcx)?;
        wait(a, rcx)?;
        a.cmp(dword_ptr(rcx + STATUS), 1)?;
        a.jne(refused)?;
        a.inc(rbx)?;
        a.set_label(&mut refused)?;
        a.add(rcx, i32::try_from(abi::DMA_ALIGN).expect("small"))?;
        a.cmp(rcx, i32::try_from(end).expect("below 2 GiB"))?;
        a.jb(next)?;
        report(a, rbx)?;
        power_off(a)
    });
    let guest = guest.with(DESCRIPTORS, all.iter().flat_map(Wanted::raw).collect());
    let ended = Machine::default().run(&guest).powered_off();
    let good = all.iter().filter(|wanted| wanted.is_good()).count() as u64;
    assert!(good > 50 && good < 450, "a mixture: {good}");
    assert_eq!(ended.values(), [good]);
    assert_eq!((ended.dma.operations, ended.dma.refused), (good, 500 - good));
}

fn dma_doorbells_without_end() {
    // Two vCPUs ring for descriptors of 64 KiB, for nothing and for addresses outside, and never look
    // at an answer.
    const ROUNDS: u32 = 2000;
    let sum = Wanted { command: 3, source: DATA, destination: 0, bytes: 0x1_0000 };
    let guest = Guest::new(|a| {
        let (mut other, mut next) = (a.create_label(), a.create_label());
        start_other(a, other)?;
        a.set_label(&mut other)?;
        a.mov(ecx, ROUNDS)?;
        a.mov(r8, DESCRIPTORS)?;
        a.mov(r9, RAM)?;
        a.set_label(&mut next)?;
        ring(a, r8)?;
        ring(a, r9)?;
        a.in_(eax, dx)?;
        a.dec(ecx)?;
        a.jne(next)?;
        finish_together(a)
    });
    let guest = guest.with(DESCRIPTORS, sum.raw());
    let machine = Machine { vcpus: 2, within: Duration::from_secs(60), ..Machine::default() };
    let begun = Instant::now();
    loop {
        let ended = machine.run(&guest).powered_off();
        let rung = 2 * u64::from(ROUNDS);
        assert_eq!((ended.dma.ignored_doorbells, ended.unknown_port_accesses), (rung, 0));
        // What was in the queue at the end is not served.
        let served = ended.dma.operations;
        assert!(served <= rung && served + abi::DMA_QUEUE as u64 >= rung, "{:?}", ended.dma);
        // As a rule the first time: the guest is faster than the device, and never waits for it.
        if ended.dma.full_queue_waits > 0 {
            return;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", ended.dma);
    }
}

fn dma_descriptor_that_changes() {
    // While the device reads it, the other vCPU changes its source to one outside of RAM and back.
    const ROUNDS: u32 = 3000;
    let sum = Wanted { command: 3, source: DATA, destination: 0, bytes: 0x1000 };
    let guest = Guest::new(|a| {
        let (mut other, mut next, mut ready) =
            (a.create_label(), a.create_label(), a.create_label());
        start_other(a, other)?;
        a.mov(r8, DESCRIPTORS)?;
        a.mov(ecx, ROUNDS)?;
        a.set_label(&mut next)?;
        a.mov(dword_ptr(r8 + STATUS), 0)?;
        ring(a, r8)?;
        wait(a, r8)?;
        a.dec(ecx)?;
        a.jne(next)?;
        power_off(a)?;
        a.set_label(&mut other)?;
        a.mov(r8, DESCRIPTORS)?;
        a.mov(r9, u64::MAX)?;
        a.mov(r10, DATA)?;
        a.set_label(&mut ready)?;
        a.mov(qword_ptr(r8 + SOURCE), r9)?;
        a.mov(qword_ptr(r8 + SOURCE), r10)?;
        a.jmp(ready)
    });
    let machine = Machine { vcpus: 2, within: Duration::from_secs(60), ..Machine::default() };
    let ended = machine.run(&guest.with(DESCRIPTORS, sum.raw())).powered_off();
    assert_eq!(ended.dma.operations + ended.dma.refused, u64::from(ROUNDS));
}

fn dma_over_its_own_descriptor() {
    // A fill over descriptor and neighbours: the status comes last, so it stands.
    let fill = Wanted { command: 2, source: 0, destination: DESCRIPTORS - 64, bytes: 0x2000 };
    let guest = Guest::new(|a| {
        a.mov(r8, DESCRIPTORS)?;
        ring(a, r8)?;
        wait(a, r8)?;
        a.mov(ebx, dword_ptr(r8 + STATUS))?;
        report(a, rbx)?;
        a.mov(rbx, qword_ptr(r8 + RESULT))?;
        report(a, rbx)?;
        a.mov(rbx, qword_ptr(r8 + SOURCE))?;
        report(a, rbx)?;
        power_off(a)
    });
    let ended = Machine::default().run(&guest.with(DESCRIPTORS, fill.raw())).powered_off();
    assert_eq!(ended.values(), [1, 0, 0x55]);
}

fn dma_on_evicted_pages() {
    // Copies a block of 64 KiB to and fro, counting in its first word; everything is evicted all the
    // while: the descriptors, the block, the code.
    let (one, two) = (DATA + 0x123, DATA + 0x8_0777);
    let there = Wanted { command: 1, source: one, destination: two, bytes: 0x1_0000 };
    let back = Wanted { command: 1, source: two, destination: one, bytes: 0x1_0000 };
    let guest = Guest::new(|a| {
        let (mut next, mut done, mut wrong) =
            (a.create_label(), a.create_label(), a.create_label());
        a.mov(r8, DESCRIPTORS)?;
        a.mov(r9, DESCRIPTORS + 0x1000)?;
        a.mov(r10, one)?;
        a.mov(r11, two)?;
        a.xor(ebx, ebx)?;
        a.set_label(&mut next)?;
        a.inc(rbx)?;
        for (descriptor, from, to) in [(r8, r10, r11), (r9, r11, r10)] {
            a.mov(qword_ptr(from), rbx)?;
            a.mov(qword_ptr(from + 0xfff0), rbx)?;
            a.mov(dword_ptr(descriptor + STATUS), 0)?;
            ring(a, descriptor)?;
            wait(a, descriptor)?;
            a.cmp(dword_ptr(descriptor + STATUS), 1)?;
            a.jne(wrong)?;
            a.cmp(qword_ptr(to), rbx)?;
            a.jne(wrong)?;
            a.cmp(qword_ptr(to + 0xfff0), rbx)?;
            a.jne(wrong)?;
        }
        check_stop(a, done)?;
        a.jmp(next)?;
        a.set_label(&mut wrong)?;
        a.mov(rbx, u64::MAX)?;
        a.set_label(&mut done)?;
        report(a, rbx)?;
        power_off(a)
    });
    let guest = guest.with(DESCRIPTORS, there.raw()).with(DESCRIPTORS + 0x1000, back.raw());
    let machine = Machine { within: Duration::from_secs(60), ..Machine::default() };
    let ended = machine.run_while(&guest, |vm| {
        evict_all(vm, 100, |vm| vm.iotlb().stats().invalidated > 500);
    });
    let ended = ended.powered_off();
    let [rounds] = ended.values()[..] else { panic!("{ended:?}") };
    assert!(rounds != u64::MAX, "a copy is wrong: {ended:?}");
    assert_eq!(ended.dma.operations, 2 * rounds);
    assert!(ended.iotlb.invalidated > 100, "{:?}", ended.iotlb);
}

/// A guest that has the device copy 64 KiB for ever, and meanwhile does as `a` says.
fn busy(then: impl FnOnce(&mut CodeAssembler) -> Written) -> Guest {
    let copy = Wanted { command: 1, source: CODE, destination: DATA, bytes: 0x1_0000 };
    let guest = Guest::new(|a| {
        let mut next = a.create_label();
        a.mov(r8, DESCRIPTORS)?;
        a.mov(ecx, 200)?;
        a.set_label(&mut next)?;
        ring(a, r8)?;
        a.dec(ecx)?;
        a.jne(next)?;
        then(a)
    });
    guest.with(DESCRIPTORS, copy.raw())
}

fn dma_busy_as_the_guest_is_killed() {
    let guest = busy(|a| {
        let mut next = a.create_label();
        a.set_label(&mut next)?;
        ring(a, r8)?;
        a.jmp(next)
    });
    let machine = Machine { within: Duration::from_millis(500), ..Machine::default() };
    let at_work = |vm: &Vm| wait_until(|| vm.dma_stats().operations > 0);
    let (ended, by_itself) = machine.run_at_most(&guest, at_work);
    assert!(!by_itself, "{ended:?}");
    assert!(ended.dma.operations > 0, "{ended:?}");
}

fn dma_busy_as_the_guest_ends() {
    let ended = Machine::default().run(&busy(power_off)).powered_off();
    assert!(ended.dma.operations <= 200, "{ended:?}");
}
