//! Accesses and jumps to addresses that a guest has no business at: unmapped ones, the monitor's,
//! the upper half, those that are no addresses at all, and guest-physical ones without RAM.

use gnomon::abi;
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use libtest_mimic::Trial;

use crate::guest::{FREE, Guest, IDT_POINTER, attempt, attempt_jump, pointer, power_off, report};
use crate::machine::{Ended, Machine};
use crate::trial::kvm_trial;

const GP: (u64, u64) = (13, 0);

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        kvm_trial("unmapped_addresses_are_page_faults", unmapped_addresses_are_page_faults),
        kvm_trial("the_monitor_is_out_of_reach", the_monitor_is_out_of_reach),
        kvm_trial("the_upper_half_is_out_of_reach", the_upper_half_is_out_of_reach),
        kvm_trial("addresses_that_are_none", addresses_that_are_none),
        kvm_trial("operands_across_the_limit", operands_across_the_limit),
        kvm_trial("code_up_to_the_limit", code_up_to_the_limit),
        kvm_trial("read_beyond_ram", read_beyond_ram),
        kvm_trial("write_beyond_ram", write_beyond_ram),
        kvm_trial("jump_beyond_ram", jump_beyond_ram),
        kvm_trial("stack_beyond_ram", stack_beyond_ram),
        kvm_trial("window_and_its_end", window_and_its_end),
        kvm_trial("exceptions_by_way_of_the_window", exceptions_by_way_of_the_window),
    ]
}

fn run(guest: &Guest) -> Ended {
    Machine::default().run(guest)
}

/// Reads, writes, exchanges at and jumps to each address.
fn touch_all(addresses: &'static [u64]) -> Guest {
    Guest::new(|a| {
        for &address in addresses {
            a.mov(rax, address)?;
            attempt(a, |a| a.mov(rbx, qword_ptr(rax)))?;
            attempt(a, |a| a.mov(byte_ptr(rax), bl))?;
            attempt(a, |a| a.lock().xadd(qword_ptr(rax), rbx))?;
            attempt_jump(a)?;
        }
        power_off(a)
    })
}

fn unmapped_addresses_are_page_faults() {
    const ADDRESSES: [u64; 3] = [1 << 40, (1 << 46) + 0x123, abi::GVA_LIMIT - 0x1000];
    let ended = run(&touch_all(&ADDRESSES)).powered_off();
    let faults = ended.faults();
    assert_eq!(faults.len(), 12);
    for (address, faults) in ADDRESSES.into_iter().zip(faults.chunks_exact(4)) {
        // Without EFER.NXE a fetch is not told from a read.
        for (fault, error_code) in faults.iter().zip([0, 2, 2, 0]) {
            assert_eq!((fault.vector, fault.error_code, fault.cr2), (14, error_code, address));
        }
        assert_eq!(faults[3].rip, address, "the jump was taken, the fetch failed");
    }
}

fn general_protection_at(addresses: &'static [u64]) {
    let ended = run(&touch_all(addresses)).powered_off();
    assert_eq!(ended.vectors(), vec![GP; addresses.len() * 4]);
    assert!(ended.faults().iter().all(|fault| fault.cr2 == 0), "CR2 tells no secrets: {ended:?}");
}

fn the_monitor_is_out_of_reach() {
    // Its page tables, stubs, IDT, GDT, TSS with the stack, and behind all of it.
    general_protection_at(&[
        abi::GVA_LIMIT,
        abi::GVA_LIMIT + 0x1000,
        abi::GVA_LIMIT + 0x2000,
        abi::GVA_LIMIT + 0x3000,
        abi::GVA_LIMIT + 0x4000,
        abi::GVA_LIMIT + 0x6000,
        abi::GVA_LIMIT + 0x6ff8,
        abi::GVA_LIMIT + 0x7000,
        0x7fff_ffff_f000,
    ]);
}

fn the_upper_half_is_out_of_reach() {
    general_protection_at(&[0xffff_8000_0000_0000, 0xffff_ffff_8000_0000, 0xffff_ffff_ffff_f000]);
}

fn addresses_that_are_none() {
    const ADDRESSES: [u64; 3] = [1 << 47, 1 << 63, 0xffff_7fff_ffff_f000];
    let ended = run(&touch_all(&ADDRESSES)).powered_off();
    assert_eq!(ended.vectors(), vec![GP; 12]);
    let by_stack = Guest::new(|a| {
        a.mov(rbp, rsp)?;
        a.mov(rsp, 1u64 << 63)?;
        a.push(rax)?;
        power_off(a)
    });
    run(&by_stack).failed_with(&["triple fault", "exception 12"]);
}

fn operands_across_the_limit() {
    // The page below the limit is mapped by tables of the guest's own to RAM.
    let root = FREE;
    let [pdpt, pd, pt, page] = [1, 2, 3, 4].map(|number| root + number * 0x1000);
    let guest = Guest::new(|a| {
        a.mov(rax, root)?;
        a.mov(cr3, rax)?;
        a.mov(rax, abi::GVA_LIMIT - 8)?;
        a.mov(rbx, qword_ptr(rax))?;
        a.mov(qword_ptr(rax), rbx)?;
        a.inc(rax)?;
        attempt(a, |a| a.mov(rbx, qword_ptr(rax)))?;
        attempt(a, |a| a.mov(qword_ptr(rax), rbx))?;
        attempt(a, |a| a.lgdt(ptr(rax)))?;
        power_off(a)
    })
    .with_table(root, &[(0, 0xa000 | 3), (254, pdpt | 3)])
    .with_table(pdpt, &[(511, pd | 3)])
    .with_table(pd, &[(511, pt | 3)])
    .with_table(pt, &[(511, page | 3)]);
    assert_eq!(run(&guest).powered_off().vectors(), [GP; 3]);
}

fn code_up_to_the_limit() {
    // Code that runs off the end of the usable addresses; the last instruction is an emulated one.
    let root = FREE;
    let [pdpt, pd, pt, page] = [1, 2, 3, 4].map(|number| root + number * 0x1000);
    let mut code = vec![0x90; 4096];
    code[4095] = 0xfa;
    let guest = Guest::new(|a| {
        a.mov(rax, root)?;
        a.mov(cr3, rax)?;
        a.mov(rax, abi::GVA_LIMIT - 3)?;
        attempt_jump(a)?;
        power_off(a)
    })
    .with_table(root, &[(0, 0xa000 | 3), (254, pdpt | 3)])
    .with_table(pdpt, &[(511, pd | 3)])
    .with_table(pd, &[(511, pt | 3)])
    .with_table(pt, &[(511, page | 3)])
    .with(page, code);
    let fault = run(&guest).powered_off().fault();
    assert_eq!((fault.vector, fault.error_code, fault.rip), (13, 0, abi::GVA_LIMIT));
}

/// A guest that does something with the first address beyond its RAM, which the boot tables map.
fn beyond_ram(
    write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> (Ended, &'static str) {
    let guest = Guest::new(|a| {
        a.mov(eax, 16 << 20)?;
        write(a)
    });
    (run(&guest), "guest-physical 0x1000000")
}

fn read_beyond_ram() {
    let (ended, address) = beyond_ram(|a| a.mov(rbx, qword_ptr(rax)));
    // Four instructions of preamble, one of 5 bytes.
    ended.failed_with(&[address, "vCPU 0 at RIP 0x2000", "neither RAM nor the pinned window"]);
}

fn write_beyond_ram() {
    let (ended, address) = beyond_ram(|a| a.mov(qword_ptr(rax), rbx));
    ended.failed_with(&[address, "vCPU 0 at RIP 0x2000"]);
}

fn jump_beyond_ram() {
    let (ended, address) = beyond_ram(|a| a.jmp(rax));
    ended.failed_with(&[address, "vCPU 0 at RIP 0x1000000"]);
}

fn stack_beyond_ram() {
    let (ended, _) = beyond_ram(|a| {
        a.lea(rsp, ptr(rax + 0x2000))?;
        a.ud2()
    });
    ended.failed_with(&["guest-physical 0x1001", "vCPU 0 at RIP 0x2000"]);
}

fn window_and_its_end() {
    // A version for each of 4096 frames, behind the control block.
    let end = abi::WINDOW_GPA + abi::CONTROL_BYTES + 4 * 4096;
    let guest = Guest::new(|a| {
        a.mov(rax, abi::WINDOW_GPA)?;
        a.mov(rbx, qword_ptr(rax))?;
        report(a, rbx)?;
        // All of it is the guest's to write, the control block's magic too.
        a.mov(rdi, abi::WINDOW_GPA)?;
        a.mov(ecx, u32::try_from((end - abi::WINDOW_GPA) / 8).unwrap_or(0))?;
        a.or(rax, -1)?;
        a.rep().stosq()?;
        a.mov(rbx, qword_ptr(rdi - 8))?;
        report(a, rbx)?;
        a.mov(rax, end)?;
        a.mov(bl, byte_ptr(rax))?;
        power_off(a)
    });
    let ended = run(&guest);
    assert_eq!(ended.values(), [abi::CONTROL_MAGIC, u64::MAX]);
    ended.failed_with(&[&format!("guest-physical {end:#x}")]);
}

fn exceptions_by_way_of_the_window() {
    // An exception stack in the pinned window, which is memory, too.
    let guest = Guest::new(|a| {
        a.mov(rsp, abi::WINDOW_GPA + abi::CONTROL_BYTES)?;
        attempt(a, |a| a.ud2())?;
        power_off(a)
    });
    assert_eq!(run(&guest).powered_off().vectors(), [(6, 0)]);
    // An IDT there: all zeros, so the gate is bad.
    let guest = Guest::new(|a| a.ud2());
    let zeros = abi::WINDOW_GPA + abi::CONTROL_BYTES;
    run(&guest.with(IDT_POINTER, pointer(zeros, 0xfff))).failed_with(&["triple fault"]);
}
