//! What a run takes of the host at most: its memory to within some megabytes, everything else with
//! room to spare.
//!
//! Guarantee: what is refused for want of something could not have been promised. Memory beside the
//! frames is an estimate from above; figures that it was compared with are in
//! docs/host-requirements.md.

use std::path::Path;

use super::folder::Folder;
use super::process::STACK_BYTES;
use crate::addr::PAGE_SIZE_U64;
use crate::peer::server::{DEFAULT_SLOTS, MAX_PEERS};
use crate::vmm::{shadow_table_bytes, window_bytes};

/// The program itself: its heap, what it writes of its own image, threads' stacks.
const PROGRAM_BYTES: u64 = 8 << 20;
/// KVM, and the tables of a process, for one vCPU.
const VCPU_BYTES: u64 = 256 << 10;
/// A frame's entry in the frame table, and what swap knows of it when that is full.
const FRAME_ENTRY_BYTES: u64 = 24 + 8;
/// Bytes of address space that nothing below accounts for.
const SPARE_ADDRESS_BYTES: u64 = 48 << 20;

/// The shape of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) memory_bytes: u64,
    pub(crate) host_memory_bytes: u64,
    pub(crate) vcpus: u64,
    /// VMs at a time.
    pub(crate) vms: u64,
    pub(crate) is_direct: bool,
}

/// A file that has to be as large as this.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LargeFile {
    /// What it is, and what to do about its size.
    pub(crate) what: String,
    pub(crate) advice: &'static str,
    pub(crate) bytes: u64,
}

/// See the module's documentation.
#[derive(Clone, Debug)]
pub(crate) struct Needs {
    shape: Shape,
    pub(crate) files: Vec<LargeFile>,
    pub(crate) threads: u64,
    pub(crate) descriptors: u64,
    /// Peers that may come.
    peers: u64,
    /// Bytes of images that are read from files and copied into the guest.
    images_bytes: u64,
    /// Where swap is, if that is memory.
    pub(crate) swap_in_memory: Option<SwapInMemory>,
}

/// Swap in a file system that lives in memory: what is swapped frees nothing, and is charged to this
/// process's control group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SwapInMemory {
    pub(crate) folder: Folder,
    /// Most that swap takes there.
    pub(crate) bytes: u64,
}

impl SwapInMemory {
    /// For swap of so many bytes in `folder`; `None` where that is no memory, or nothing is wanted.
    pub(crate) fn at(folder: &Folder, bytes: u64) -> Option<Self> {
        (bytes > 0 && folder.is_in_memory).then(|| Self { folder: folder.clone(), bytes })
    }
}

impl Needs {
    /// What the VMs take, and their swap of `swap_bytes` bytes.
    pub(crate) fn of(shape: Shape, swap_bytes: u64) -> Self {
        let mut needs = Self {
            shape,
            files: Vec::new(),
            // Reclaim and the main thread; of a VM its device, and with direct paging two more.
            threads: 2 + shape.vms * (shape.vcpus + if shape.is_direct { 3 } else { 1 }),
            descriptors: 12 + shape.vms * (shape.vcpus + 6),
            peers: 0,
            images_bytes: 0,
            swap_in_memory: None,
        };
        let (frames, frames_advice) = match shape.is_direct {
            true => ("the file of a guest's memory", "give less --memory"),
            false => ("the file of the frames", "give less --host-memory"),
        };
        needs.file(frames, needs.mapped_frames_bytes(), frames_advice);
        needs.file("the file of a guest's ledger", needs.window_bytes(), "give less --memory");
        needs.file("the swap file", swap_bytes, "choose less with --swap-size");
        needs
    }

    fn file(&mut self, what: impl Into<String>, bytes: u64, advice: &'static str) {
        self.files.push(LargeFile { what: what.into(), advice, bytes });
    }

    /// So many threads more.
    pub(crate) fn add_threads(&mut self, count: u64) {
        self.threads += count;
    }

    /// Other processes that get pages.
    pub(crate) fn add_peers(&mut self) {
        self.peers = MAX_PEERS as u64;
        self.threads += 1 + 2 * self.peers;
        self.descriptors += 2 + 6 * self.peers;
        let lent = u64::from(DEFAULT_SLOTS) * PAGE_SIZE_U64;
        self.file("a peer's file of copies", lent, "leave out --export-socket");
    }

    /// An image that is read whole before it is copied into the guest, where it counts once more.
    pub(crate) fn add_image(&mut self, bytes: u64) {
        self.images_bytes = self.images_bytes.saturating_add(bytes);
    }

    /// Whether such images are counted in.
    pub(crate) fn has_images(&self) -> bool {
        self.images_bytes > 0
    }

    /// A disk that is written to.
    pub(crate) fn add_disk(&mut self, path: &Path, bytes: u64) {
        self.file(format!("--disk {}", path.display()), bytes, "put ,ro behind it");
    }

    /// Devices with a thread each.
    pub(crate) fn add_devices(&mut self, count: u64) {
        self.threads += count;
        self.descriptors += 4 * count;
    }

    pub(crate) fn vcpus(&self) -> u64 {
        self.shape.vcpus
    }

    /// Most bytes of frames: no more than guests have.
    pub(crate) fn frames_bytes(&self) -> u64 {
        self.shape.host_memory_bytes.min(self.guests_bytes())
    }

    fn guests_bytes(&self) -> u64 {
        self.shape.memory_bytes.saturating_mul(self.shape.vms)
    }

    /// Size of the frames' file, and of each mapping of it.
    fn mapped_frames_bytes(&self) -> u64 {
        match self.shape.is_direct {
            true => self.shape.memory_bytes,
            false => self.shape.host_memory_bytes,
        }
    }

    fn window_bytes(&self) -> u64 {
        window_bytes(self.shape.memory_bytes)
    }

    /// Shadow tables of all VMs.
    fn tables_bytes(&self) -> u64 {
        let Shape { memory_bytes, host_memory_bytes, vcpus, vms, is_direct } = self.shape;
        let frames = u32::try_from(host_memory_bytes / PAGE_SIZE_U64).unwrap_or(u32::MAX);
        let vcpus = usize::try_from(vcpus).unwrap_or(usize::MAX);
        if is_direct { 0 } else { vms * shadow_table_bytes(memory_bytes, frames, vcpus) }
    }

    /// Memory beside frames and swap.
    pub(crate) fn beside_bytes(&self) -> u64 {
        let Shape { vcpus, vms, is_direct, .. } = self.shape;
        let frames = self.mapped_frames_bytes() / PAGE_SIZE_U64;
        let swapped = self.guests_bytes().saturating_sub(self.frames_bytes());
        // Objects' leaves and ledgers, touched as far as guests get; checksums of swap.
        let books = self.guests_bytes().min(16 * self.shape.host_memory_bytes) / 512
            + swapped.min(16 * self.shape.host_memory_bytes) / 512;
        // KVM shadows our tables in tables of its own, or has nested ones for the frames.
        let kvm = self.tables_bytes() + self.frames_bytes() / 512 * (1 + vms);
        // The process's page tables, for two mappings and more.
        let mapped = self.frames_bytes() / 512 * (2 + vms);
        PROGRAM_BYTES
            + frames * FRAME_ENTRY_BYTES
            + if is_direct { 4 << 20 } else { 0 }
            + books
            + self.tables_bytes()
            + kvm
            + mapped
            + vms * vcpus * VCPU_BYTES
            + self.peers * u64::from(DEFAULT_SLOTS) * PAGE_SIZE_U64
            + self.images_bytes
    }

    /// Memory of every kind, swap that lies in memory included.
    pub(crate) fn memory_bytes(&self) -> u64 {
        let swap = self.swap_in_memory.as_ref().map_or(0, |swap| swap.bytes);
        self.frames_bytes().saturating_add(self.beside_bytes()).saturating_add(swap)
    }

    /// Memory of this process's own.
    pub(crate) fn private_bytes(&self) -> u64 {
        self.beside_bytes() + self.threads * STACK_BYTES
    }

    /// Address space.
    pub(crate) fn address_bytes(&self) -> u64 {
        let vms = self.shape.vms;
        // The hypervisor's mapping of the frames, and each VM's.
        self.mapped_frames_bytes().saturating_mul(1 + vms)
            + vms * self.window_bytes()
            + self.private_bytes()
            + SPARE_ADDRESS_BYTES
    }

    /// Mappings.
    pub(crate) fn mappings(&self) -> u64 {
        let Shape { vcpus, vms, .. } = self.shape;
        64 + vms * (16 + 6 * vcpus) + 6 * self.threads + 2 * self.peers
    }
}
