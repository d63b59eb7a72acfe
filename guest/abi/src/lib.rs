//! What host and guest agree on: ports, hypercalls and the pinned window.
//!
//! This crate is compiled into both the hypervisor and the test guest, so it uses nothing but
//! `core`. `docs/guest-abi.md` is the same contract in words; the const asserts at the end are
//! tripwires on its layout.
//!
//! ```
//! use gnomon_abi::{CONTROL_BYTES, INFO_ABI_VERSION, PORT_HYPERCALL, WINDOW_GPA};
//!
//! // What a guest looks at first: `out dx, eax` on this port with EAX = HC_INFO and RDI = the key.
//! assert_eq!((PORT_HYPERCALL, INFO_ABI_VERSION), (0x600, 0));
//! // The version of the page of guest frame 5 stands in the ledger, behind the control block.
//! assert_eq!(WINDOW_GPA + CONTROL_BYTES + 5 * 4, 0x80_0001_0014);
//! ```

#![no_std]

pub mod page_format;
pub mod verify;

/// Version of this contract, returned by [`HC_INFO`] with key [`INFO_ABI_VERSION`].
pub const ABI_VERSION: u64 = 4;

/// First byte of the 16550 UART's eight ports.
pub const PORT_SERIAL: u16 = 0x3f8;
/// Exit port in QEMU's isa-debug-exit convention: writing `v` ends the VM with exit code
/// `((v << 1) | 1) & 0xff`.
pub const PORT_EXIT: u16 = 0xf4;
/// Hypercall port: `out dx, eax` with the call's number in EAX and its arguments in RDI, RSI, RCX,
/// R8, R9 (RDX names the port); the result is in RAX when the instruction has completed.
pub const PORT_HYPERCALL: u16 = 0x600;

/// Hypercall: RDI is one of the `INFO_` keys; returns its value, or [`HC_ERROR`] for another key.
pub const HC_INFO: u64 = 0;
/// Hypercall: start vCPU RDI at RIP = RSI with RDI = RCX, with the caller's CR0, CR3, CR4, EFER
/// and descriptor-table registers, RSP = 0. Returns 0, [`START_NO_SUCH_VCPU`],
/// [`START_ALREADY_RUNNING`], or [`HC_ERROR`] if RIP is not a usable address.
pub const HC_START_VCPU: u64 = 1;
/// Hypercall: report a violation of the guest's oracle. RDI = kind ([`Violation`]), RSI = guest
/// virtual address, RCX = expected, R8 = found, R9 = page number. Returns 0.
pub const HC_VIOLATION: u64 = 2;
/// Hypercall: count re-faults (pages read back from swap) of guest frames RDI .. RDI + RSI
/// separately from now on. Returns 0, or [`HC_ERROR`] if they are not all RAM.
pub const HC_WATCH: u64 = 3;
/// Hypercall: power off; the VM ends with exit code 0. Does not return.
pub const HC_POWER_OFF: u64 = 4;
/// Hypercall: the guest's workers have reached a new phase: RDI = one of the `PHASE_` values. Its
/// oracle watches the RCX guest frames from RSI on. Returns 0.
pub const HC_PHASE: u64 = 5;

/// Hypercall: give back the RSI pages of RAM from guest frame RDI on, at most [`MOST_FREED`]: their
/// content is zero from now on. Returns 0, or [`HC_ERROR`] if they are too many, not all RAM, or
/// the host could not take all of them (each is as it was, or zero).
pub const HC_FREE_PAGES: u64 = 6;
/// Most pages of one [`HC_FREE_PAGES`].
pub const MOST_FREED: u64 = 4096;

/// Result of a hypercall that does not exist or got an argument that does not.
pub const HC_ERROR: u64 = u64::MAX;
/// [`HC_START_VCPU`]: there is no vCPU with that index.
pub const START_NO_SUCH_VCPU: u64 = 1;
/// [`HC_START_VCPU`]: that vCPU runs already.
pub const START_ALREADY_RUNNING: u64 = 2;

/// [`HC_INFO`] key: [`ABI_VERSION`].
pub const INFO_ABI_VERSION: u64 = 0;
/// [`HC_INFO`] key: number of vCPUs of this VM.
pub const INFO_VCPUS: u64 = 1;
/// [`HC_INFO`] key: guest RAM in bytes, starting at guest-physical 0.
pub const INFO_MEMORY_BYTES: u64 = 2;
/// [`HC_INFO`] key: bytes of the pinned window at [`WINDOW_GPA`].
pub const INFO_WINDOW_BYTES: u64 = 3;

/// [`HC_PHASE`]: set-up done, the workload proper begins.
pub const PHASE_RUN: u64 = 1;
/// [`HC_PHASE`]: the last sweep over all memory begins.
pub const PHASE_SWEEP: u64 = 2;

/// Guest-physical address of the pinned window: a [`Control`] block, then one `u32` ledger version
/// for each guest frame. It lies above all RAM and is never evicted.
pub const WINDOW_GPA: u64 = 512 << 30;
/// Bytes from [`WINDOW_GPA`] to the ledger.
pub const CONTROL_BYTES: u64 = 64 << 10;
/// Most guest RAM that a VM may have, in bytes; the boot page tables identity-map as much.
pub const MAX_MEMORY_BYTES: u64 = WINDOW_GPA;
/// Guest-virtual addresses from here up are not usable: the hypervisor's monitor lives above.
pub const GVA_LIMIT: u64 = 0x7f80_0000_0000;

/// Where the kernel image may begin; below it lies the boot area.
pub const KERNEL_MIN_GPA: u64 = 0x10_0000;
/// Guest-physical address of `boot_params` at entry (also in RSI).
pub const BOOT_PARAMS_GPA: u64 = 0x7000;
/// Guest-physical address of the boot page tables' root at entry (CR3).
pub const BOOT_PML4_GPA: u64 = 0x9000;
/// Guest-physical address of the NUL-terminated command line.
pub const CMDLINE_GPA: u64 = 0x2_0000;
/// Most bytes of a command line, its NUL included.
pub const CMDLINE_BYTES: u64 = 0x1000;

/// Code selector at entry and in every exception frame.
pub const SELECTOR_CODE: u16 = 0x33;
/// Stack selector at entry and in every exception frame.
pub const SELECTOR_DATA: u16 = 0x2b;
/// CR0 at entry: PE, MP, ET, NE, WP, PG.
pub const ENTRY_CR0: u64 = 0x8001_0033;
/// Bits that CR4 has at entry: PAE, OSFXSR, OSXMMEXCPT. The host may add OSXSAVE.
pub const ENTRY_CR4: u64 = 0x620;
/// RFLAGS at entry: bit 1 and IF, which are always set.
pub const ENTRY_RFLAGS: u64 = 0x202;
/// EFER at entry: LME, LMA.
pub const ENTRY_EFER: u64 = 0x500;

/// `Control::magic`.
pub const CONTROL_MAGIC: u64 = u64::from_le_bytes(*b"GnomonCB");
/// Most vCPUs whose counters fit the control block.
pub const MAX_VCPUS: usize = 1023;

/// What a guest found wrong; the `RDI` of [`HC_VIOLATION`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Violation {
    /// The page carries another page's number.
    Number = 1,
    /// The page's version is not the ledger's.
    Version = 2,
    /// The page's checksum does not match its body.
    Checksum = 3,
    /// A word of the body is wrong though the checksum fits, or a never-written page is not zero.
    Word = 4,
    /// Shared counters do not add up to what the vCPUs added.
    SharedSum = 5,
    /// A page-table change was not obeyed: an access went where it must not, or faulted where it
    /// must not.
    Paging = 6,
    /// A device did not do what it was told to.
    Device = 7,
}

/// One vCPU's counters, written by that vCPU only.
#[repr(C, align(64))]
pub struct VcpuCounters {
    /// Page accesses whose content was checked against the ledger.
    pub verified: core::sync::atomic::AtomicU64,
    /// Page writes (each raises the page's version).
    pub writes: core::sync::atomic::AtomicU64,
    /// Additions to shared counters.
    pub shared_adds: core::sync::atomic::AtomicU64,
    /// Page-table changes made and checked.
    pub paging_ops: core::sync::atomic::AtomicU64,
    /// Violations found.
    pub violations: core::sync::atomic::AtomicU64,
    /// Accesses to the watched hot set.
    pub hot_accesses: core::sync::atomic::AtomicU64,
    /// Commands that the DMA device has carried out.
    pub dma_ops: core::sync::atomic::AtomicU64,
    /// Bytes of the page contents that it moved or summed up.
    pub dma_bytes: core::sync::atomic::AtomicU64,
}

/// The first [`CONTROL_BYTES`] of the pinned window, shared between host and guest without exits.
#[repr(C, align(64))]
pub struct Control {
    /// [`CONTROL_MAGIC`], written by the host.
    pub magic: u64,
    /// Set to 1 by the host: finish the current pass, sweep once, power off.
    pub stop: core::sync::atomic::AtomicU32,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Guest RAM in bytes.
    pub memory_bytes: u64,
    /// 0 in a VM that was booted; another number in each clone of a running VM, from its first
    /// instruction on. Who sees it change is somebody else from now on.
    pub generation: core::sync::atomic::AtomicU64,
    /// Not used yet; zero.
    pub reserved: [u64; 4],
    /// Counters by vCPU index.
    pub counters: [VcpuCounters; MAX_VCPUS],
}

/// Doorbell of the DMA device: a 32-bit `out` of a [`DmaDescriptor`]'s guest-physical address
/// divided by [`DMA_ALIGN`] hands it over. A 32-bit `in` gives the number of descriptors that the
/// device has not finished.
pub const PORT_DMA: u16 = 0x610;
/// Alignment of a descriptor.
pub const DMA_ALIGN: u64 = 128;
/// Descriptors that the device takes; a doorbell for one more waits for room.
pub const DMA_QUEUE: usize = 64;
/// Most bytes of one command.
pub const DMA_MAX_BYTES: u64 = 64 << 10;
/// [`DmaDescriptor::command`]: copy from `source` to `destination`, which do not overlap.
pub const DMA_COPY: u32 = 1;
/// [`DmaDescriptor::command`]: fill `destination` with `pattern`, its lowest byte first.
pub const DMA_FILL: u32 = 2;
/// [`DmaDescriptor::command`]: [`dma_checksum`] of the 64-bit words from `source`, the last one
/// padded with zero bytes, from 0 on.
pub const DMA_CHECKSUM: u32 = 3;
/// [`DmaDescriptor::status`]: what the guest sets before it rings.
pub const DMA_PENDING: u32 = 0;
/// [`DmaDescriptor::status`]: carried out; everything that it wrote can be seen.
pub const DMA_DONE: u32 = 1;
/// [`DmaDescriptor::status`]: refused, nothing was done. The result says why.
pub const DMA_ERROR: u32 = 2;
/// [`DmaDescriptor::result`] of an error: no such command.
pub const DMA_BAD_COMMAND: u64 = 1;
/// [`DmaDescriptor::result`] of an error: 0 bytes, or more than [`DMA_MAX_BYTES`].
pub const DMA_BAD_LENGTH: u64 = 2;
/// [`DmaDescriptor::result`] of an error: not all RAM. The pinned window is none.
pub const DMA_OUTSIDE_RAM: u64 = 3;
/// [`DmaDescriptor::result`] of an error: source and destination of a copy overlap.
pub const DMA_OVERLAP: u64 = 4;

/// A command for the DMA device, in RAM. Little-endian, as all of the machine.
#[repr(C, align(128))]
pub struct DmaDescriptor {
    /// One of [`DMA_COPY`], [`DMA_FILL`], [`DMA_CHECKSUM`].
    pub command: u32,
    /// [`DMA_PENDING`], then [`DMA_DONE`] or [`DMA_ERROR`]: the last thing that the device writes.
    pub status: core::sync::atomic::AtomicU32,
    /// Guest-physical address to read from, of any alignment.
    pub source: u64,
    /// Guest-physical address to write to, of any alignment.
    pub destination: u64,
    /// Number of bytes.
    pub bytes: u64,
    /// What to fill with.
    pub pattern: u64,
    /// The checksum, or the reason of an error; 0 otherwise.
    pub result: core::sync::atomic::AtomicU64,
    /// Not looked at.
    pub unused: [u64; 10],
}

/// One step of the checksum: `sum` and the next word make the next sum.
#[inline]
pub const fn dma_checksum(sum: u64, word: u64) -> u64 {
    (sum ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29)
}

const _: () = assert!(size_of::<DmaDescriptor>() as u64 == DMA_ALIGN);
// Every address in RAM has a doorbell value.
const _: () = assert!(MAX_MEMORY_BYTES / DMA_ALIGN <= 1 << 32);
const _: () = assert!(size_of::<VcpuCounters>() == 64);
const _: () = assert!(size_of::<Control>() as u64 == CONTROL_BYTES);
