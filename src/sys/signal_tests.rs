//! Tests of `signal.rs`.

use super::*;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::sync::mpsc;
use std::thread;

/// What a read comes back with that nobody ever answers, and whose thread is kicked.
fn of_a_kicked_read(kick: KickSignal) -> Errno {
    let (sender, receiver) = mpsc::channel();
    let reader = thread::spawn(move || {
        let never_written = EventFd::new().unwrap();
        sender.send(kick.this_thread()).unwrap();
        never_written.read().unwrap_err()
    });
    let target = receiver.recv().unwrap();
    // A kick that comes before the read is missed by design, hence more than one.
    while !reader.is_finished() {
        if let Err(error) = target.kick() {
            assert_eq!(error.raw_os_error(), Some(libc::ESRCH), "{error}");
        }
        thread::sleep(Duration::from_millis(1));
    }
    reader.join().unwrap()
}

#[test]
fn a_kick_interrupts_a_blocking_read() {
    assert_eq!(of_a_kicked_read(KickSignal::install().unwrap()), Errno::EINTR);
}

#[test]
fn a_timer_kicks_the_thread_that_started_it_until_it_is_dropped() {
    let kick = KickSignal::install().unwrap();
    let every = Duration::from_millis(1);
    let timer = KickTimer::start(kick, every, every).unwrap();
    let never_written = EventFd::new().unwrap();
    for _ in 0..3 {
        assert_eq!(never_written.read().unwrap_err(), Errno::EINTR);
    }
    // Another thread is left alone.
    let slept = thread::spawn(|| poll(&mut [], PollTimeout::from(20u8))).join().unwrap();
    assert_eq!(slept, Ok(0));
    drop(timer);
    // One that was on its way may still come.
    let _ = poll(&mut [], PollTimeout::from(5u8));
    assert_eq!(poll(&mut [], PollTimeout::from(20u8)), Ok(0));
}

#[test]
fn a_kick_of_an_ended_thread_is_an_error() {
    let kick = KickSignal::install().unwrap();
    let target = thread::spawn(move || kick.this_thread()).join().unwrap();
    // join waits for the kernel to clear the thread's id word, which it does just before the
    // thread is gone.
    loop {
        match target.kick() {
            Ok(()) => thread::sleep(Duration::from_millis(1)),
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(libc::ESRCH));
                break;
            }
        }
    }
}

/// Name of the variable that makes the test below the child.
const CHILD_WITHOUT_QUEUE: &str = "GNOMON_TEST_QUEUE_CHILD";

/// Other processes of the user may have filled the queue: as if none had ever been left.
#[test]
fn a_kick_needs_no_room_among_pending_signals() {
    use nix::sys::resource::{Resource, setrlimit};

    if std::env::var_os(CHILD_WITHOUT_QUEUE).is_some() {
        setrlimit(Resource::RLIMIT_SIGPENDING, 0, 0).unwrap();
        assert_eq!(of_a_kicked_read(KickSignal::install().unwrap()), Errno::EINTR);
        return;
    }
    let name = "signal::tests::a_kick_needs_no_room_among_pending_signals";
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(CHILD_WITHOUT_QUEUE, "1")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Name of the test below, and the variable that makes it the child.
const CHILD: &str = "GNOMON_TEST_STOP_CHILD";

/// Signals act on the whole process, so this happens in a child: the same test program with a
/// variable set.
#[test]
fn the_first_stop_is_noted_and_the_second_ends_the_process() {
    if let Some(left_over) = std::env::var_os(CHILD) {
        stop_child(left_over.as_ref());
    }
    let name = "signal::tests::the_first_stop_is_noted_and_the_second_ends_the_process";
    let folder = tempfile::tempdir().unwrap();
    let left_over = folder.path().join("socket");
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(CHILD, &left_over)
        .output()
        .unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(stdout.contains("noted 15"), "{stdout}{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.signal(), Some(libc::SIGINT));
    assert!(!left_over.exists());
}

#[test]
fn what_comes_soon_after_the_first_signal_is_no_second_one() {
    let millis = |count: u64| count * 1_000_000;
    let first = millis(5);
    // A clock that another processor reads a little behind, the same moment, and until it is over.
    for soon in [first - 1, first, first + 1, first + millis(200) - 1] {
        assert!(!is_second(first, soon), "{soon}");
    }
    for late in [first + millis(200), first + millis(1000), u64::MAX] {
        assert!(is_second(first, late), "{late}");
    }
}

fn stop_child(left_over: &std::path::Path) -> ! {
    std::fs::write(left_over, "").unwrap();
    let _removed = crate::names::Leftover::new(left_over).unwrap();
    let stop = StopNotice::install().unwrap();
    assert_eq!((stop.signal(), stop.since(), is_stop_asked()), (None, None, false));
    assert!(!stop.wait(Some(Duration::ZERO)).unwrap());
    nix::sys::signal::raise(nix::sys::signal::Signal::SIGTERM).unwrap();
    assert!(stop.wait(None).unwrap());
    assert!(stop.wait(None).unwrap(), "stays noted");
    assert_eq!(
        StopNotice::install().unwrap().signal(),
        Some(libc::SIGTERM),
        "installing again is harmless"
    );
    assert!(stop.since().is_some() && is_stop_asked() && left_over.exists());
    // The same request once more, just in time.
    let first = STOP_TIME.load(Ordering::Relaxed);
    let window = u64::try_from(SECOND_AFTER.as_nanos()).unwrap();
    // A timer that goes off again and again, and processor time that is used up.
    OTHER_ENDS.into_iter().for_each(|signal| note_stop(signal, first + 3 * window));
    for later in [0, 1, window - 1] {
        note_stop(libc::SIGHUP, first + later);
    }
    assert_eq!(stop.signal(), Some(libc::SIGTERM), "the first one stands");
    println!("noted {}", stop.signal().unwrap());
    // As if it had come as long ago.
    STOP_TIME.store(monotonic_nanos() - window, Ordering::Relaxed);
    nix::sys::signal::raise(nix::sys::signal::Signal::SIGINT).unwrap();
    unreachable!("the second signal ends the process");
}
