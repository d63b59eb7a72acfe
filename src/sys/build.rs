//! What some unit tests need of the host: they are built as *ignored*, with the reason, where it is not
//! there, so that a green run never hides what was not run.
//!
//! Cargo's test harness cannot be told by a test that it is to be ignored. So the host is looked at when
//! the tests are built, and two tests compare what was found here with what is there when they run
//! (`tests_are_ignored_exactly_where_…` in `src/sys/uffd_window_tests.rs` and `src/sys/generous.rs`).
//! Nothing but `ignore` depends on it: the library is the same on every host.

// Without the crates that the library has for these calls: they would be built twice.
#![allow(unsafe_code)]

use std::env;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::thread;

/// Page faults of the kernel's own accesses can be handled, with all that direct paging needs; and also
/// what it can do without, pages that are protected as they are mapped. Bits of linux/userfaultfd.h: write
/// protection, of shared memory, too, missing and minor pages of shared memory, removals and other changes
/// of mappings, numbers of threads; and write protection of what is not mapped.
const KERNEL_FAULTS: [(&str, &[u32]); 2] = [
    ("kernel_faults", &[0, 2, 3, 5, 6, 8, 10, 12]),
    ("protecting_faults", &[0, 2, 3, 5, 6, 8, 10, 12, 13]),
];
/// A tmpfs of huge pages can be mounted.
const HUGE_TMPFS: &str = "huge_tmpfs";

/// Tells the compiler what there is, and the build scripts of the crates above (`DEP_GNOMON_SYS_…`). The
/// host is looked at for tests only.
fn main() {
    // Rights differ between users; a build directory may be used by several.
    println!("cargo::rerun-if-env-changed=USER");
    println!("cargo::rerun-if-changed=build.rs");
    let is_testing = env::var_os("CARGO_FEATURE_TESTING").is_some();
    let features = if is_testing { uffd_features().unwrap_or(0) } else { 0 };
    let has = |bits: &[u32]| bits.iter().all(|bit| features & 1 << bit != 0);
    let found = KERNEL_FAULTS.map(|(name, bits)| (name, has(bits)));
    for (name, is_there) in found.into_iter().chain([(HUGE_TMPFS, is_testing && huge_tmpfs())]) {
        println!("cargo::rustc-check-cfg=cfg({name})");
        if is_there {
            println!("cargo::rustc-cfg={name}");
            println!("cargo::metadata={name}=1");
        }
    }
}

/// `struct uffdio_api` of linux/userfaultfd.h.
#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

const UFFD_API: u64 = 0xaa;
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xaa00;

/// What it can do, if it may be had for kernel-mode faults: as `src/sys/uffd.rs` goes about it.
fn uffd_features() -> Option<u64> {
    let descriptor = by_device().or_else(by_call)?;
    let mut api = UffdioApi { api: UFFD_API, features: 0, ioctls: 0 };
    // SAFETY: the ioctl reads and writes one uffdio_api, which `api` is.
    let result = unsafe { libc::ioctl(descriptor.as_raw_fd(), UFFDIO_API, &raw mut api) };
    (result == 0).then_some(api.features)
}

fn by_device() -> Option<OwnedFd> {
    let device = OpenOptions::new().read(true).write(true).open("/dev/userfaultfd").ok()?;
    // SAFETY: takes an integer and touches no memory.
    let raw = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, libc::O_CLOEXEC) };
    // SAFETY: a new descriptor that nothing else owns.
    (raw >= 0).then(|| unsafe { OwnedFd::from_raw_fd(raw) })
}

fn by_call() -> Option<OwnedFd> {
    // SAFETY: takes an integer and touches no memory.
    let raw = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
    let raw = i32::try_from(raw).ok().filter(|raw| *raw >= 0)?;
    // SAFETY: a new descriptor that nothing else owns.
    Some(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// In a mount namespace of a thread of its own, which goes away with it.
fn huge_tmpfs() -> bool {
    thread::spawn(|| takes_huge_page().unwrap_or(false)).join().unwrap_or(false)
}

fn takes_huge_page() -> io::Result<bool> {
    let folder = env::var_os("OUT_DIR").unwrap_or_default();
    let folder = Path::new(&folder).join("tmpfs");
    fs::create_dir_all(&folder)?;
    let path = [folder.as_os_str().as_bytes(), b"\0"].concat();
    // SAFETY: changes what this thread sees.
    check(unsafe { libc::unshare(libc::CLONE_NEWNS) })?;
    let null = std::ptr::null();
    let private = libc::MS_REC | libc::MS_PRIVATE;
    // SAFETY: the texts end with NUL, and the others are not looked at.
    check(unsafe { libc::mount(null, c"/".as_ptr(), null, private, null.cast()) })?;
    let (kind, options) = (c"tmpfs".as_ptr(), c"huge=always".as_ptr());
    // SAFETY: all texts end with NUL.
    check(unsafe { libc::mount(kind, path.as_ptr().cast(), kind, 0, options.cast()) })?;
    let file = File::create(folder.join("page"))?;
    file.set_len(4 << 20)?;
    file.write_all_at(&[1], 0)?;
    // More than one page of 8 sectors.
    Ok(file.metadata()?.blocks() > 8)
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
