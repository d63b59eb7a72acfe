//! Direct paging without KVM: threads touch the window as vCPUs would, and system calls do as KVM.
//!
//! These run where the process may handle kernel-mode faults, and are ignored elsewhere
//! (`src/sys/build.rs`).

mod concurrent;
mod content;
mod protocol;
mod removal;
mod rig;
mod trouble;
