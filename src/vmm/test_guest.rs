//! The test guest that comes with Gnomon, built from `guest/` by `build.rs`.

/// Its kernel: a static ELF64 executable, as `docs/guest-abi.md` has it.
pub const TEST_GUEST: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guest.elf"));
