//! Machines of processors without KVM.

use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

use crate::addr::Gpa;
use crate::sync::{Condvar, Mutex, lock};
use crate::vmm::error::GuestError;
use crate::vmm::run::bus::{Action, Bus};
use crate::vmm::run::fakes::{self, FakeProcessor, Op, within_a_minute};

use super::*;

/// A bus with one port, which refuses, and a thread of its own.
#[derive(Default)]
struct FakeBus {
    /// The thread ends the machine when it is told to.
    fire: Mutex<bool>,
    is_over: Mutex<bool>,
    changed: Condvar,
    has_thread: bool,
    cannot_start: bool,
}

impl FakeBus {
    fn fire(&self) {
        *lock(&self.fire) = true;
        self.changed.notify_all();
    }
}

/// The thread's share of the bus.
struct SharedBus(Arc<FakeBus>);

impl Bus for SharedBus {
    fn port_in(&self, _vcpu: usize, _port: u16, _data: &mut [u8]) -> Action {
        Action::Continue
    }

    fn port_out(&self, _vcpu: usize, port: u16, _data: &[u8]) -> Action {
        let gpa = Gpa::new(port.into());
        Action::Refuse(GuestError::OutsideRam { gpa })
    }

    fn mmio_read(&self, _vcpu: usize, _gpa: Gpa, _data: &mut [u8]) -> Action {
        Action::Continue
    }

    fn mmio_write(&self, _vcpu: usize, _gpa: Gpa, _data: &[u8]) -> Action {
        Action::Continue
    }

    fn start(&self, ender: Ender) -> Result<Vec<JoinHandle<()>>, VmError> {
        if self.0.cannot_start {
            return Err(VmError::DeviceThread { source: std::io::Error::other("none left") });
        }
        if !self.0.has_thread {
            return Ok(Vec::new());
        }
        let bus = self.0.clone();
        Ok(vec![std::thread::spawn(move || {
            let mut fire = lock(&bus.fire);
            while !*fire {
                fire = bus.changed.wait(fire).unwrap();
            }
            drop(fire);
            ender.end(Outcome::GuestExit(9));
        })])
    }

    fn over(&self) {
        *lock(&self.0.is_over) = true;
        self.0.fire();
    }
}

/// The vCPUs of it begin with these programs; none, where one waits to be started.
fn machine(bus: FakeBus, programs: &[Option<Vec<Op>>]) -> (Machine<FakeProcessor>, Arc<FakeBus>) {
    let bus = Arc::new(bus);
    (fakes::machine(Arc::new(SharedBus(bus.clone())), programs.to_vec()), bus)
}

/// Runs one to its end.
fn outcome_of_programs(programs: &[Option<Vec<Op>>]) -> (Machine<FakeProcessor>, Outcome) {
    let (mut machine, _) = machine(FakeBus::default(), programs);
    machine.start().unwrap();
    let outcome = machine.wait(None).unwrap();
    assert!(machine.wait(None).is_none(), "one outcome");
    assert!(machine.vcpu_states().iter().all(|(life, _)| *life == VcpuState::Exited));
    (machine, outcome)
}

fn await_inside<P: Processor>(machine: &Machine<P>, vcpu: usize) {
    while machine.vcpu_states()[vcpu].1 != Position::Inside {
        std::thread::yield_now();
    }
}

#[test]
fn steps_are_counted_and_a_halt_of_all_is_the_end() {
    within_a_minute(|| {
        let other = vec![Op::Work, Op::Halt];
        let first = vec![Op::Work, Op::Work, Op::Start(1, other), Op::Work, Op::Halt];
        let (machine, outcome) = outcome_of_programs(&[Some(first), None]);
        assert!(matches!(outcome, Outcome::Halted), "{outcome:?}");
        let exits: Vec<u64> = machine.vcpu_counts().iter().map(|counts| counts.exits).collect();
        assert_eq!(exits, [5, 2]);
        assert_eq!(machine.counts().exits, 7);
        assert_eq!(machine.space().left.load(Ordering::Relaxed), 2, "each left once");
    });
}

#[test]
fn a_parked_vcpu_is_started_again() {
    within_a_minute(|| {
        let again = Op::Start(0, vec![Op::Work, Op::Exit(3)]);
        let programs = [Some(vec![Op::Halt]), Some(vec![again, Op::Hang])];
        let (machine, outcome) = outcome_of_programs(&programs);
        assert!(matches!(outcome, Outcome::GuestExit(3)), "{outcome:?}");
        assert_eq!(machine.vcpu_counts()[0].exits, 3);
    });
}

#[test]
fn a_panic_is_a_told_end_and_gets_the_others_out() {
    within_a_minute(|| {
        let (_, outcome) =
            outcome_of_programs(&[Some(vec![Op::Hang]), Some(vec![Op::Panic("oh")])]);
        let Outcome::Failed(VmError::Panicked { vcpu: 1, message }) = &outcome else {
            panic!("{outcome:?}");
        };
        assert_eq!(message, "oh");
    });
}

#[test]
fn a_panic_of_a_processor_that_leaves_loses_nobody_who_waits() {
    within_a_minute(|| {
        let (machine, outcome) = outcome_of_programs(&[Some(vec![Op::PanicAtTheEnd])]);
        assert!(matches!(outcome, Outcome::Halted), "the first outcome stands: {outcome:?}");
        assert_eq!(machine.space().left.load(Ordering::Relaxed), 1);
    });
}

#[test]
fn what_the_bus_refuses_ends_it_with_the_place() {
    within_a_minute(|| {
        let (_, outcome) = outcome_of_programs(&[Some(vec![Op::Out(0x80, vec![1])])]);
        let Outcome::Failed(error) = outcome else { panic!("{outcome:?}") };
        assert!(error.to_string().starts_with("vCPU 0 at RIP 0x1000: "), "{error}");
    });
}

#[test]
fn one_that_hangs_is_kicked_out_and_nothing_of_it_is_left() {
    within_a_minute(|| {
        let (mut machine, _) = machine(FakeBus::default(), &[Some(vec![Op::Hang])]);
        machine.start().unwrap();
        await_inside(&machine, 0);
        machine.interrupt();
        assert!(machine.wait(Some(Duration::from_millis(1))).is_none(), "back in");
        machine.kill();
        assert!(matches!(machine.wait(None), Some(Outcome::Killed)));

        // So does the drop.
        let (mut machine, _) = self::machine(FakeBus::default(), &[Some(vec![Op::Hang])]);
        machine.start().unwrap();
        await_inside(&machine, 0);
        let space = Arc::downgrade(machine.space());
        // As whoever ends it, maybe a thread of the space, keeps for a moment.
        let core = machine.core.clone();
        drop(machine);
        assert!(space.upgrade().is_none(), "a thread has it still, or the core does");
        core.ender().end(Outcome::Killed);
    });
}

#[test]
fn one_that_waits_for_a_page_is_let_go_once_the_machine_is_over() {
    within_a_minute(|| {
        let (mut machine, _) =
            machine(FakeBus::default(), &[Some(vec![Op::AwaitPage, Op::Exit(4)])]);
        machine.start().unwrap();
        await_inside(&machine, 0);
        assert!(machine.wait(Some(PAGE_PATIENCE)).is_none());
        assert!(!*lock(&machine.space().is_let_go), "it is not over: it waits");
        machine.kill();
        let outcome = machine.wait(None);
        assert!(matches!(outcome, Some(Outcome::Killed)), "no guest code after: {outcome:?}");
        assert!(*lock(&machine.space().is_let_go));
    });
}

#[test]
fn what_is_done_outside_pauses_all_and_is_in_a_new_epoch() {
    within_a_minute(|| {
        let programs = [Some(vec![Op::Outside, Op::Exit(5)]), Some(vec![Op::Hang])];
        let (machine, outcome) = outcome_of_programs(&programs);
        assert!(matches!(outcome, Outcome::GuestExit(5)), "{outcome:?}");
        let epochs = lock(&machine.space().epochs);
        assert!(epochs.contains(&0) && epochs.contains(&1), "{epochs:?}");
    });
}

#[test]
fn accounts_make_a_clone_that_goes_on_from_there() {
    within_a_minute(|| {
        let programs = [Some(vec![Op::Work, Op::Hang, Op::Exit(6)]), None];
        let (mut source, _) = machine(FakeBus::default(), &programs);
        source.start().unwrap();
        await_inside(&source, 0);
        let mut census = source.census(&mut BriefWait::begin()).unwrap();
        let starts = census.take().unwrap();
        drop(census);
        assert_eq!(starts.len(), 2);
        let went_on = starts[0].clone().unwrap();
        // It may have been taken out before its first step.
        assert!(went_on.ends_with(&[Op::Hang, Op::Exit(6)]), "{went_on:?}");
        assert!(starts[1].is_none(), "parked");

        let (mut clone, _) = machine(FakeBus::default(), &[None, None]);
        clone.begin_by(starts);
        clone.start().unwrap();
        await_inside(&clone, 0);
        clone.kill();
        assert!(matches!(clone.wait(None), Some(Outcome::Killed)));
        // The source went on, and is as it was.
        await_inside(&source, 0);
        source.kill();
        assert!(matches!(source.wait(None), Some(Outcome::Killed)));
        assert!(matches!(source.census(&mut BriefWait::begin()), Err(VmError::NotRunning)));
    });
}

#[test]
fn whoever_works_beside_the_vcpus_ends_it_and_is_waited_for() {
    within_a_minute(|| {
        let bus = FakeBus { has_thread: true, ..FakeBus::default() };
        let (mut machine, bus) = machine(bus, &[Some(vec![Op::Hang])]);
        machine.start().unwrap();
        machine.start().unwrap();
        await_inside(&machine, 0);
        bus.fire();
        let outcome = machine.wait(None);
        assert!(matches!(outcome, Some(Outcome::GuestExit(9))), "{outcome:?}");
        assert!(*lock(&bus.is_over));
        drop(machine);
        assert_eq!(Arc::strong_count(&bus), 1, "its thread is joined");
    });
}

#[test]
fn one_that_cannot_start_is_over() {
    within_a_minute(|| {
        let bus = FakeBus { cannot_start: true, ..FakeBus::default() };
        let (mut machine, bus) = machine(bus, &[Some(vec![Op::Work])]);
        let refused = machine.start().unwrap_err();
        assert!(refused.to_string().contains("none left"), "{refused}");
        assert!(*lock(&bus.is_over));
        assert!(machine.wait(None).is_none());
    });
}
