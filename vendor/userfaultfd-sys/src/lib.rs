//! Bindings to Linux's `userfaultfd`, checked in: what `include/uapi/linux/userfaultfd.h` (Linux
//! 6.8) defines, for 64-bit Linux whose ioctl numbers have the generic encoding (x86-64, AArch64,
//! RISC-V).
//!
//! This stands in for the crate `userfaultfd-sys` 0.6.0 of the Wasmtime project developers, which
//! generates the same at build time with bindgen and so needs libclang; see the README for what is
//! the same and what differs. Every layout and ioctl number is asserted at compile time at the end
//! of this file.
//!
//! The names are the C header's, hence the lint exceptions.

#![no_std]
#![allow(non_camel_case_types)]
#![warn(missing_docs)]

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
compile_error!("these userfaultfd bindings are written for 64-bit Linux");

mod constants;
mod structures;

pub use constants::*;
pub use structures::*;

/// The asserted layouts; a wrong edit above does not compile.
mod layout {
    use super::*;
    use core::mem::{align_of, offset_of, size_of};

    const READ: u32 = 2;
    const READ_WRITE: u32 = 3;

    /// `_IOC(direction, UFFDIO, number, size)` as `asm-generic/ioctl.h` encodes it.
    const fn ioctl(direction: u32, number: u64, size: usize) -> u32 {
        (direction << 30) | ((size as u32) << 16) | ((UFFDIO as u32) << 8) | number as u32
    }

    const _: () = {
        assert!(size_of::<uffd_msg>() == 32 && align_of::<uffd_msg>() == 1);
        assert!(offset_of!(uffd_msg, event) == 0);
        assert!(offset_of!(uffd_msg, arg) == 8);
        assert!(size_of::<uffd_msg_arg>() == 24 && align_of::<uffd_msg_arg>() == 8);
        assert!(offset_of!(uffd_msg_pagefault, address) == 8);
        assert!(offset_of!(uffd_msg_pagefault, feat) == 16);
        assert!(size_of::<uffd_msg_pagefault>() == 24);
        assert!(size_of::<uffd_msg_fork>() == 4);
        assert!(size_of::<uffd_msg_remap>() == 24 && offset_of!(uffd_msg_remap, len) == 16);
        assert!(size_of::<uffd_msg_remove>() == 16 && offset_of!(uffd_msg_remove, end) == 8);

        assert!(size_of::<uffdio_api>() == 24);
        assert!(offset_of!(uffdio_api, features) == 8 && offset_of!(uffdio_api, ioctls) == 16);
        assert!(size_of::<uffdio_range>() == 16 && offset_of!(uffdio_range, len) == 8);
        assert!(size_of::<uffdio_register>() == 32);
        assert!(
            offset_of!(uffdio_register, mode) == 16 && offset_of!(uffdio_register, ioctls) == 24
        );
        assert!(size_of::<uffdio_copy>() == 40);
        assert!(offset_of!(uffdio_copy, src) == 8 && offset_of!(uffdio_copy, len) == 16);
        assert!(offset_of!(uffdio_copy, mode) == 24 && offset_of!(uffdio_copy, copy) == 32);
        assert!(size_of::<uffdio_zeropage>() == 32);
        assert!(
            offset_of!(uffdio_zeropage, mode) == 16 && offset_of!(uffdio_zeropage, zeropage) == 24
        );
        assert!(
            size_of::<uffdio_writeprotect>() == 24 && offset_of!(uffdio_writeprotect, mode) == 16
        );
        assert!(size_of::<uffdio_continue>() == 32);
        assert!(
            offset_of!(uffdio_continue, mode) == 16 && offset_of!(uffdio_continue, mapped) == 24
        );
        assert!(size_of::<uffdio_poison>() == 32);
        assert!(offset_of!(uffdio_poison, mode) == 16 && offset_of!(uffdio_poison, updated) == 24);
        assert!(size_of::<uffdio_move>() == 40);
        assert!(offset_of!(uffdio_move, src) == 8 && offset_of!(uffdio_move, len) == 16);
        assert!(offset_of!(uffdio_move, mode) == 24 && offset_of!(uffdio_move, r#move) == 32);

        assert!(UFFDIO_API == ioctl(READ_WRITE, _UFFDIO_API, size_of::<uffdio_api>()));
        assert!(
            UFFDIO_REGISTER == ioctl(READ_WRITE, _UFFDIO_REGISTER, size_of::<uffdio_register>())
        );
        assert!(UFFDIO_UNREGISTER == ioctl(READ, _UFFDIO_UNREGISTER, size_of::<uffdio_range>()));
        assert!(UFFDIO_WAKE == ioctl(READ, _UFFDIO_WAKE, size_of::<uffdio_range>()));
        assert!(UFFDIO_COPY == ioctl(READ_WRITE, _UFFDIO_COPY, size_of::<uffdio_copy>()));
        assert!(
            UFFDIO_ZEROPAGE == ioctl(READ_WRITE, _UFFDIO_ZEROPAGE, size_of::<uffdio_zeropage>())
        );
        assert!(
            UFFDIO_WRITEPROTECT
                == ioctl(READ_WRITE, _UFFDIO_WRITEPROTECT, size_of::<uffdio_writeprotect>())
        );
        assert!(
            UFFDIO_CONTINUE == ioctl(READ_WRITE, _UFFDIO_CONTINUE, size_of::<uffdio_continue>())
        );
        assert!(UFFDIO_POISON == ioctl(READ_WRITE, _UFFDIO_POISON, size_of::<uffdio_poison>()));
        assert!(UFFDIO_MOVE == ioctl(READ_WRITE, _UFFDIO_MOVE, size_of::<uffdio_move>()));
        assert!(USERFAULTFD_IOC_NEW == USERFAULTFD_IOC << 8);
    };
}

#[cfg(test)]
mod tests;
