//! The kernel: what kind of file it is, what of it is wrong, and getting it into guest memory.
//!
//! Our own checks come first and have the sentences; the loading is `linux-loader`'s, into memory of
//! the hypervisor, from where the pages go into the guest's memory object like any other write.

use std::io::{self, Cursor};

use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::{BzImage, Elf, KernelLoader, elf::PvhBootCapability};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use crate::abi;
use crate::addr::{Gpa, PAGE_SIZE_U64};
use crate::host_mm::MemoryObject;
use crate::sys::memory::mapping_error;
use crate::vmm::contract::boot::{BootError, Image, program_headers};

use super::LinuxError;
use super::header::{self, ENTRY_64};
use super::layout;

/// Bytes that are copied from the staging memory at a time.
const CHUNK_BYTES: usize = 1 << 20;
/// Most bytes of a command line that x86 Linux has room for, without its NUL; a vmlinux does not say
/// so itself (`COMMAND_LINE_SIZE` in Linux `arch/x86/include/asm/setup.h`).
const LINUX_CMDLINE_BYTES: u64 = 2048 - 1;
/// Linux's own names for its segments begin at addresses with this bit set.
const UPPER_HALF: u64 = 1 << 63;

/// What kind of kernel a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelKind {
    /// An ELF file that keeps to the guest ABI, or no kernel at all: what loads it will say.
    GuestAbi,
    /// Linux, as distributions install it.
    BzImage,
    /// Linux before it was packed: an ELF file that is linked to the upper half.
    Vmlinux,
}

impl KernelKind {
    /// What kind `image` is, by its looks.
    #[must_use]
    pub fn of(image: &[u8]) -> Self {
        if header::is_bzimage(image) {
            return Self::BzImage;
        }
        // Not by what comes after them: one that was cut off is to be refused as what it is.
        let is_upper = program_headers(image)
            .any(|header| header.p_type == elf::abi::PT_LOAD && header.p_vaddr & UPPER_HALF != 0);
        if is_upper { Self::Vmlinux } else { Self::GuestAbi }
    }

    /// Whether it is Linux.
    #[must_use]
    pub fn is_linux(self) -> bool {
        self != Self::GuestAbi
    }
}

/// How the first vCPU begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// In long mode with RSI at `boot_params` (`boot.rst`, 64-bit boot protocol).
    Long(u64),
    /// In protected mode without paging, with EBX at `hvm_start_info` (Xen's `pvh.pandoc`).
    Pvh(u32),
}

/// A kernel that was checked against the guest's memory.
pub(super) struct Kernel<'a> {
    image: &'a [u8],
    form: Form<'a>,
    memory_bytes: u64,
}

enum Form<'a> {
    BzImage(header::Plan),
    Vmlinux(Image<'a>),
}

/// A kernel in guest memory.
pub(super) struct Loaded {
    pub(super) entry: Entry,
    /// That of a bzImage.
    pub(super) setup_header: Option<setup_header>,
}

impl<'a> Kernel<'a> {
    /// Checks `image` as a kernel for a guest with `memory_bytes` of RAM.
    pub(super) fn check(image: &'a [u8], memory_bytes: u64) -> Result<Self, LinuxError> {
        let form = if header::is_bzimage(image) {
            Form::BzImage(header::Plan::new(image, memory_bytes)?)
        } else {
            let checked = Image::parse(image, memory_bytes.min(layout::MAPPED_AT_ENTRY)).map_err(
                |error| match error {
                    BootError::NotElf { .. } => LinuxError::NotAKernel,
                    BootError::OutsideRam { start, bytes, min, .. } if start >= min => {
                        let room =
                            header::check_room(start, start.saturating_add(bytes), memory_bytes);
                        room.err().unwrap_or(error.into())
                    }
                    error => error.into(),
                },
            )?;
            Form::Vmlinux(checked)
        };
        Ok(Self { image, form, memory_bytes })
    }

    /// First byte after what the kernel needs.
    pub(super) fn end(&self) -> u64 {
        match &self.form {
            Form::BzImage(plan) => plan.end,
            Form::Vmlinux(image) => image
                .segments()
                .iter()
                .map(|segment| segment.start.saturating_add(segment.memory_bytes))
                .max()
                .unwrap_or(0),
        }
    }

    /// First address that an initial RAM disk may not use.
    pub(super) fn initrd_end(&self) -> u64 {
        match &self.form {
            Form::BzImage(plan) => plan.initrd_end.min(self.memory_bytes),
            Form::Vmlinux(_) => self.memory_bytes,
        }
    }

    /// Most bytes of a command line, without its NUL.
    pub(super) fn max_cmdline(&self) -> u64 {
        let room = abi::CMDLINE_BYTES - 1;
        match &self.form {
            Form::BzImage(plan) => plan.max_cmdline.min(room),
            Form::Vmlinux(_) => room.min(LINUX_CMDLINE_BYTES),
        }
    }

    /// Loads it.
    pub(super) fn load(&self, object: &MemoryObject) -> Result<Loaded, LinuxError> {
        let refused =
            |error: linux_loader::loader::Error| LinuxError::Loader { reason: error.to_string() };
        let mut file = Cursor::new(self.image);
        match &self.form {
            Form::BzImage(plan) => {
                let staging = Staging::new(plan.load_at, plan.load_at + plan.bytes)?;
                let at = Some(GuestAddress(plan.load_at));
                let loaded = BzImage::load(&staging.memory, at, &mut file, None);
                loaded.map_err(refused)?;
                staging.copy(object, plan.load_at, plan.bytes)?;
                Ok(Loaded {
                    entry: Entry::Long(plan.load_at + ENTRY_64),
                    setup_header: Some(header::read(self.image)?),
                })
            }
            Form::Vmlinux(image) => {
                let staging = Staging::new(layout::HIGH_MEMORY, self.end())?;
                let loaded = Elf::load(&staging.memory, None, &mut file, None).map_err(refused)?;
                let entry = match loaded.pvh_boot_cap {
                    PvhBootCapability::PvhEntryPresent(GuestAddress(entry)) => self.pvh(entry)?,
                    _ => Entry::Long(image.entry()),
                };
                for segment in image.segments() {
                    staging.copy(object, segment.start, segment.contents.len() as u64)?;
                }
                Ok(Loaded { entry, setup_header: None })
            }
        }
    }

    /// The entry that a note names, if it is in the image.
    fn pvh(&self, entry: u64) -> Result<Entry, LinuxError> {
        match u32::try_from(entry) {
            Ok(narrow) if (layout::HIGH_MEMORY..self.end()).contains(&entry) => {
                Ok(Entry::Pvh(narrow))
            }
            _ => Err(BootError::Entry { entry }.into()),
        }
    }
}

/// Memory of the hypervisor, at the addresses of the guest that a kernel goes to.
struct Staging {
    memory: GuestMemoryMmap<()>,
}

impl Staging {
    fn new(start: u64, end: u64) -> Result<Self, LinuxError> {
        let first = start / PAGE_SIZE_U64 * PAGE_SIZE_U64;
        let bytes = end.saturating_sub(first).next_multiple_of(PAGE_SIZE_U64);
        let refused = |source: io::Error| LinuxError::Staging { bytes, source };
        let size = usize::try_from(bytes).map_err(|error| refused(io::Error::other(error)))?;
        let region = MmapRegion::new(size).map_err(|error| refused(mapping_error(error)))?;
        // Neither can be brought about: the range does not wrap, and it is alone.
        let no_place = || refused(io::Error::other(format!("{first:#x} is no address for it")));
        let region = GuestRegionMmap::new(region, GuestAddress(first)).ok_or_else(no_place)?;
        let memory = GuestMemoryMmap::from_regions(vec![region]).map_err(|_| no_place())?;
        Ok(Self { memory })
    }

    /// Writes what stands at `[start, start + bytes)` to the same place in the guest.
    fn copy(&self, object: &MemoryObject, start: u64, bytes: u64) -> Result<(), LinuxError> {
        let mut chunk = vec![0; CHUNK_BYTES];
        let mut done = 0;
        while done < bytes {
            let size = usize::try_from(bytes - done).map_or(CHUNK_BYTES, |n| n.min(CHUNK_BYTES));
            let part = &mut chunk[..size];
            self.memory
                .read_slice(part, GuestAddress(start + done))
                .map_err(|error| LinuxError::Loader { reason: error.to_string() })?;
            object.write(Gpa::new(start + done), part)?;
            done += size as u64;
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "kernel_tests.rs"]
pub(super) mod tests;
