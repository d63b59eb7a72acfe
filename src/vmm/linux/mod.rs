//! Linux guests: the kernel in memory with all that its entry expects, and the machine around it.
//!
//! Guarantee: when `load` returns `Ok`, guest memory holds what the 64-bit boot protocol or PVH
//! promises; a kernel, RAM disk or command line that cannot be booted is refused with a sentence
//! before anything is written. Everything goes into the memory object: the guest's memory is rationed
//! from its first byte.

mod acpi;
mod board;
mod header;
mod initrd;
mod input_room;
mod kernel;
pub mod layout;
mod line;
mod power;
mod pvh;
mod registers;
mod vm;
mod zero_page;

use std::ops::Range;

use vm_memory::ByteValued;

use crate::addr::Gpa;
use crate::host_mm::MemoryObject;

use super::contract::boot::{self, BootMap};

pub use crate::vmm::error::{LinuxError, NEEDS_VIRTUALISATION};
pub use kernel::KernelKind;
pub use vm::{LinuxInput, LinuxVm};

pub(crate) use kernel::Entry;
use kernel::Kernel;

/// What a Linux guest is booted from.
#[derive(Clone, Copy, Debug)]
pub struct LinuxImage<'a> {
    /// A bzImage or a vmlinux.
    pub kernel: &'a [u8],
    /// The initial RAM disk.
    pub initrd: Option<&'a [u8]>,
    /// The command line.
    pub cmdline: &'a [u8],
    /// Number of vCPUs.
    pub vcpus: usize,
    /// Number of virtio devices.
    pub devices: usize,
}

/// Where things are that are different for each guest.
struct Memory {
    /// `[start, end)` and e820 type, in order.
    map: Vec<(u64, u64, u32)>,
    /// The RAM disk; empty without one.
    initrd: Range<u64>,
}

/// Loads a guest into `object`, which is fresh, and returns how its first vCPU begins.
///
/// # Errors
/// [`LinuxError`]: what is wrong with the image, or with the host.
pub(crate) fn load(object: &MemoryObject, image: &LinuxImage<'_>) -> Result<Entry, LinuxError> {
    let bytes = object.bytes();
    if bytes > layout::MAX_MEMORY_BYTES {
        return Err(LinuxError::MemorySize { bytes, max: layout::MAX_MEMORY_BYTES });
    }
    // All checks come before the first write.
    let kernel = Kernel::check(image.kernel, bytes)?;
    let cmdline = checked_cmdline(image.cmdline, kernel.max_cmdline())?;
    let initrd = match image.initrd {
        None => 0..0,
        Some(contents) => {
            initrd::check(contents)?;
            let size = contents.len() as u64;
            let start = initrd::place(size, kernel.end(), kernel.initrd_end())?;
            start..start + size
        }
    };
    let tables = acpi::build(image.vcpus, image.devices)?;
    let memory = Memory { map: boot::ram_map(bytes), initrd };

    let loaded = kernel.load(object)?;
    if let Some(contents) = image.initrd {
        object.write(Gpa::new(memory.initrd.start), contents)?;
    }
    let mut pieces = tables;
    pieces.push((layout::CMDLINE, cmdline));
    pieces.push((layout::RESET_FLAG, layout::RESET_NOT_ASKED.to_le_bytes().to_vec()));
    pieces.push((layout::FIRMWARE_ENTRY, power::FIRMWARE_RESET.to_vec()));
    pieces.push((layout::GDT, registers::gdt(loaded.entry)));
    match loaded.entry {
        Entry::Pvh(_) => pieces.extend(pvh::build(&memory)),
        Entry::Long(_) => {
            let params = zero_page::build(loaded.setup_header, &memory);
            pieces.push((layout::BOOT_PARAMS, params.as_slice().to_vec()));
            let tables = boot::identity_map(BootMap::FirstGib).into_iter();
            pieces.extend(tables.map(|(gpa, table)| (gpa.as_u64(), table.to_vec())));
        }
    }
    for (at, piece) in pieces {
        object.write(Gpa::new(at), &piece)?;
    }
    Ok(loaded.entry)
}

/// The command line with its final NUL.
fn checked_cmdline(cmdline: &[u8], max: u64) -> Result<Vec<u8>, LinuxError> {
    if cmdline.len() as u64 > max {
        return Err(LinuxError::CmdlineTooLong { bytes: cmdline.len(), max });
    }
    Ok(boot::terminated(cmdline)?)
}

#[cfg(test)]
mod tests;
