//! The C library's heap, where addresses are short.

#[cfg(target_env = "gnu")]
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};

/// Has all threads share one heap if the process's addresses are limited (RLIMIT_AS): glibc reserves
/// 64 MiB of them for each further one, for threads that allocate at the same time, and so much can
/// be foreseen by nobody who is asked what a run takes. Call it before there are threads.
pub fn share_if_addresses_are_limited() {
    #[cfg(target_env = "gnu")]
    if getrlimit(Resource::RLIMIT_AS).is_ok_and(|(soft, _)| soft != RLIM_INFINITY) {
        // SAFETY: mallopt takes two integers. Refused, it changes nothing.
        let _ = unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    }
}
