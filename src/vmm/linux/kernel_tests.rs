use crate::vmm::contract::boot::tests::{CODE, DATA, Header, Maker};
use crate::vmm::linux::header::tests::bzimage;
use crate::vmm::linux::tests::{RAM, guest};

use super::*;
use proptest::prelude::*;

/// Where the note of [`vmlinux`] stands in the file.
const NOTE_AT: usize = 0x220;

/// An ELF file that is linked to the upper half, with a note that names a PVH entry.
pub(in crate::vmm::linux) fn vmlinux(pvh_entry: Option<u32>) -> Vec<u8> {
    let note_bytes = if pvh_entry.is_some() { 20 } else { 0 };
    let note = Header {
        kind: 4,
        offset: NOTE_AT as u64,
        file_bytes: note_bytes,
        memory_bytes: note_bytes,
        ..CODE
    };
    let mut image = Maker { headers: vec![CODE, DATA, note], ..Maker::default() }.build();
    for (index, address) in [CODE.address, DATA.address].into_iter().enumerate() {
        let at = 64 + index * 56 + 16;
        image[at..at + 8].copy_from_slice(&(0xffff_ffff_8000_0000 | address).to_le_bytes());
    }
    if let Some(entry) = pvh_entry {
        for word in [4u32, 4, 18, u32::from_le_bytes(*b"Xen\0"), entry] {
            image.extend_from_slice(&word.to_le_bytes());
        }
    }
    image
}

#[test]
fn kinds_are_told_by_their_looks() {
    assert_eq!(KernelKind::of(&bzimage()), KernelKind::BzImage);
    assert_eq!(KernelKind::of(&vmlinux(None)), KernelKind::Vmlinux);
    assert_eq!(KernelKind::of(crate::vmm::contract::boot::TEST_GUEST), KernelKind::GuestAbi);
    assert_eq!(KernelKind::of(b"no kernel"), KernelKind::GuestAbi);
    assert_eq!(KernelKind::of(&[]), KernelKind::GuestAbi);
}

#[test]
fn a_vmlinux_that_is_cut_off_is_refused_as_one() {
    let mut image = vmlinux(None);
    let whole = image.len();
    image[40..48].copy_from_slice(&(whole as u64).to_le_bytes());
    image[58..62].copy_from_slice(&[64, 0, 2, 0]);
    image.resize(whole + 2 * 64, 0);
    assert!(Kernel::check(&image, RAM).is_ok());
    for bytes in [whole + 100, whole, 0x210] {
        let cut = &image[..bytes];
        assert_eq!(KernelKind::of(cut), KernelKind::Vmlinux);
        let refused = Kernel::check(cut, RAM).err().unwrap().to_string();
        assert!(refused.contains(&format!("is truncated: it has {bytes} bytes")), "{refused}");
    }
}

#[test]
fn a_bzimage_goes_where_it_prefers_to_be() {
    let image = bzimage();
    let object = guest();
    let kernel = Kernel::check(&image, RAM).unwrap();
    let loaded = kernel.load(&object).unwrap();
    assert_eq!(loaded.entry, Entry::Long(0x100_0200));
    assert_eq!({ loaded.setup_header.unwrap().version }, 0x020f);
    let mut found = vec![0; 0x1000];
    object.read(Gpa::new(0x100_0000), &mut found).unwrap();
    assert_eq!(found, image[image.len() - 0x1000..]);
    assert_eq!((kernel.end(), kernel.max_cmdline()), (0x120_0000, 2047));
}

#[test]
fn a_vmlinux_goes_segment_by_segment_and_begins_where_its_note_says() {
    let object = guest();
    let image = vmlinux(Some(0x10_0008));
    let loaded = Kernel::check(&image, RAM).unwrap().load(&object).unwrap();
    assert_eq!(loaded.entry, Entry::Pvh(0x10_0008));
    assert!(loaded.setup_header.is_none());
    let mut found = [0; 0x10];
    object.read(Gpa::new(DATA.address), &mut found).unwrap();
    assert_eq!(found, image[0x210..0x220]);

    let loaded = Kernel::check(&vmlinux(None), RAM).unwrap().load(&guest()).unwrap();
    assert_eq!(loaded.entry, Entry::Long(0x10_0004), "without a note the ELF header's");
}

#[test]
fn a_vmlinux_has_room_for_no_more_of_a_command_line_than_a_bzimage() {
    let room = Kernel::check(&vmlinux(None), RAM).unwrap().max_cmdline();
    assert_eq!(room, Kernel::check(&bzimage(), RAM).unwrap().max_cmdline());
}

#[test]
fn a_note_that_leads_out_of_the_image_is_refused() {
    let image = vmlinux(Some(0x7000));
    let error = Kernel::check(&image, RAM).unwrap().load(&guest()).err().unwrap();
    assert!(error.to_string().contains("entry point 0x7000"), "{error}");
}

#[test]
fn what_is_no_kernel_is_refused_with_a_sentence() {
    let refused = |image: &[u8]| Kernel::check(image, RAM).err().unwrap().to_string();
    assert!(refused(b"#!/bin/sh").contains("neither a bzImage nor an ELF file"));
    assert!(refused(&[]).contains("neither a bzImage nor an ELF file"));
    let cut = vmlinux(None);
    assert!(refused(&cut[..0x208]).contains("the file ends at 0x208"));
    let far = Header { address: RAM, ..DATA };
    let far = Maker { headers: vec![CODE, far], ..Maker::default() }.build();
    assert!(refused(&far).contains("choose more memory, 65 MiB"), "{}", refused(&far));
    let further = Header { address: 1 << 30, ..DATA };
    let further = Maker { headers: vec![CODE, further], ..Maker::default() }.build();
    let said = refused(&further);
    assert!(said.contains("at 0x40000000") && said.contains("the first 1024 MiB"), "{said}");
}

proptest! {
    #[test]
    fn mangled_files_are_refused_or_loaded_but_never_panic(
        flips in proptest::collection::vec((0..0x2a0usize, any::<u8>()), 1..8),
        is_elf in any::<bool>(),
        cut in proptest::option::of(0..0x1600usize),
    ) {
        let mut image = if is_elf { vmlinux(Some(0x10_0008)) } else { bzimage() };
        for (at, value) in flips {
            if let Some(byte) = image.get_mut(at) {
                *byte = value;
            }
        }
        if let Some(cut) = cut {
            image.truncate(cut);
        }
        let object = guest();
        if let Ok(kernel) = Kernel::check(&image, RAM) {
            prop_assert!(kernel.end() <= RAM);
            if let Ok(loaded) = kernel.load(&object) {
                let entry = match loaded.entry {
                    Entry::Long(entry) => entry,
                    Entry::Pvh(entry) => entry.into(),
                };
                prop_assert!((layout::HIGH_MEMORY..kernel.end()).contains(&entry));
            }
        }
    }
}
