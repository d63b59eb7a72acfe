//! The header's macros, with the integer types that upstream's bindgen callbacks give them.

/// `ioctl` type of `/dev/userfaultfd`.
pub const USERFAULTFD_IOC: u32 = 0xaa;
/// `ioctl` on `/dev/userfaultfd` that makes a userfaultfd; its argument is the system call's flags.
pub const USERFAULTFD_IOC_NEW: u32 = 0xaa00;

/// The system call's flag for a userfaultfd that handles faults from user mode only.
pub const UFFD_USER_MODE_ONLY: u32 = 1;

/// Version of the interface, for [`uffdio_api::api`](crate::uffdio_api::api).
pub const UFFD_API: u64 = 0xaa;

macro_rules! constants {
    ($kind:ty; $($(#[$doc:meta])* $name:ident = $value:expr;)+) => {
        $($(#[$doc])* pub const $name: $kind = $value;)+
    };
}

// ioctl command numbers (also bit numbers in the answers' `ioctls` masks).
constants! { u64;
    /// Number of `UFFDIO_REGISTER`.
    _UFFDIO_REGISTER = 0x00;
    /// Number of `UFFDIO_UNREGISTER`.
    _UFFDIO_UNREGISTER = 0x01;
    /// Number of `UFFDIO_WAKE`.
    _UFFDIO_WAKE = 0x02;
    /// Number of `UFFDIO_COPY`.
    _UFFDIO_COPY = 0x03;
    /// Number of `UFFDIO_ZEROPAGE`.
    _UFFDIO_ZEROPAGE = 0x04;
    /// Number of `UFFDIO_MOVE` (Linux 6.8).
    _UFFDIO_MOVE = 0x05;
    /// Number of `UFFDIO_WRITEPROTECT` (Linux 5.7).
    _UFFDIO_WRITEPROTECT = 0x06;
    /// Number of `UFFDIO_CONTINUE` (Linux 5.13).
    _UFFDIO_CONTINUE = 0x07;
    /// Number of `UFFDIO_POISON` (Linux 6.6).
    _UFFDIO_POISON = 0x08;
    /// Number of `UFFDIO_API`.
    _UFFDIO_API = 0x3f;
}

/// `ioctl` type of a userfaultfd.
pub const UFFDIO: u8 = 0xaa;

// Complete ioctl request numbers.
constants! { u32;
    /// Negotiates features: [`uffdio_api`](crate::uffdio_api).
    UFFDIO_API = 0xc018_aa3f;
    /// Registers a range: [`uffdio_register`](crate::uffdio_register).
    UFFDIO_REGISTER = 0xc020_aa00;
    /// Unregisters a range: [`uffdio_range`](crate::uffdio_range).
    UFFDIO_UNREGISTER = 0x8010_aa01;
    /// Wakes the waiters of a range: [`uffdio_range`](crate::uffdio_range).
    UFFDIO_WAKE = 0x8010_aa02;
    /// Fills missing pages with a copy: [`uffdio_copy`](crate::uffdio_copy).
    UFFDIO_COPY = 0xc028_aa03;
    /// Fills missing pages with zeros: [`uffdio_zeropage`](crate::uffdio_zeropage).
    UFFDIO_ZEROPAGE = 0xc020_aa04;
    /// Moves pages between ranges: [`uffdio_move`](crate::uffdio_move).
    UFFDIO_MOVE = 0xc028_aa05;
    /// Sets or removes write protection: [`uffdio_writeprotect`](crate::uffdio_writeprotect).
    UFFDIO_WRITEPROTECT = 0xc018_aa06;
    /// Maps pages that the page cache has: [`uffdio_continue`](crate::uffdio_continue).
    UFFDIO_CONTINUE = 0xc020_aa07;
    /// Makes pages raise SIGBUS: [`uffdio_poison`](crate::uffdio_poison).
    UFFDIO_POISON = 0xc020_aa08;
}

// Values of `uffd_msg::event`.
constants! { u8;
    /// A page fault.
    UFFD_EVENT_PAGEFAULT = 0x12;
    /// The process forked.
    UFFD_EVENT_FORK = 0x13;
    /// A range was moved with `mremap`.
    UFFD_EVENT_REMAP = 0x14;
    /// A range was emptied with `madvise`.
    UFFD_EVENT_REMOVE = 0x15;
    /// A range was unmapped.
    UFFD_EVENT_UNMAP = 0x16;
}

// Bits of `uffd_msg_pagefault::flags`.
constants! { u64;
    /// The access was a write.
    UFFD_PAGEFAULT_FLAG_WRITE = 1 << 0;
    /// The page is write-protected.
    UFFD_PAGEFAULT_FLAG_WP = 1 << 1;
    /// The page is in the page cache but not mapped.
    UFFD_PAGEFAULT_FLAG_MINOR = 1 << 2;
}

// Bits of `uffdio_api::features`.
constants! { u64;
    /// Write-protect faults on anonymous memory.
    UFFD_FEATURE_PAGEFAULT_FLAG_WP = 1 << 0;
    /// Fork events.
    UFFD_FEATURE_EVENT_FORK = 1 << 1;
    /// `mremap` events.
    UFFD_FEATURE_EVENT_REMAP = 1 << 2;
    /// `madvise` events.
    UFFD_FEATURE_EVENT_REMOVE = 1 << 3;
    /// Missing faults on hugetlbfs.
    UFFD_FEATURE_MISSING_HUGETLBFS = 1 << 4;
    /// Missing faults on shared memory.
    UFFD_FEATURE_MISSING_SHMEM = 1 << 5;
    /// `munmap` events.
    UFFD_FEATURE_EVENT_UNMAP = 1 << 6;
    /// SIGBUS instead of events.
    UFFD_FEATURE_SIGBUS = 1 << 7;
    /// Fault messages carry the thread's id.
    UFFD_FEATURE_THREAD_ID = 1 << 8;
    /// Minor faults on hugetlbfs.
    UFFD_FEATURE_MINOR_HUGETLBFS = 1 << 9;
    /// Minor faults on shared memory.
    UFFD_FEATURE_MINOR_SHMEM = 1 << 10;
    /// Fault addresses are not rounded to the page.
    UFFD_FEATURE_EXACT_ADDRESS = 1 << 11;
    /// Write protection on hugetlbfs and shared memory.
    UFFD_FEATURE_WP_HUGETLBFS_SHMEM = 1 << 12;
    /// Write protection reaches pages that are not populated (Linux 6.4).
    UFFD_FEATURE_WP_UNPOPULATED = 1 << 13;
    /// `UFFDIO_POISON` (Linux 6.6).
    UFFD_FEATURE_POISON = 1 << 14;
    /// Write-protect faults resolve themselves (Linux 6.7).
    UFFD_FEATURE_WP_ASYNC = 1 << 15;
    /// `UFFDIO_MOVE` (Linux 6.8).
    UFFD_FEATURE_MOVE = 1 << 16;
}

// Bits of the structures' `mode`.
constants! { u64;
    /// Register for missing faults.
    UFFDIO_REGISTER_MODE_MISSING = 1 << 0;
    /// Register for write-protect faults.
    UFFDIO_REGISTER_MODE_WP = 1 << 1;
    /// Register for minor faults.
    UFFDIO_REGISTER_MODE_MINOR = 1 << 2;
    /// Leave the waiters asleep.
    UFFDIO_COPY_MODE_DONTWAKE = 1 << 0;
    /// Map the copy write-protected.
    UFFDIO_COPY_MODE_WP = 1 << 1;
    /// Leave the waiters asleep.
    UFFDIO_ZEROPAGE_MODE_DONTWAKE = 1 << 0;
    /// Protect; without it, remove the protection.
    UFFDIO_WRITEPROTECT_MODE_WP = 1 << 0;
    /// Leave the waiters asleep.
    UFFDIO_WRITEPROTECT_MODE_DONTWAKE = 1 << 1;
    /// Leave the waiters asleep.
    UFFDIO_CONTINUE_MODE_DONTWAKE = 1 << 0;
    /// Map the page write-protected (Linux 6.4).
    UFFDIO_CONTINUE_MODE_WP = 1 << 1;
    /// Leave the waiters asleep.
    UFFDIO_POISON_MODE_DONTWAKE = 1 << 0;
    /// Leave the waiters asleep.
    UFFDIO_MOVE_MODE_DONTWAKE = 1 << 0;
    /// Holes in the source are not an error.
    UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES = 1 << 1;
}

// The header's combined masks.
constants! { u64;
    /// All modes of a registration.
    UFFD_API_REGISTER_MODES =
        UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP | UFFDIO_REGISTER_MODE_MINOR;
    /// All features that this header knows.
    UFFD_API_FEATURES = (1 << 17) - 1;
    /// ioctls of the descriptor itself.
    UFFD_API_IOCTLS = 1 << _UFFDIO_REGISTER | 1 << _UFFDIO_UNREGISTER | 1 << _UFFDIO_API;
    /// ioctls of a registered range.
    UFFD_API_RANGE_IOCTLS = 1 << _UFFDIO_WAKE
        | 1 << _UFFDIO_COPY
        | 1 << _UFFDIO_ZEROPAGE
        | 1 << _UFFDIO_MOVE
        | 1 << _UFFDIO_WRITEPROTECT
        | 1 << _UFFDIO_CONTINUE
        | 1 << _UFFDIO_POISON;
    /// ioctls of any registered range, whatever memory is behind it.
    UFFD_API_RANGE_IOCTLS_BASIC = 1 << _UFFDIO_WAKE
        | 1 << _UFFDIO_COPY
        | 1 << _UFFDIO_WRITEPROTECT
        | 1 << _UFFDIO_CONTINUE
        | 1 << _UFFDIO_POISON;
}
