use std::sync::Arc;

use crate::host_mm::{HostMm, HostMmConfig, MIN_HOST_MEMORY_BYTES, Placement, SwapConfig};

use super::*;

/// Memory of the guests here.
pub(super) const RAM: u64 = 64 << 20;

/// Fresh memory of a guest, with the smallest ration.
pub(super) fn guest() -> Arc<MemoryObject> {
    guest_of(RAM)
}

fn guest_of(bytes: u64) -> Arc<MemoryObject> {
    let config = HostMmConfig {
        placement: Placement::Identity { guest_bytes: bytes },
        swap: SwapConfig { path: None, dir: None, bytes: RAM },
        ..HostMmConfig::new(MIN_HOST_MEMORY_BYTES)
    };
    HostMm::new(config).unwrap().create_object(bytes).unwrap()
}

fn image<'a>(kernel: &'a [u8], initrd: Option<&'a [u8]>) -> LinuxImage<'a> {
    LinuxImage { kernel, initrd, cmdline: b"console=ttyS0", vcpus: 2, devices: 1 }
}

fn read<const N: usize>(object: &MemoryObject, at: u64) -> [u8; N] {
    let mut found = [0; N];
    object.read(Gpa::new(at), &mut found).unwrap();
    found
}

fn u32_at(object: &MemoryObject, at: u64) -> u32 {
    u32::from_le_bytes(read(object, at))
}

#[test]
fn a_bzimage_with_a_ram_disk_is_in_memory_as_the_protocol_wants_it() {
    let kernel = header::tests::bzimage();
    let disk = [initrd::tests::entry("init", &[3; 9000]), initrd::tests::entry("TRAILER!!!", b"")];
    let disk = disk.concat();
    let object = guest();
    let entry = load(&object, &image(&kernel, Some(&disk))).unwrap();
    assert_eq!(entry, Entry::Long(0x100_0200));
    assert_eq!(read(&object, 0x2_0000), *b"console=ttyS0\0");
    assert_eq!(read(&object, 0x7202), *b"HdrS");
    let start = u32_at(&object, 0x7218);
    assert_eq!(u32_at(&object, 0x721c) as usize, disk.len());
    assert_eq!(start % 4096, 0);
    let mut found = vec![0; disk.len()];
    object.read(Gpa::new(start.into()), &mut found).unwrap();
    assert_eq!(found, disk);
    assert_eq!(read(&object, 0xe_0000), *b"RSD PTR ");
    assert_ne!(read::<8>(&object, 0x9000), [0; 8], "page tables");
    assert_ne!(read::<8>(&object, 0x510), [0; 8], "descriptors");
}

#[test]
fn a_vmlinux_with_a_note_is_entered_by_pvh() {
    let kernel = kernel::tests::vmlinux(Some(0x10_0008));
    let object = guest();
    let entry = load(&object, &image(&kernel, None)).unwrap();
    assert_eq!(entry, Entry::Pvh(0x10_0008));
    assert_eq!(u32_at(&object, 0x6000), 0x336e_c578);
    assert_eq!(u32_at(&object, 0x600c), 0, "no module");
    assert_eq!(read(&object, 0x7000), [0; 64], "no boot_params");
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_written() {
    let kernel = header::tests::bzimage();
    let refused = |object: &MemoryObject, image: &LinuxImage<'_>| {
        let error = load(object, image).unwrap_err().to_string();
        assert_eq!(object.host_mm().stats().frames_in_use, 0, "{error}");
        error
    };
    let object = guest();
    let disk = vec![1; usize::try_from(RAM).unwrap()];
    let large = refused(&object, &image(&kernel, Some(&disk)));
    assert!(large.contains("67108864 bytes, and 48234496 are free"), "{large}");
    assert!(refused(&object, &image(&kernel, Some(b""))).contains("is empty"));
    assert!(refused(&object, &image(&kernel, Some(b"070701"))).contains("is truncated"));
    let cmdline = vec![b'x'; 2048];
    let long = LinuxImage { cmdline: &cmdline, ..image(&kernel, None) };
    let vmlinux = kernel::tests::vmlinux(None);
    for long in [long, LinuxImage { kernel: &vmlinux, ..long }] {
        assert!(refused(&object, &long).contains("has 2048 bytes, more than the 2047"));
    }
    let nul = LinuxImage { cmdline: b"a\0b", ..image(&kernel, None) };
    assert!(refused(&object, &nul).contains("NUL at byte 1"));
    let vcpus = LinuxImage { vcpus: 300, ..image(&kernel, None) };
    assert!(refused(&object, &vcpus).contains("300 vCPUs"));
    let small = guest_of(16 << 20);
    assert!(refused(&small, &image(&kernel, None)).contains("choose more memory"));
    let huge = guest_of((3 << 30) + 4096);
    assert!(refused(&huge, &image(&kernel, None)).contains("3 GiB"));
}

#[test]
fn the_most_memory_is_below_the_devices() {
    let kernel = header::tests::bzimage();
    let object = guest_of(layout::MAX_MEMORY_BYTES);
    load(&object, &image(&kernel, Some(&[9; 100]))).unwrap();
    let start = u32_at(&object, 0x7218);
    assert_eq!(start, 0x7fff_f000, "below the kernel's own limit");
}
