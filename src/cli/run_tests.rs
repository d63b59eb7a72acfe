use std::cell::Cell;

use super::*;
use crate::addr::{Gpa, PAGE_SIZE, PAGE_SIZE_U64};
use crate::cli::inject::parse_injection;
use crate::host_mm::{HostMmConfig, InjectionPlan, MIN_HOST_MEMORY_BYTES, Placement};
use crate::lab::{Check, EndCheck, Violation};
use crate::sys::signal::pretended;
use crate::vmm::{KvmError, VmError};

/// Ends after so many looks, or when it is killed, or not even then.
struct FakeGuest {
    looks_left: u32,
    obeys: bool,
    typed_after: u32,
    is_killed: bool,
    tended: u32,
    mm: Arc<HostMm>,
}

impl FakeGuest {
    fn new(looks_left: u32) -> Self {
        let mm = HostMm::new(HostMmConfig::new(MIN_HOST_MEMORY_BYTES)).unwrap();
        Self { looks_left, obeys: true, typed_after: u32::MAX, is_killed: false, tended: 0, mm }
    }
}

impl Guest for FakeGuest {
    fn start(&mut self) -> anyhow::Result<()> {
        Ok(())
    }

    fn wait(&mut self, _timeout: Duration) -> Option<Outcome> {
        if self.is_killed && self.obeys {
            return Some(Outcome::Killed);
        }
        self.looks_left = self.looks_left.saturating_sub(1);
        (self.looks_left == 0).then_some(Outcome::PoweredOff)
    }

    fn kill(&mut self) {
        self.is_killed = true;
    }

    fn tend(&mut self) {
        self.tended += 1;
    }

    fn is_ended_by_user(&self) -> bool {
        self.tended >= self.typed_after
    }

    fn check(&self, _is_at_rest: bool) -> Violations {
        Violations::default()
    }

    fn host_mm(&self) -> &Arc<HostMm> {
        &self.mm
    }

    fn memory(&self) -> impl Iterator<Item = &Arc<MemoryObject>> {
        std::iter::empty()
    }

    fn figures(&self) -> Vec<String> {
        Vec::new()
    }

    fn lost_console_bytes(&self) -> u64 {
        0
    }
}

/// Waits for its end; a signal comes at the look of that number. Whether it was given up is told, too.
fn end_of(guest: &mut FakeGuest, signal_at: u32) -> (End, bool) {
    let (looks, given_up) = (Cell::new(0), Cell::new(false));
    let signal = || {
        looks.set(looks.get() + 1);
        (looks.get() >= signal_at).then_some(2)
    };
    let end = wait(guest, signal, || given_up.set(true));
    (end, given_up.get())
}

#[test]
fn a_guest_is_waited_for_until_it_ends_and_tended_meanwhile() {
    let mut guest = FakeGuest::new(5);
    let (end, given_up) = end_of(&mut guest, u32::MAX);
    assert!(matches!(end, End::Outcome(Outcome::PoweredOff)));
    assert_eq!((guest.tended, guest.is_killed, given_up), (5, false, false));
}

#[test]
fn a_signal_and_the_users_word_end_it() {
    let mut guest = FakeGuest::new(u32::MAX);
    let (end, given_up) = end_of(&mut guest, 3);
    assert!(matches!(end, End::Signal(2)) && given_up && guest.is_killed);
    assert_eq!(guest.tended, 3);

    let mut guest = FakeGuest { typed_after: 4, ..FakeGuest::new(u32::MAX) };
    let (end, given_up) = end_of(&mut guest, u32::MAX);
    assert!(matches!(end, End::Typed) && given_up && guest.is_killed);
}

#[test]
fn a_guest_may_be_faster_than_the_signal_or_stuck_after_it() {
    let mut guest = FakeGuest { obeys: false, ..FakeGuest::new(3) };
    let (end, _) = end_of(&mut guest, 1);
    assert!(matches!(end, End::Outcome(Outcome::PoweredOff)) && guest.is_killed);

    let _stop = pretended::Stop::after(3);
    let mut guest = FakeGuest { obeys: false, ..FakeGuest::new(u32::MAX) };
    let (end, _) = end_of(&mut guest, 1);
    assert!(matches!(end, End::Stuck(Some(2))));
    let said = end.sentence();
    assert_eq!(said, "the guest was ended by signal 2, before all its vCPUs had stopped");
}

#[test]
fn the_exit_code_is_the_guests_unless_something_else_happened() {
    let clean = Violations::default();
    let mut bad = Violations::default();
    bad.add_one(Violation::of_run("stale"));
    let failed = Outcome::Failed(VmError::Kvm(KvmError::Missing));
    let code = |outcome, found: &Violations| End::Outcome(outcome).exit_code(found);
    assert_eq!(code(Outcome::PoweredOff, &clean), 0);
    assert_eq!(code(Outcome::PoweredOff, &bad), 1);
    assert_eq!(code(Outcome::GuestExit(35), &clean), 35);
    assert_eq!(code(Outcome::GuestExit(35), &bad), 35);
    assert_eq!(code(failed, &clean), 1);
    assert_eq!(End::Signal(2).exit_code(&clean), 130);
    assert_eq!(End::Signal(15).exit_code(&clean), 143);
    assert_eq!(End::Stuck(Some(2)).exit_code(&clean), 130);
    assert_eq!(End::Stuck(None).exit_code(&clean), 1);
}

#[test]
fn lost_output_and_violations_are_told() {
    let mut found = Violations::default();
    let texts = (0..30).map(|n| format!("violation \x07{n}"));
    found.add(Check::GuestOracle, texts, 3000);
    found.unchecked.insert(EndCheck::ReverseMap);
    let lines = complaints(&found, 12, None);
    assert!(lines[0].starts_with("12 bytes"), "{lines:?}");
    assert_eq!(lines[1], "violations: 3,000");
    assert_eq!(lines.len(), 2 + SHOWN);
    assert!(lines[2].ends_with("\\u{7}0"), "{lines:?}");
    let lines = complaints(&found, 0, Some(15));
    assert_eq!(lines[0], "cut short by signal 15; not checked: the reverse map (I3)");
    assert!(complaints(&Violations::default(), 0, Some(15)).is_empty());
}

#[test]
fn the_exit_code_says_how_it_ended() {
    let clean = Violations::default();
    let mut bad = Violations::default();
    bad.add_one(Violation::of_run("something"));
    assert_eq!(End::Outcome(Outcome::PoweredOff).exit_code(&clean), 0);
    assert_eq!(End::Outcome(Outcome::Rebooted).exit_code(&clean), 0);
    assert_eq!(End::Outcome(Outcome::PoweredOff).exit_code(&bad), 1);
    assert_eq!(End::Typed.exit_code(&clean), 0);
    assert_eq!(End::Typed.exit_code(&bad), 1);
    assert_eq!(End::Signal(15).exit_code(&bad), 143);
    assert_eq!(End::Stuck(None).exit_code(&clean), 1);
    assert_eq!(End::Stuck(Some(2)).exit_code(&clean), 130);
    let failed = Outcome::Failed(VmError::NotRunning);
    assert_eq!(End::Outcome(failed).exit_code(&clean), 1);
}

/// Memory of a guest that fits into host memory as often as is said, all of it written, with a fault.
fn written_memory(times: u64, item: &str) -> Arc<MemoryObject> {
    let bytes = MIN_HOST_MEMORY_BYTES * times;
    let config = HostMmConfig {
        placement: Placement::Identity { guest_bytes: bytes },
        inject: InjectionPlan {
            items: vec![parse_injection(item).unwrap()],
            seed: 1,
            ..InjectionPlan::default()
        },
        ..HostMmConfig::new(MIN_HOST_MEMORY_BYTES)
    };
    let object = HostMm::new(config).unwrap().create_object(bytes).unwrap();
    for number in 0..bytes / PAGE_SIZE_U64 {
        let content = [number.to_le_bytes()[0] | 1; PAGE_SIZE];
        object.write(Gpa::new(number * PAGE_SIZE_U64), &content).unwrap();
    }
    object
}

fn concluded(end: &End, object: &Arc<MemoryObject>) -> (Vec<String>, u8) {
    let mut found = Violations::default();
    let lines = conclude(end, object.host_mm(), [object], &mut found);
    (lines, end.exit_code(&found))
}

#[test]
fn what_was_injected_is_told_and_where_the_pages_are() {
    let object = written_memory(2, "short-write@3");
    let (lines, code) = concluded(&End::Outcome(Outcome::PoweredOff), &object);
    assert_eq!((lines.len(), code), (2, 0), "{lines:?}");
    assert!(lines[0].starts_with("injected short-write@3: struck 1 of "), "{lines:?}");
    assert!(lines[1].contains("pages at the end: ") && lines[1].ends_with(" 0 lost"), "{lines:?}");
    assert!(!lines[1].contains(" 0 read back"), "{lines:?}");
}

#[test]
fn what_never_struck_is_a_failure_if_the_guest_came_to_its_end() {
    let object = written_memory(1, "swap-read=EIO@1000000");
    for end in [Outcome::PoweredOff, Outcome::Rebooted].map(End::Outcome) {
        let (lines, code) = concluded(&end, &object);
        assert!(lines[0].contains("never struck"), "{lines:?}");
        assert_eq!(code, 1);
    }
    assert_eq!(concluded(&End::Typed, &object).1, 0, "it had no time to");
    assert_eq!(concluded(&End::Signal(15), &object).1, 143);
    assert_eq!(concluded(&End::Stuck(None), &object), (Vec::new(), 1), "its pages may be in use");
}

#[test]
fn nothing_is_told_where_nothing_was_injected() {
    let mm = HostMm::new(HostMmConfig::new(MIN_HOST_MEMORY_BYTES)).unwrap();
    let object = mm.create_object(MIN_HOST_MEMORY_BYTES).unwrap();
    assert_eq!(concluded(&End::Outcome(Outcome::PoweredOff), &object), (Vec::new(), 0));
}
