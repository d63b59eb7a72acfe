//! These run where the process may handle kernel-mode faults, and are ignored elsewhere; the refusal
//! itself is checked.

use std::sync::mpsc;
use std::thread;
use std::time::Instant;

use vm_memory::{Bytes, FileOffset, VolatileMemory};

use super::*;
use crate::memory::create_memfd;

const PAGES: usize = 8;

/// A window, and the host's own mapping of the same file.
fn opened() -> (MmapRegion, Arc<MmapRegion>, Arc<Window>) {
    let bytes = PAGES * PAGE_SIZE;
    let file = create_memfd("gnomon-test", bytes as u64).unwrap();
    let host = file.try_clone().unwrap();
    let host = MmapRegion::from_file(FileOffset::new(host, 0), bytes).unwrap();
    let region = Arc::new(MmapRegion::from_file(FileOffset::new(file, 0), bytes).unwrap());
    let window = Window::open(region.clone(), 0..bytes, Features::all());
    (host, region, Arc::new(window.unwrap_or_else(|error| panic!("{error}"))))
}

/// What was found when this was built (`build.rs`) is what is there: no test is ignored that could
/// run, and what cannot says what to do.
#[test]
fn tests_are_ignored_exactly_where_faults_cannot_be_handled() {
    let bytes = PAGES * PAGE_SIZE;
    let file = create_memfd("gnomon-test", bytes as u64).unwrap();
    let region = Arc::new(MmapRegion::from_file(FileOffset::new(file, 0), bytes).unwrap());
    let found = Window::open(region, 0..bytes, Features::all());
    let now = found.as_ref().map(Window::protects_at_install).ok();
    let built = cfg!(kernel_faults).then_some(cfg!(protecting_faults));
    assert_eq!(now, built, "the host or its user has changed: touch build.rs ({found:?})");
    if let Err(error @ UffdError::NotPermitted { .. }) = found {
        assert!(error.to_string().contains("CAP_SYS_PTRACE"), "{error}");
        assert!(!nix::unistd::geteuid().is_root(), "root is permitted: {error}");
    }
}

fn next(window: &Window) -> WindowEvent {
    let begin = Instant::now();
    let mut events = Vec::new();
    while events.is_empty() && begin.elapsed() < Duration::from_secs(20) {
        window.wait(Some(Duration::from_millis(20))).unwrap();
        window.read(&mut events).unwrap();
    }
    assert_eq!(events.len(), 1);
    events[0]
}

fn fill(host: &MmapRegion, page: usize) {
    host.as_volatile_slice().write_obj(page as u64 + 1, page * PAGE_SIZE).unwrap();
}

#[test]
#[cfg_attr(
    not(kernel_faults),
    ignore = "no userfaultfd for kernel-mode faults here: see `gnomon doctor`"
)]
fn a_page_is_missing_then_minor_then_protected_and_the_errnos_have_names() {
    let (host, region, window) = opened();
    let touch = |write: bool| {
        let region = region.clone();
        thread::spawn(move || {
            let slice = region.as_volatile_slice();
            if write {
                slice.write_obj(9_u64, PAGE_SIZE).unwrap();
            }
            slice.read_obj::<u64>(PAGE_SIZE).unwrap()
        })
    };
    let reader = touch(false);
    let fault = |write, protected| WindowEvent::Fault { offset: PAGE_SIZE, write, protected };
    assert_eq!(next(&window), fault(false, false));
    assert_eq!(window.install(PAGE_SIZE, PAGE_SIZE, false), Err(InstallError::NoPage));
    fill(&host, 1);
    let protects = window.protects_at_install();
    assert_eq!(window.install(PAGE_SIZE, PAGE_SIZE, protects), Ok(PAGE_SIZE));
    assert_eq!(reader.join().unwrap(), 2);
    assert_eq!(window.install(PAGE_SIZE, PAGE_SIZE, false), Err(InstallError::Mapped));
    if !protects {
        window.write_protect(PAGE_SIZE, PAGE_SIZE, true).unwrap();
    }
    let writer = touch(true);
    assert_eq!(next(&window), fault(true, true));
    window.write_protect(PAGE_SIZE, PAGE_SIZE, false).unwrap();
    assert_eq!(writer.join().unwrap(), 9);
    window.write_protect(PAGE_SIZE, PAGE_SIZE, true).unwrap();
    let writer = touch(true);
    assert_eq!(next(&window), fault(true, true));
    window.unregister().unwrap();
    assert_eq!(writer.join().unwrap(), 9, "nobody waits for a range that was given up");
    assert_eq!(window.install(0, PAGE_SIZE, false), Err(InstallError::NotRegistered));
}

#[test]
#[cfg_attr(
    not(kernel_faults),
    ignore = "no userfaultfd for kernel-mode faults here: see `gnomon doctor`"
)]
fn a_run_is_mapped_up_to_the_first_page_that_cannot_be() {
    let (host, _region, window) = opened();
    [0, 1, 2, 4].iter().for_each(|&page| fill(&host, page));
    assert_eq!(window.install(0, 5 * PAGE_SIZE, false), Ok(3 * PAGE_SIZE));
    let protects = window.protects_at_install();
    assert_eq!(window.install(4 * PAGE_SIZE, PAGE_SIZE, protects), Ok(PAGE_SIZE));
    let out = PAGES * PAGE_SIZE;
    for (offset, len) in [(1, PAGE_SIZE), (out, PAGE_SIZE), (0, out + PAGE_SIZE), (usize::MAX, 1)] {
        let refused = Err(InstallError::Refused(Errno::EINVAL));
        assert_eq!(window.install(offset, len, false).map(drop), refused);
        assert_eq!(window.write_protect(offset, len, true), refused);
        assert_eq!(window.wake(offset, len), refused);
    }
}

#[test]
#[cfg_attr(
    not(kernel_faults),
    ignore = "no userfaultfd for kernel-mode faults here: see `gnomon doctor`"
)]
fn nothing_is_installed_while_a_removal_is_unread() {
    let (host, region, window) = opened();
    [0, 1].iter().for_each(|&page| fill(&host, page));
    let remover = thread::spawn({
        let region = region.clone();
        move || crate::memory::remove(&region, PAGE_SIZE, PAGE_SIZE).unwrap()
    });
    assert!(window.wait(Some(Duration::from_secs(20))).unwrap());
    assert_eq!(window.install(0, PAGE_SIZE, false), Err(InstallError::Changing));
    assert_eq!(window.write_protect(0, PAGE_SIZE, true), Err(InstallError::Changing));
    assert!(!remover.is_finished());
    assert_eq!(next(&window), WindowEvent::Removed { offset: PAGE_SIZE, len: PAGE_SIZE });
    remover.join().unwrap();
    assert_eq!(window.install(0, PAGE_SIZE, false), Ok(PAGE_SIZE));
    assert_eq!(window.install(PAGE_SIZE, PAGE_SIZE, false), Err(InstallError::NoPage));
}

/// The kernel hands out a fault first, whatever came before it.
#[test]
#[cfg_attr(
    not(kernel_faults),
    ignore = "no userfaultfd for kernel-mode faults here: see `gnomon doctor`"
)]
fn a_fault_is_read_before_a_removal_that_came_first() {
    let (_host, region, window) = opened();
    let remover = thread::spawn({
        let region = region.clone();
        move || crate::memory::remove(&region, 0, PAGE_SIZE).unwrap()
    });
    assert!(window.wait(Some(Duration::from_secs(20))).unwrap());
    let (thread_of, toucher_is) = mpsc::channel();
    let toucher = thread::spawn({
        let region = region.clone();
        move || {
            thread_of.send(nix::unistd::gettid()).unwrap();
            region.as_volatile_slice().read_obj::<u8>(0).unwrap()
        }
    });
    await_fault(toucher_is.recv().unwrap());
    let mut events = Vec::new();
    window.read(&mut events).unwrap();
    assert_eq!(
        events,
        [
            WindowEvent::Fault { offset: 0, write: false, protected: false },
            WindowEvent::Removed { offset: 0, len: PAGE_SIZE }
        ]
    );
    window.unregister().unwrap();
    assert_eq!((remover.join().unwrap(), toucher.join().unwrap()), ((), 0));
}

/// Waits until a thread sleeps in the kernel without a system call: in a fault.
fn await_fault(thread: nix::unistd::Pid) {
    let begin = Instant::now();
    let told = |name: &str| {
        std::fs::read_to_string(format!("/proc/self/task/{thread}/{name}")).unwrap_or_default()
    };
    // proc(5): the state follows the name, which ends with the last parenthesis; outside of a system
    // call its number is -1.
    let sleeps = || {
        told("stat").rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('S'))
            && told("syscall").starts_with("-1")
    };
    while !sleeps() {
        assert!(begin.elapsed() < Duration::from_secs(60), "{}", told("stat"));
        thread::yield_now();
    }
}

#[test]
#[cfg_attr(
    not(kernel_faults),
    ignore = "no userfaultfd for kernel-mode faults here: see `gnomon doctor`"
)]
fn an_interrupt_ends_one_wait() {
    let (_host, _region, window) = opened();
    window.interrupt().unwrap();
    assert!(!window.wait(None).unwrap());
    assert!(!window.wait(Some(Duration::from_millis(1))).unwrap());
}

#[test]
#[cfg_attr(
    not(kernel_faults),
    ignore = "no userfaultfd for kernel-mode faults here: see `gnomon doctor`"
)]
fn a_kernel_that_lacks_a_feature_is_refused_with_its_name() {
    let (_host, region, window) = opened();
    window.unregister().unwrap();
    let mask = Features::all().difference(Features::MINOR_SHMEM);
    let refused = Window::open(region, 0..PAGE_SIZE, mask).unwrap_err();
    assert!(refused.to_string().contains("MINOR_SHMEM"), "{refused}");
}
