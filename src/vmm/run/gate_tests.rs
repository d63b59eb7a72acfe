use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Barrier, mpsc};
use std::time::Duration;

use crate::sys::signal::pretended;
use crate::vmm::run::fakes::{FakeKick, within_a_minute};

use super::*;

fn gate(vcpus: usize) -> (Arc<Gate>, Vec<Arc<FakeKick>>) {
    let kicks: Vec<Arc<FakeKick>> = (0..vcpus).map(|_| Arc::default()).collect();
    let dynamic = kicks.iter().map(|kick| kick.clone() as Arc<dyn Kick>).collect();
    (Arc::new(Gate::new(dynamic)), kicks)
}

#[test]
fn nobody_is_inside_while_the_work_runs() {
    within_a_minute(|| {
        const VCPUS: usize = 4;
        let (gate, kicks) = gate(VCPUS);
        let inside = AtomicUsize::new(0);
        let pauses = AtomicUsize::new(0);
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for (vcpu, kick) in kicks.iter().enumerate() {
                let (gate, inside) = (&gate, &inside);
                scope.spawn(move || {
                    while let Ok(pass) = gate.enter(vcpu) {
                        inside.fetch_add(1, Ordering::SeqCst);
                        kick.run_until_kicked();
                        inside.fetch_sub(1, Ordering::SeqCst);
                        drop(pass);
                    }
                });
            }
            for epoch in 0..200 {
                let result = gate.pause_all(epoch, None, || {
                    assert_eq!(inside.load(Ordering::SeqCst), 0);
                    pauses.fetch_add(1, Ordering::SeqCst);
                    assert!(!gate.positions().contains(&Position::Inside));
                });
                assert_eq!(result, Paused::Done(()));
            }
            done.store(true, Ordering::SeqCst);
            gate.stop();
        });
        assert_eq!(pauses.load(Ordering::SeqCst), 200);
    });
}

#[test]
fn two_vcpus_that_want_the_same_pause_do_it_once() {
    within_a_minute(|| {
        let (gate, kicks) = gate(2);
        for round in 0..100 {
            let runs = AtomicUsize::new(0);
            let both_inside = Barrier::new(2);
            std::thread::scope(|scope| {
                for (vcpu, kick) in kicks.iter().enumerate() {
                    let (gate, runs, both_inside) = (&gate, &runs, &both_inside);
                    scope.spawn(move || {
                        let pass = gate.enter(vcpu).unwrap();
                        both_inside.wait();
                        if vcpu == 1 && round % 2 == 0 {
                            kick.run_until_kicked();
                        }
                        // Both were inside in this epoch, and both ran out of shadow pages.
                        let epoch = pass.epoch;
                        drop(pass);
                        let result =
                            gate.pause_all(epoch, None, || runs.fetch_add(1, Ordering::SeqCst));
                        assert!(matches!(result, Paused::Done(_) | Paused::AlreadyDone));
                    });
                }
            });
            assert_eq!(runs.load(Ordering::SeqCst), 1);
        }
    });
}

#[test]
fn the_epoch_tells_that_a_pause_happened() {
    let (gate, _) = gate(1);
    let before = gate.enter(0).unwrap().epoch;
    assert_eq!(gate.pause_all(before, None, || 7), Paused::Done(7));
    assert_eq!(gate.pause_all(before, None, || 8), Paused::AlreadyDone);
    assert_eq!(gate.enter(0).unwrap().epoch, before + 1);
}

#[test]
fn a_stop_gets_everybody_out_even_in_a_pause() {
    within_a_minute(|| {
        let (gate, kicks) = gate(2);
        let (entered, wait) = mpsc::channel();
        std::thread::scope(|scope| {
            // A vCPU that does not come out until stopped by hand.
            let stuck = {
                let gate = &gate;
                scope.spawn(move || {
                    let pass = gate.enter(0).unwrap();
                    entered.send(()).unwrap();
                    while !lock(&gate.state).is_stopping {
                        std::thread::yield_now();
                    }
                    drop(pass);
                })
            };
            wait.recv().unwrap();
            let pauser = scope.spawn(|| gate.pause_all(0, None, || ()));
            let waiting = scope.spawn(|| {
                // Arrives while the gate is closed, or before; is turned away in either case.
                while let Ok(pass) = gate.enter(1) {
                    kicks[1].run_until_kicked();
                    drop(pass);
                }
            });
            while !lock(&gate.state).is_closed {
                std::thread::yield_now();
            }
            gate.stop();
            assert_eq!(pauser.join().unwrap(), Paused::Stopping);
            waiting.join().unwrap();
            stuck.join().unwrap();
        });
        assert_eq!(gate.enter(0).err(), Some(Refused::Stopping));
        assert_eq!(gate.pause_all(0, None, || ()), Paused::Stopping);
    });
}

/// With a vCPU inside that comes out only when the closure has returned.
fn with_one_that_does_not_come(body: impl FnOnce(&Gate, &[Arc<FakeKick>]) + Send + 'static) {
    within_a_minute(|| {
        let (gate, kicks) = gate(2);
        let (to_test, from_vcpu) = mpsc::channel();
        let (let_go, let_me_go) = mpsc::channel::<()>();
        std::thread::scope(|scope| {
            let gate = &gate;
            scope.spawn(move || {
                let _pass = gate.enter(0).unwrap();
                to_test.send(()).unwrap();
                // An error is the end of the test.
                let _ = let_me_go.recv();
            });
            from_vcpu.recv().unwrap();
            body(gate, &kicks);
            drop(let_go);
        });
    });
}

fn assert_as_before(gate: &Gate, epoch: u64) {
    // Another vCPU gets in while the first is still there.
    assert_eq!(gate.enter(1).unwrap().epoch, epoch);
    assert_eq!(gate.positions(), [Position::Inside, Position::Outside]);
}

#[test]
fn who_waits_for_a_vcpu_that_does_not_come_gives_up_when_a_stop_is_asked_for() {
    with_one_that_does_not_come(|gate, kicks| {
        let epoch = gate.epoch();
        let stop = pretended::Stop::after(3);
        let hour = BriefWait::of(Duration::from_secs(3600));
        assert_eq!(gate.pause_all(epoch, Some(hour), || ()), Paused::GivenUp);
        drop(stop);
        assert!(kicks[0].is_kicked(), "it was asked to come");
        assert_as_before(gate, epoch);
    });
}

#[test]
fn who_waits_for_a_vcpu_that_does_not_come_gives_up_in_time() {
    with_one_that_does_not_come(|gate, _| {
        let epoch = gate.epoch();
        let brief = || Some(BriefWait::of(Duration::from_millis(1)));
        assert_eq!(gate.pause_all(epoch, brief(), || ()), Paused::GivenUp);
        assert_as_before(gate, epoch);
        // Outside of another one's pause, too.
        std::thread::scope(|scope| {
            let first = scope.spawn(|| gate.pause_all(epoch, None, || ()));
            while !lock(&gate.state).is_closed {
                std::thread::yield_now();
            }
            assert_eq!(gate.pause_all(epoch, brief(), || ()), Paused::GivenUp);
            assert!(lock(&gate.state).is_closed, "it is the first one's to open");
            gate.stop();
            assert_eq!(first.join().unwrap(), Paused::Stopping, "nobody has come out");
        });
    });
}

#[test]
fn work_that_panics_leaves_the_gate_open() {
    let (gate, _) = gate(1);
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        gate.pause_all(0, None, || panic!("on purpose"))
    }));
    assert!(result.is_err());
    assert_eq!(gate.enter(0).unwrap().epoch, 1);
}

#[test]
fn a_hold_sends_everybody_away_until_it_ends() {
    within_a_minute(|| {
        let (gate, kicks) = gate(1);
        let (to_test, from_vcpu) = mpsc::channel();
        std::thread::scope(|scope| {
            let (gate, kick) = (&gate, &kicks[0]);
            scope.spawn(move || {
                loop {
                    match gate.enter(0) {
                        Ok(_pass) => kick.run_until_kicked(),
                        Err(Refused::Held) => {
                            assert!(kick.is_kicked(), "it cannot run, were it to try");
                            to_test.send(()).unwrap();
                            std::thread::yield_now();
                        }
                        Err(Refused::Stopping) => return,
                    }
                }
            });
            let epoch = lock(&gate.state).epoch;
            let hold = gate.hold();
            // Twice, so that one of them is not from before the hold.
            from_vcpu.recv().unwrap();
            from_vcpu.recv().unwrap();
            assert_eq!(gate.positions(), [Position::Paused]);
            assert_eq!(gate.pause_all(epoch, None, || 7), Paused::Done(7), "a pause goes first");
            drop(hold);
            while gate.positions() != [Position::Inside] {
                std::thread::yield_now();
            }
            gate.stop();
        });
    });
}
