//! Plain machines with a few instructions each, in 32-bit mode without paging.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use kvm_bindings::kvm_segment;

use super::*;
use crate::addr::Gpa;
use crate::direct_mmu::DirectConfig;
use crate::host_mm::{HostMm, HostMmConfig, MIN_HOST_MEMORY_BYTES, MmError, Placement};
use crate::sync::lock;
use crate::vmm::KvmError;
use crate::vmm::error::{GuestError, VmError};
use crate::vmm::vm::Outcome;

const CODE: u32 = 0x1000;
const DEVICE: u32 = 0xd000_0000;
/// A port whose write ends the machine.
const END: u32 = 0x501;
/// Long enough for whatever is to happen.
const GIVE_UP: Duration = Duration::from_secs(60);

/// Writes down all accesses, and answers each read with what is in `answers`, bytes in turn.
#[derive(Default)]
struct Recorder {
    seen: Mutex<Vec<String>>,
    answers: Mutex<Vec<u8>>,
}

impl Recorder {
    fn note(&self, what: String) -> Action {
        lock(&self.seen).push(what);
        Action::Continue
    }

    fn answer(&self, data: &mut [u8]) {
        let mut answers = lock(&self.answers);
        for byte in data {
            *byte = answers.remove(0);
        }
    }
}

impl Bus for Recorder {
    fn port_in(&self, vcpu: usize, port: u16, data: &mut [u8]) -> Action {
        self.answer(data);
        self.note(format!("{vcpu}: in {port:#x} {data:x?}"))
    }

    fn port_out(&self, vcpu: usize, port: u16, data: &[u8]) -> Action {
        self.note(format!("{vcpu}: out {port:#x} {data:x?}"));
        if u32::from(port) == END { Action::End(Outcome::GuestExit(7)) } else { Action::Continue }
    }

    fn mmio_read(&self, vcpu: usize, gpa: Gpa, data: &mut [u8]) -> Action {
        if gpa.as_u64() < u64::from(DEVICE) {
            return Action::Refuse(GuestError::OutsideRam { gpa });
        }
        self.answer(data);
        self.note(format!("{vcpu}: read {gpa} {data:x?}"))
    }

    fn mmio_write(&self, vcpu: usize, gpa: Gpa, data: &[u8]) -> Action {
        self.note(format!("{vcpu}: write {gpa} {data:x?}"))
    }
}

/// 32-bit protected mode with flat segments.
fn flat(rip: u32) -> Registers {
    let mut at = Registers::long_mode();
    at.sregs.cs = kvm_segment { l: 0, db: 1, ..at.sregs.cs };
    at.sregs.cr0 = 0x11;
    at.regs.rip = u64::from(rip);
    at
}

/// A machine with this code; `None` where there is no KVM or its page faults are not ours to handle.
fn machine(
    bus: &Arc<Recorder>,
    irqchip: bool,
    vcpus: usize,
    write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Option<PlainMachine> {
    let bytes = MIN_HOST_MEMORY_BYTES;
    let placement = Placement::Identity { guest_bytes: bytes };
    let mm = HostMm::new(HostMmConfig { placement, ..HostMmConfig::new(bytes) }).unwrap();
    let object = mm.create_object(bytes).unwrap();
    let mut code = CodeAssembler::new(32).unwrap();
    write(&mut code).unwrap();
    object.write(Gpa::new(CODE.into()), &code.assemble(CODE.into()).unwrap()).unwrap();
    let mut starts = vec![None; vcpus];
    starts[0] = Some(flat(CODE));
    let config = PlainConfig {
        object,
        paging: DirectConfig::default(),
        pinned: Vec::new(),
        vcpus: starts,
        irqchip,
        bus: bus.clone(),
    };
    let mut machine = match PlainMachine::new(config) {
        Ok(machine) => machine,
        Err(VmError::Kvm(error @ (KvmError::Missing | KvmError::Denied)))
            if std::env::var_os("GNOMON_REQUIRE_KVM").is_none() =>
        {
            eprintln!("skipped: {error}");
            return None;
        }
        Err(VmError::Host(MmError::Uffd(error))) if !nix::unistd::geteuid().is_root() => {
            eprintln!("skipped: {error}");
            return None;
        }
        Err(error) => panic!("{error}"),
    };
    machine.start().unwrap();
    Some(machine)
}

#[test]
fn ports_and_device_memory_reach_the_bus_and_their_answers_the_guest() {
    let bus = Arc::new(Recorder::default());
    lock(&bus.answers).extend([0x44, 0x33, 0x22, 0x11, 0xa0, 0xb0, 0xb1, 0xb2]);
    let machine = machine(&bus, false, 1, |a| {
        a.mov(ebx, DEVICE)?;
        a.mov(eax, dword_ptr(ebx))?;
        a.add(eax, 1)?;
        a.mov(word_ptr(ebx + 8), ax)?;
        a.mov(edx, 0x70)?;
        a.in_(al, dx)?;
        a.out(dx, ax)?;
        // A string of three bytes, and out again.
        a.mov(edi, 0x3000)?;
        a.mov(ecx, 3)?;
        a.rep().insb()?;
        a.mov(esi, 0x3000)?;
        a.mov(ecx, 3)?;
        a.rep().outsb()?;
        a.mov(edx, END)?;
        a.out(dx, al)
    });
    let Some(mut machine) = machine else { return };
    let outcome = machine.wait(Some(GIVE_UP));
    assert!(matches!(outcome, Some(Outcome::GuestExit(7))), "{outcome:?}");
    let seen = lock(&bus.seen).join("; ");
    let expected = "0: read 0xd0000000 [44, 33, 22, 11]; 0: write 0xd0000008 [45, 33]; \
                    0: in 0x70 [a0]; 0: out 0x70 [a0, 33]; \
                    0: in 0x70 [b0]; 0: in 0x70 [b1]; 0: in 0x70 [b2]; \
                    0: out 0x70 [b0]; 0: out 0x70 [b1]; 0: out 0x70 [b2]; 0: out 0x501 [a0]";
    assert_eq!(seen, expected);
    assert!(machine.wait(Some(GIVE_UP)).is_none(), "one outcome");
}

#[test]
fn what_the_bus_refuses_ends_the_machine_with_the_place() {
    let bus = Arc::new(Recorder::default());
    let machine = machine(&bus, false, 1, |a| a.mov(eax, dword_ptr(0x3000_0000)));
    let Some(mut machine) = machine else { return };
    let Some(Outcome::Failed(error)) = machine.wait(Some(GIVE_UP)) else {
        panic!("it did not fail");
    };
    let said = error.to_string();
    assert!(said.contains("vCPU 0") && said.contains("0x30000000"), "{said}");
}

#[test]
fn without_interrupts_a_halt_of_all_is_the_end() {
    let bus = Arc::new(Recorder::default());
    let Some(mut machine) = machine(&bus, false, 2, |a| a.hlt()) else { return };
    let outcome = machine.wait(Some(GIVE_UP));
    assert!(matches!(outcome, Some(Outcome::Halted)), "{outcome:?}");
}

/// Vcpu 0 halts in the kernel, vCPU 1 waits there for another's interrupt: both get out.
#[test]
fn with_interrupts_a_halt_waits_for_one_and_a_kill_ends_it() {
    let bus = Arc::new(Recorder::default());
    let machine = machine(&bus, true, 2, |a| {
        let mut again = a.create_label();
        a.mov(edx, 0x80)?;
        a.out(dx, al)?;
        a.set_label(&mut again)?;
        a.hlt()?;
        a.jmp(again)
    });
    let Some(mut machine) = machine else { return };
    let begun = std::time::Instant::now();
    while lock(&bus.seen).is_empty() && begun.elapsed() < GIVE_UP {
        std::thread::yield_now();
    }
    assert_eq!(*lock(&bus.seen), ["0: out 0x80 [0]"]);
    assert!(machine.wait(Some(Duration::from_millis(100))).is_none(), "it is not over");
    machine.kill();
    let outcome = machine.wait(Some(GIVE_UP));
    assert!(matches!(outcome, Some(Outcome::Killed)), "{outcome:?}");
}

/// The page of KVM's clock, and in it the flag that the guest was paused (`pvclock_vcpu_time_info`).
const CLOCK: u32 = 0x2000;
const CLOCK_FLAGS: u32 = CLOCK + 29;
const CLOCK_PAUSED: u32 = 2;
/// `MSR_KVM_SYSTEM_TIME_NEW`, and its bit that switches it on.
const MSR_CLOCK: u32 = 0x4b56_4d01;
const CLOCK_ON: u32 = 1;

/// So that its watchdogs do not count the time in which the process was stopped.
#[test]
fn a_guest_that_was_interrupted_finds_so_in_its_clock() {
    let bus = Arc::new(Recorder::default());
    let machine = machine(&bus, false, 1, |a| {
        let mut again = a.create_label();
        a.mov(ecx, MSR_CLOCK)?;
        a.mov(eax, CLOCK | CLOCK_ON)?;
        a.mov(edx, 0)?;
        a.wrmsr()?;
        a.mov(edx, 0x80)?;
        a.out(dx, al)?;
        a.set_label(&mut again)?;
        a.test(byte_ptr(CLOCK_FLAGS), CLOCK_PAUSED)?;
        a.jz(again)?;
        a.mov(edx, END)?;
        a.out(dx, al)
    });
    let Some(mut machine) = machine else { return };
    let begun = std::time::Instant::now();
    while lock(&bus.seen).is_empty() && begun.elapsed() < GIVE_UP {
        std::thread::yield_now();
    }
    assert!(machine.wait(Some(Duration::from_millis(100))).is_none(), "nothing has happened");
    machine.interrupt();
    let outcome = machine.wait(Some(GIVE_UP));
    assert!(matches!(outcome, Some(Outcome::GuestExit(7))), "{outcome:?}");
}
