//! The header's structures. All values are in bytes unless said otherwise.

/// A message read from a userfaultfd. Packed: copy fields out before borrowing them.
#[repr(C, packed)]
#[derive(Clone, Copy)]
pub struct uffd_msg {
    /// One of `UFFD_EVENT_*`; says which member of [`arg`](Self::arg) is set.
    pub event: u8,
    /// Reserved by the kernel.
    pub reserved1: u8,
    /// Reserved by the kernel.
    pub reserved2: u16,
    /// Reserved by the kernel.
    pub reserved3: u32,
    /// The event's data.
    pub arg: uffd_msg_arg,
}

/// What [`uffd_msg::arg`] holds.
#[repr(C)]
#[derive(Clone, Copy)]
pub union uffd_msg_arg {
    /// For `UFFD_EVENT_PAGEFAULT`.
    pub pagefault: uffd_msg_pagefault,
    /// For `UFFD_EVENT_FORK`.
    pub fork: uffd_msg_fork,
    /// For `UFFD_EVENT_REMAP`.
    pub remap: uffd_msg_remap,
    /// For `UFFD_EVENT_REMOVE` and `UFFD_EVENT_UNMAP`.
    pub remove: uffd_msg_remove,
    /// Spans the whole union.
    pub reserved: [u64; 3],
}

/// A page fault.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct uffd_msg_pagefault {
    /// `UFFD_PAGEFAULT_FLAG_*`.
    pub flags: u64,
    /// The faulting address.
    pub address: u64,
    /// Fields that depend on the features asked for.
    pub feat: uffd_msg_pagefault_feat,
}

/// What [`uffd_msg_pagefault::feat`] holds.
#[repr(C)]
#[derive(Clone, Copy)]
pub union uffd_msg_pagefault_feat {
    /// Id of the faulting thread, with `UFFD_FEATURE_THREAD_ID`; 0 without.
    pub ptid: u32,
}

/// A fork.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct uffd_msg_fork {
    /// The child's userfaultfd.
    pub ufd: u32,
}

/// A moved range.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct uffd_msg_remap {
    /// Old address.
    pub from: u64,
    /// New address.
    pub to: u64,
    /// Length.
    pub len: u64,
}

/// An emptied or unmapped range.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct uffd_msg_remove {
    /// First address.
    pub start: u64,
    /// Address after the last.
    pub end: u64,
}

/// Argument of `UFFDIO_API`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct uffdio_api {
    /// In: `UFFD_API`.
    pub api: u64,
    /// In: the features to enable. Out: the features that the kernel has.
    pub features: u64,
    /// Out: a bit for each ioctl number.
    pub ioctls: u64,
}

/// A range of addresses. Argument of `UFFDIO_UNREGISTER` and `UFFDIO_WAKE`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct uffdio_range {
    /// First address.
    pub start: u64,
    /// Length.
    pub len: u64,
}

/// Argument of `UFFDIO_REGISTER`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct uffdio_register {
    /// What to register.
    pub range: uffdio_range,
    /// `UFFDIO_REGISTER_MODE_*`.
    pub mode: u64,
    /// Out: a bit for each ioctl number that works on the range.
    pub ioctls: u64,
}

/// Argument of `UFFDIO_COPY`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct uffdio_copy {
    /// Where the pages are missing.
    pub dst: u64,
    /// What to copy there.
    pub src: u64,
    /// Length.
    pub len: u64,
    /// `UFFDIO_COPY_MODE_*`.
    pub mode: u64,
    /// Out: bytes copied, or a negated errno.
    pub copy: i64,
}

/// Argument of `UFFDIO_ZEROPAGE`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct uffdio_zeropage {
    /// Where the pages are missing.
    pub range: uffdio_range,
    /// `UFFDIO_ZEROPAGE_MODE_*`.
    pub mode: u64,
    /// Out: bytes filled, or a negated errno.
    pub zeropage: i64,
}

/// Argument of `UFFDIO_WRITEPROTECT`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct uffdio_writeprotect {
    /// What to protect or unprotect.
    pub range: uffdio_range,
    /// `UFFDIO_WRITEPROTECT_MODE_*`.
    pub mode: u64,
}

/// Argument of `UFFDIO_CONTINUE`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct uffdio_continue {
    /// What to map.
    pub range: uffdio_range,
    /// `UFFDIO_CONTINUE_MODE_*`.
    pub mode: u64,
    /// Out: bytes mapped, or a negated errno.
    pub mapped: i64,
}

/// Argument of `UFFDIO_POISON`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct uffdio_poison {
    /// What to poison.
    pub range: uffdio_range,
    /// `UFFDIO_POISON_MODE_*`.
    pub mode: u64,
    /// Out: bytes poisoned, or a negated errno.
    pub updated: i64,
}

/// Argument of `UFFDIO_MOVE`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct uffdio_move {
    /// Where the pages are missing.
    pub dst: u64,
    /// Where they are moved from.
    pub src: u64,
    /// Length.
    pub len: u64,
    /// `UFFDIO_MOVE_MODE_*`.
    pub mode: u64,
    /// Out: bytes moved, or a negated errno.
    pub r#move: i64,
}
