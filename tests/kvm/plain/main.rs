//! Plain machines with a few instructions each, in 32-bit mode without paging.

#[path = "../common/trial.rs"]
mod trial;

use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use gnomon::addr::Gpa;
use gnomon::direct_mmu::DirectConfig;
use gnomon::host_mm::{HostMm, HostMmConfig, MIN_HOST_MEMORY_BYTES, MmError, Placement};
use gnomon::sync::lock;
use gnomon::vmm::direct::{Action, Bus, PlainConfig, PlainMachine, Registers};
use gnomon::vmm::{GuestError, Outcome, VmError};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use kvm_bindings::kvm_segment;
use libtest_mimic::Trial;
use trial::Ignore;

/// The machines wait more than they run.
const THREADS: usize = 2;

fn main() -> ExitCode {
    let trial = |name: &str, body: fn() -> Result<(), Ignore>| -> Trial {
        trial::kvm_trial_or_ignore(name, body)
    };
    let trials = vec![
        trial(
            "ports_and_device_memory_reach_the_bus_and_their_answers_the_guest",
            ports_and_device_memory_reach_the_bus_and_their_answers_the_guest,
        ),
        trial(
            "what_the_bus_refuses_ends_the_machine_with_the_place",
            what_the_bus_refuses_ends_the_machine_with_the_place,
        ),
        trial(
            "without_interrupts_a_halt_of_all_is_the_end",
            without_interrupts_a_halt_of_all_is_the_end,
        ),
        trial(
            "with_interrupts_a_halt_waits_for_one_and_a_kill_ends_it",
            with_interrupts_a_halt_waits_for_one_and_a_kill_ends_it,
        ),
        trial(
            "a_guest_that_was_interrupted_finds_so_in_its_clock",
            a_guest_that_was_interrupted_finds_so_in_its_clock,
        ),
    ];
    trial::run(trials, THREADS).exit_code()
}

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

/// A machine with this code, where its page faults are ours to handle.
fn machine(
    bus: &Arc<Recorder>,
    irqchip: bool,
    vcpus: usize,
    write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<PlainMachine, Ignore> {
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
        Err(VmError::Host(MmError::Uffd(error))) if !nix::unistd::geteuid().is_root() => {
            return Err(Ignore(error.to_string()));
        }
        Err(error) => panic!("{error}"),
    };
    machine.start().unwrap();
    Ok(machine)
}

fn ports_and_device_memory_reach_the_bus_and_their_answers_the_guest() -> Result<(), Ignore> {
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
    let mut machine = machine?;
    let outcome = machine.wait(Some(GIVE_UP));
    assert!(matches!(outcome, Some(Outcome::GuestExit(7))), "{outcome:?}");
    let seen = lock(&bus.seen).join("; ");
    let expected = "0: read 0xd0000000 [44, 33, 22, 11]; 0: write 0xd0000008 [45, 33]; \
                    0: in 0x70 [a0]; 0: out 0x70 [a0, 33]; \
                    0: in 0x70 [b0]; 0: in 0x70 [b1]; 0: in 0x70 [b2]; \
                    0: out 0x70 [b0]; 0: out 0x70 [b1]; 0: out 0x70 [b2]; 0: out 0x501 [a0]";
    assert_eq!(seen, expected);
    assert!(machine.wait(Some(GIVE_UP)).is_none(), "one outcome");
    Ok(())
}

fn what_the_bus_refuses_ends_the_machine_with_the_place() -> Result<(), Ignore> {
    let bus = Arc::new(Recorder::default());
    let machine = machine(&bus, false, 1, |a| a.mov(eax, dword_ptr(0x3000_0000)));
    let mut machine = machine?;
    let Some(Outcome::Failed(error)) = machine.wait(Some(GIVE_UP)) else {
        panic!("it did not fail");
    };
    let said = error.to_string();
    assert!(said.contains("vCPU 0") && said.contains("0x30000000"), "{said}");
    Ok(())
}

fn without_interrupts_a_halt_of_all_is_the_end() -> Result<(), Ignore> {
    let bus = Arc::new(Recorder::default());
    let mut machine = machine(&bus, false, 2, |a| a.hlt())?;
    let outcome = machine.wait(Some(GIVE_UP));
    assert!(matches!(outcome, Some(Outcome::Halted)), "{outcome:?}");
    Ok(())
}

/// Vcpu 0 halts in the kernel, vCPU 1 waits there for another's interrupt: both get out.
fn with_interrupts_a_halt_waits_for_one_and_a_kill_ends_it() -> Result<(), Ignore> {
    let bus = Arc::new(Recorder::default());
    let machine = machine(&bus, true, 2, |a| {
        let mut again = a.create_label();
        a.mov(edx, 0x80)?;
        a.out(dx, al)?;
        a.set_label(&mut again)?;
        a.hlt()?;
        a.jmp(again)
    });
    let mut machine = machine?;
    let begun = std::time::Instant::now();
    while lock(&bus.seen).is_empty() && begun.elapsed() < GIVE_UP {
        std::thread::yield_now();
    }
    assert_eq!(*lock(&bus.seen), ["0: out 0x80 [0]"]);
    assert!(machine.wait(Some(Duration::from_millis(100))).is_none(), "it is not over");
    machine.kill();
    let outcome = machine.wait(Some(GIVE_UP));
    assert!(matches!(outcome, Some(Outcome::Killed)), "{outcome:?}");
    Ok(())
}

/// The page of KVM's clock, and in it the flag that the guest was paused (`pvclock_vcpu_time_info`).
const CLOCK: u32 = 0x2000;
const CLOCK_FLAGS: u32 = CLOCK + 29;
const CLOCK_PAUSED: u32 = 2;
/// `MSR_KVM_SYSTEM_TIME_NEW`, and its bit that switches it on.
const MSR_CLOCK: u32 = 0x4b56_4d01;
const CLOCK_ON: u32 = 1;

/// So that its watchdogs do not count the time in which the process was stopped.
fn a_guest_that_was_interrupted_finds_so_in_its_clock() -> Result<(), Ignore> {
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
    let mut machine = machine?;
    let begun = std::time::Instant::now();
    while lock(&bus.seen).is_empty() && begun.elapsed() < GIVE_UP {
        std::thread::yield_now();
    }
    assert!(machine.wait(Some(Duration::from_millis(100))).is_none(), "nothing has happened");
    machine.interrupt();
    let outcome = machine.wait(Some(GIVE_UP));
    assert!(matches!(outcome, Some(Outcome::GuestExit(7))), "{outcome:?}");
    Ok(())
}
