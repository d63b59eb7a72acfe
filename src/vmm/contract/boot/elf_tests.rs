use super::*;

const RAM: u64 = 16 << 20;

/// One program header of a hand-made image.
#[derive(Clone, Copy)]
pub(in crate::vmm) struct Header {
    pub(in crate::vmm) kind: u32,
    pub(in crate::vmm) flags: u32,
    pub(in crate::vmm) offset: u64,
    pub(in crate::vmm) address: u64,
    pub(in crate::vmm) file_bytes: u64,
    pub(in crate::vmm) memory_bytes: u64,
}

pub(in crate::vmm) const CODE: Header = Header {
    kind: 1,
    flags: 5,
    offset: 0x200,
    address: 0x10_0000,
    file_bytes: 0x10,
    memory_bytes: 0x1000,
};
pub(in crate::vmm) const DATA: Header =
    Header { flags: 6, offset: 0x210, address: 0x20_0000, ..CODE };

pub(in crate::vmm) struct Maker {
    pub(in crate::vmm) class: u8,
    pub(in crate::vmm) data: u8,
    pub(in crate::vmm) kind: u16,
    pub(in crate::vmm) machine: u16,
    pub(in crate::vmm) entry: u64,
    pub(in crate::vmm) headers: Vec<Header>,
    pub(in crate::vmm) bytes: usize,
}

impl Default for Maker {
    fn default() -> Self {
        let headers = vec![CODE, DATA];
        Self { class: 2, data: 1, kind: 2, machine: 62, entry: 0x10_0004, headers, bytes: 0x220 }
    }
}

impl Maker {
    pub(in crate::vmm) fn build(&self) -> Vec<u8> {
        let mut file = vec![0u8; self.bytes];
        let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &[0x7f, b'E', b'L', b'F', self.class, self.data, 1, 0]);
        put(16, &self.kind.to_le_bytes());
        put(18, &self.machine.to_le_bytes());
        put(20, &1u32.to_le_bytes());
        put(24, &self.entry.to_le_bytes());
        put(32, &64u64.to_le_bytes());
        put(52, &64u16.to_le_bytes());
        put(54, &56u16.to_le_bytes());
        put(56, &u16::try_from(self.headers.len()).unwrap().to_le_bytes());
        for (index, header) in self.headers.iter().enumerate() {
            let at = 64 + index * 56;
            put(at, &header.kind.to_le_bytes());
            put(at + 4, &header.flags.to_le_bytes());
            put(at + 8, &header.offset.to_le_bytes());
            put(at + 16, &header.address.to_le_bytes());
            put(at + 24, &header.address.to_le_bytes());
            put(at + 32, &header.file_bytes.to_le_bytes());
            put(at + 40, &header.memory_bytes.to_le_bytes());
        }
        for (byte, value) in file[0x200..].iter_mut().zip(1..) {
            *byte = value;
        }
        file
    }

    fn refusal(&self) -> String {
        Image::parse(&self.build(), RAM).unwrap_err().to_string()
    }
}

#[test]
fn a_good_image_gives_its_segments_and_entry() {
    let file = Maker::default().build();
    let image = Image::parse(&file, RAM).unwrap();
    assert_eq!(image.entry(), 0x10_0004);
    let starts: Vec<_> =
        image.segments().iter().map(|s| (s.start, s.memory_bytes, s.contents[0])).collect();
    assert_eq!(starts, [(0x10_0000, 0x1000, 1), (0x20_0000, 0x1000, 0x11)]);
}

#[test]
fn segments_that_are_not_loaded_may_be_anything() {
    let note =
        Header { kind: 4, offset: u64::MAX, address: 0, file_bytes: 9, memory_bytes: 1, flags: 0 };
    let empty = Header { memory_bytes: 0, file_bytes: 0, address: 0, ..CODE };
    let file = Maker { headers: vec![note, empty, CODE], ..Maker::default() }.build();
    assert_eq!(Image::parse(&file, RAM).unwrap().segments().len(), 1);
}

#[test]
fn what_is_no_elf_file_is_refused_with_what_it_is() {
    let refusal = |bytes: &[u8]| Image::parse(bytes, RAM).unwrap_err().to_string();
    for (bytes, found) in [
        (&b""[..], "(it is empty)"),
        (b"x", "(it begins with \"x\")"),
        (b"#!/bin/sh\n", "(it begins with \"#!/bin/s\")"),
        (&[0x7f, b'E'], "(it begins with \"\\x7fE\")"),
        (&[0; 64], "(it begins with \"\\x00"),
    ] {
        let said = refusal(bytes);
        assert!(
            said.contains("neither a bzImage nor an ELF file") && said.contains(found),
            "{said}"
        );
    }
    let whole = Maker::default().build();
    let with = |at: usize, value: u8| {
        let mut file = whole.clone();
        file[at] = value;
        file
    };
    for (file, what) in [
        (whole[..4].to_vec(), "the file ends before the header does"),
        (whole[..63].to_vec(), "the file ends before the header does"),
        (with(4, 3), "neither for 32 nor for 64 bits"),
        (with(5, 3), "byte order"),
        (with(6, 2), "version"),
        (with(54, 57), "the entries of its tables have a size"),
        (with(39, 0xff), "truncated"),
        (with(4, 1)[..20].to_vec(), "class ELF32"),
    ] {
        let said = refusal(&file);
        assert!(said.contains(what), "no {what:?} in: {said}");
        assert!(!said.contains("Could not") && !said.contains("Invalid"), "the library's: {said}");
    }
}

#[test]
fn a_file_that_ends_before_its_tables_was_cut_off() {
    let mut file = Maker::default().build();
    let found = file.len();
    // Three section headers behind the rest.
    file[40..48].copy_from_slice(&(found as u64).to_le_bytes());
    file[58..62].copy_from_slice(&[64, 0, 3, 0]);
    let refusal = |file: &[u8]| Image::parse(file, RAM).unwrap_err().to_string();
    assert_eq!(
        refusal(&file),
        "the kernel image is truncated: it has 544 bytes, and its ELF header says that it has 736 at least; copy it again"
    );
    assert!(refusal(&file[..100]).contains("is truncated: it has 100 bytes"));
    file.resize(found + 3 * 64, 0);
    assert!(Image::parse(&file, RAM).is_ok());
    file[58] = 63;
    assert!(refusal(&file).contains("the entries of its tables have a size that none has"));
}

#[test]
fn program_headers_are_read_whatever_comes_after_them() {
    let file = Maker::default().build();
    let kinds = |file: &[u8]| program_headers(file).map(|it| it.p_vaddr).collect::<Vec<_>>();
    let both = [CODE.address, DATA.address];
    assert_eq!(kinds(&file), both);
    assert_eq!(kinds(&file[..64 + 2 * 56]), both);
    assert!(kinds(&file[..64 + 2 * 56 - 1]).is_empty());
    assert!(kinds(&Maker { class: 1, ..Maker::default() }.build()).is_empty());
    assert!(kinds(&Maker { data: 2, ..Maker::default() }.build()).is_empty());
    let mut wild = file;
    wild[32..40].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(kinds(&wild).is_empty());
}

#[test]
fn no_prefix_of_an_image_panics_or_is_taken() {
    let file = Maker::default().build();
    for length in 0..file.len() {
        assert!(Image::parse(&file[..length], RAM).is_err(), "{length} bytes");
    }
}

#[test]
fn other_kinds_of_elf_files_are_refused() {
    let refusal = Maker { kind: 3, ..Maker::default() }.refusal();
    assert_eq!(
        refusal,
        "the kernel image is an ELF file with type 3, but 2 (executable, not position-independent) is needed: link it so, or name another"
    );
    let refusal = Maker { machine: 183, ..Maker::default() }.refusal();
    assert!(refusal.contains("machine 183"), "{refusal}");
    let refusal = Maker { class: 1, ..Maker::default() }.refusal();
    assert!(refusal.contains("class ELF32"), "{refusal}");
    let refusal = Maker { data: 2, ..Maker::default() }.refusal();
    assert!(refusal.contains("big-endian"), "{refusal}");
}

#[test]
fn an_image_without_segments_is_refused() {
    let refusal = Maker { headers: vec![], ..Maker::default() }.refusal();
    assert_eq!(refusal, "the kernel image has no segment to load: link it anew, or name another");
}

#[test]
fn a_truncated_segment_is_refused() {
    let long = Header { file_bytes: 0x100, ..DATA };
    let refusal = Maker { headers: vec![CODE, long], ..Maker::default() }.refusal();
    assert_eq!(
        refusal,
        "segment 1 of the kernel image has 256 bytes at file offset 0x210, but the file ends at 0x220; copy it again"
    );
    let wraps = Header { offset: u64::MAX, ..DATA };
    let refusal = Maker { headers: vec![wraps], ..Maker::default() }.refusal();
    assert!(refusal.contains("but the file ends at"), "{refusal}");
}

#[test]
fn a_segment_larger_in_the_file_than_in_memory_is_refused() {
    let inverted = Header { memory_bytes: 8, ..DATA };
    let refusal = Maker { headers: vec![CODE, inverted], ..Maker::default() }.refusal();
    assert_eq!(
        refusal,
        "segment 1 of the kernel image has 16 bytes in the file but only 8 in memory: copy or link it again"
    );
}

#[test]
fn a_segment_outside_kernel_memory_is_refused() {
    for (address, memory_bytes) in [
        (0xf_f000, 0x1000),
        (0, 0x10),
        (RAM, 0x10),
        (RAM - 0x800, 0x1000),
        (u64::MAX - 0xf, 0x10),
        (0x10_0000, u64::MAX),
    ] {
        let header = Header { address, memory_bytes, ..CODE };
        let refusal = Maker { headers: vec![header], ..Maker::default() }.refusal();
        assert!(
            refusal.contains("outside guest RAM for kernels, 0x100000 to 0x1000000"),
            "{refusal}"
        );
        assert!(refusal.contains(&format!("{address:#x}")), "{refusal}");
    }
}

#[test]
fn overlapping_segments_are_refused() {
    let inside = Header { address: 0x10_0800, ..DATA };
    let refusal = Maker { headers: vec![inside, CODE], ..Maker::default() }.refusal();
    assert_eq!(refusal, "segments 1 and 0 of the kernel image overlap at 0x100800: link it anew");
    let touching = Header { address: 0x10_1000, ..DATA };
    assert!(
        Image::parse(&Maker { headers: vec![touching, CODE], ..Maker::default() }.build(), RAM)
            .is_ok()
    );
}

#[test]
fn an_entry_point_outside_code_is_refused() {
    for entry in [0, 0x20_0000, 0x10_1000, u64::MAX] {
        let refusal = Maker { entry, ..Maker::default() }.refusal();
        assert_eq!(
            refusal,
            format!(
                "the entry point {entry:#x} of the kernel image is in none of its executable segments: link it anew"
            )
        );
    }
}

#[test]
fn an_oversized_image_is_refused_before_it_is_parsed() {
    let bytes = vec![0u8; usize::try_from(MAX_IMAGE_BYTES).unwrap() + 1];
    let refusal = Image::parse(&bytes, RAM).unwrap_err();
    assert!(matches!(refusal, BootError::TooBig { bytes: 268_435_457, .. }));
}
