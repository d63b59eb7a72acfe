//! Any files as a Linux kernel and its RAM disk, with any command line, on guests of several sizes.
//!
//! Checked, besides that nothing panics: what is refused leaves the guest's memory untouched; what is
//! taken is entered inside its kernel, with the RAM disk whole, in pages of its own above the kernel,
//! and with a memory map of nothing but what is there; no more pages are written than those files and
//! the structures of the boot protocol need.

use super::boot::{any_cmdline, any_image, check_memory_map};
use super::{Bytes, number, one_of};
use crate::abi;
use crate::addr::{Gpa, PAGE_SIZE_U64};
use crate::host_mm::{HostMm, HostMmConfig, MIN_HOST_MEMORY_BYTES, MemoryObject, SwapConfig};
use crate::vmm::linux::{Entry, LinuxError, LinuxImage, load};

/// Pages of descriptors, PVH's structures, boot parameters, page tables, command line, ACPI tables, the
/// firmware's entry.
const MOST_STRUCTURES: u64 = 2 + 1 + 5 + 2 + 4 + 1;
/// Bytes of a setup part of one sector.
const SETUP_BYTES: usize = 1024;

pub(super) fn run(data: &[u8]) {
    let mut bytes = Bytes::new(data);
    let memory_bytes = one_of(&mut bytes, &[32 << 20, 64 << 20, 16 << 20, 3 << 30, 4 << 30]);
    let cmdline = any_cmdline(&mut bytes);
    let vcpus = one_of(&mut bytes, &[1, 2, 255, 256]);
    let devices = one_of(&mut bytes, &[0, 1, 10, 11]);
    let initrd = match number::<u8>(&mut bytes) % 4 {
        0 => None,
        1 => Some(any_archive(&mut bytes)),
        _ => Some(any_bytes(&mut bytes)),
    };
    let kernel = match number::<u8>(&mut bytes) % 4 {
        0 => bytes.take_rest().to_vec(),
        1 => any_image(&mut bytes, memory_bytes),
        _ => any_bzimage(&mut bytes, memory_bytes),
    };
    let image = LinuxImage {
        kernel: &kernel,
        initrd: initrd.as_deref(),
        cmdline: &cmdline,
        vcpus,
        devices,
    };
    let swap = SwapConfig { path: None, dir: None, bytes: 1 << 20 };
    let config = HostMmConfig { swap, ..HostMmConfig::new(MIN_HOST_MEMORY_BYTES) };
    let mm = HostMm::new(config).expect("host memory");
    let object = mm.create_object(memory_bytes).expect("guest memory");
    match load(&object, &image) {
        Ok(entry) => check_loaded(&object, &image, entry),
        Err(error) => {
            assert!(
                !matches!(error, LinuxError::Memory(_) | LinuxError::Staging { .. }),
                "{error}"
            );
            assert!(!error.to_string().is_empty());
            assert_eq!(mm.stats().frames_in_use, 0, "refused, but something was written: {error}");
        }
    }
}

// The input.

fn any_bytes(bytes: &mut Bytes<'_>) -> Vec<u8> {
    let wanted = usize::from(number::<u8>(bytes)).min(bytes.len());
    bytes.bytes(wanted).unwrap_or_default().to_vec()
}

/// A cpio archive that is nearly right: entries of the format "newc".
fn any_archive(bytes: &mut Bytes<'_>) -> Vec<u8> {
    let mut archive = Vec::new();
    for _ in 0..number::<u8>(bytes) % 4 {
        let name = one_of(bytes, &["TRAILER!!!", "init", "a"]);
        let contents = any_bytes(bytes);
        let claimed = contents.len() as u64 + one_of(bytes, &[0, 0, 0, 1, 0xffff_0000]);
        archive.extend_from_slice(b"070701");
        for field in [0, 0, 0, 0, 1, 0, claimed, 0, 0, 0, 0, name.len() as u64 + 1, 0] {
            archive.extend_from_slice(format!("{:08x}", field & 0xffff_ffff).as_bytes());
        }
        archive.extend_from_slice(name.as_bytes());
        archive.push(0);
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend_from_slice(&contents);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
    let kept = archive.len() - usize::from(number::<u8>(bytes) % 8).min(archive.len());
    archive.truncate(kept);
    archive
}

/// A bzImage that is nearly right.
fn any_bzimage(bytes: &mut Bytes<'_>, memory_bytes: u64) -> Vec<u8> {
    let paragraphs = u32::from(number::<u8>(bytes)) + 33;
    let load_at = one_of(bytes, &[0x100_0000, 0x10_0000, memory_bytes - 0x1000, 0, u64::MAX]);
    let needs = one_of(bytes, &[0x10_0000u32, 0, 0x100_0000, u32::MAX]);
    let initrd_max = one_of(bytes, &[0x7fff_ffffu32, 0x100_ffff, 0, u32::MAX]);
    let mut image = vec![0; SETUP_BYTES + paragraphs as usize * 16];
    let mut put = |at: usize, field: &[u8]| image[at..at + field.len()].copy_from_slice(field);
    put(0x1f1, &[1]);
    put(0x1f4, &paragraphs.to_le_bytes());
    put(0x201, &[0x6a]);
    put(0x202, b"HdrS");
    put(0x206, &[0x0f, 2]);
    put(0x211, &[1]);
    put(0x22c, &initrd_max.to_le_bytes());
    put(0x236, &[1, 0]);
    put(0x238, &2047u32.to_le_bytes());
    put(0x258, &load_at.to_le_bytes());
    put(0x260, &needs.to_le_bytes());
    for _ in 0..number::<u8>(bytes) % 4 {
        let at = 0x1f1 + usize::from(number::<u8>(bytes) % 0x7b);
        image[at] = number(bytes);
    }
    let cut = usize::from(one_of(bytes, &[0u16, 0, 0, 1, 600, 5000])).min(image.len());
    image.truncate(image.len() - cut);
    image
}

// What was loaded.

fn check_loaded(object: &MemoryObject, image: &LinuxImage<'_>, entry: Entry) {
    assert!(object.bytes() <= 3 << 30 && image.vcpus <= 255 && image.devices <= 10);
    let entry_at = match entry {
        Entry::Long(at) => at,
        Entry::Pvh(at) => at.into(),
    };
    assert!((abi::KERNEL_MIN_GPA..object.bytes()).contains(&entry_at), "entry {entry_at:#x}");
    check_cmdline(object, image.cmdline);
    let mut most = MOST_STRUCTURES + image.kernel.len() as u64 / PAGE_SIZE_U64 + 2;
    // Segments begin anywhere in their pages, and there are no more than four.
    most += 8;
    if let Some(initrd) = image.initrd {
        most += initrd.len() as u64 / PAGE_SIZE_U64 + 2;
    }
    let written = object.host_mm().stats().frames_in_use;
    assert!(written <= most, "{written} pages written, of {most}");
    if let Entry::Long(_) = entry {
        check_memory_map(object);
        let start = u64::from(u32_at(object, abi::BOOT_PARAMS_GPA + 0x218));
        let size = u64::from(u32_at(object, abi::BOOT_PARAMS_GPA + 0x21c));
        assert_eq!(size, image.initrd.map_or(0, |initrd| initrd.len() as u64));
        if let Some(initrd) = image.initrd {
            assert!(start.is_multiple_of(PAGE_SIZE_U64) && start >= abi::KERNEL_MIN_GPA);
            assert!(start + size <= object.bytes());
            assert!(start >= kernel_end(image.kernel).unwrap_or(entry_at), "over the kernel");
            let mut found = vec![0; initrd.len()];
            object.read(Gpa::new(start), &mut found).expect("the RAM disk");
            assert!(found == initrd, "the RAM disk is not whole");
        }
    }
}

/// First byte after what a bzImage needs, by its own fields.
fn kernel_end(kernel: &[u8]) -> Option<u64> {
    if kernel.get(0x202..0x206) != Some(b"HdrS") {
        return None;
    }
    let load_at = u64::from_le_bytes(kernel.get(0x258..0x260)?.try_into().ok()?);
    let needs = u32::from_le_bytes(kernel.get(0x260..0x264)?.try_into().ok()?);
    load_at.checked_add(needs.into())
}

fn check_cmdline(object: &MemoryObject, cmdline: &[u8]) {
    let mut found = vec![0xff; cmdline.len() + 1];
    object.read(Gpa::new(abi::CMDLINE_GPA), &mut found).expect("the command line");
    assert_eq!(found.split_last(), Some((&0, cmdline)));
}

fn u32_at(object: &MemoryObject, gpa: u64) -> u32 {
    let mut word = [0; 4];
    object.read(Gpa::new(gpa), &mut word).expect("guest memory");
    u32::from_le_bytes(word)
}
