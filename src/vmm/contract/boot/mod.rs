//! Booting a guest: the kernel image, the boot parameters, the first page tables.
//!
//! Guarantee: when [`load`] returns `Ok`, guest memory holds what the 64-bit boot protocol
//! promises to the kernel at its entry point; an image that does not fit the contract is refused
//! with a sentence that has the numbers, before anything is written.

mod boot_params;
mod elf;
mod page_tables;

use crate::abi;
use crate::addr::Gpa;
use crate::host_mm::MemoryObject;
use crate::vmm::cpu::{Features, GuestCpu, gpr};

pub use crate::vmm::error::BootError;
pub use elf::{Image, MAX_IMAGE_BYTES, Segment};
pub use page_tables::BootMap;

pub(in crate::vmm) use elf::program_headers;
/// Images made by hand, for tests.
#[cfg(test)]
pub(in crate::vmm) use elf::tests;

pub(in crate::vmm) use boot_params::{ram_map, terminated};
pub(in crate::vmm) use page_tables::build as identity_map;

/// The test guest that the build made: an [`Image`].
pub static TEST_GUEST: &[u8] = gnomon_guest::IMAGE;

/// Loads `image` and everything that its entry expects into `object`, with page tables of this kind.
///
/// # Errors
/// [`BootError`]: the command line does not fit, or the host fails.
pub fn load(
    object: &MemoryObject,
    image: &Image<'_>,
    cmdline: &[u8],
    map: BootMap,
) -> Result<(), BootError> {
    let cmdline = boot_params::terminated(cmdline)?;
    for segment in image.segments() {
        // The rest of the segment, its zeros, needs no writing: fresh memory is zero.
        object.write(Gpa::new(segment.start), segment.contents)?;
    }
    object.write(Gpa::new(abi::CMDLINE_GPA), &cmdline)?;
    let params = boot_params::build(object.bytes(), cmdline.len());
    object.write(Gpa::new(abi::BOOT_PARAMS_GPA), &params)?;
    for (gpa, table) in page_tables::build(map) {
        object.write(gpa, &table)?;
    }
    Ok(())
}

/// The first vCPU as it enters an image that was [loaded](load).
pub(in crate::vmm) fn first_cpu(image: &Image<'_>, features: Features) -> GuestCpu {
    let mut cpu = GuestCpu::at_boot(Gpa::new(abi::BOOT_PML4_GPA), features);
    cpu.rip = image.entry();
    cpu.gpr[gpr::RSI] = abi::BOOT_PARAMS_GPA;
    cpu
}
