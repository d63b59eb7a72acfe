//! Any file as a guest kernel, with any command line, on guests of several sizes.
//!
//! Checked, besides that nothing panics: an image is taken exactly if a second, naive reader of the
//! ELF format finds nothing wrong with it, and both find the same segments; loading writes the
//! segments, the command line, the zero page and three page tables, and no other page of the guest.

use std::collections::BTreeMap;

use super::{Bytes, number, one_of};
use crate::abi;
use crate::addr::{Gpa, PAGE_SIZE, PAGE_SIZE_U64};
use crate::host_mm::{HostMm, HostMmConfig, MIN_HOST_MEMORY_BYTES, MemoryObject, SwapConfig};
use crate::vmm::MIN_MEMORY_BYTES;
use crate::vmm::boot::{BootError, BootMap, Image, Segment, load};

const ELF_HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;
/// `e_phnum` that says the number is elsewhere.
const PN_XNUM: u16 = 0xffff;

pub(super) fn run(data: &[u8]) {
    let mut bytes = Bytes::new(data);
    let page = PAGE_SIZE_U64;
    let memory_bytes = one_of(
        &mut bytes,
        &[16 << 20, MIN_MEMORY_BYTES, MIN_MEMORY_BYTES + page, 4 << 30, 64 << 30],
    );
    let cmdline = any_cmdline(&mut bytes);
    let is_whole_file = number::<u8>(&mut bytes) & 1 == 1;
    let file = if is_whole_file {
        bytes.take_rest().to_vec()
    } else {
        any_image(&mut bytes, memory_bytes)
    };
    let naive = naive_segments(&file, memory_bytes);
    let image = match Image::parse(&file, memory_bytes) {
        Ok(image) => image,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            // Whole files may have faults that the naive reader does not look for.
            assert!(is_whole_file || naive.is_none(), "refused: {error}");
            return;
        }
    };
    let naive = naive.expect("taken, but the naive reader refuses it");
    let found: Vec<_> = image.segments().iter().map(Naive::of).collect();
    assert_eq!(found, naive);
    let is_code = |segment: &Naive<'_>| {
        segment.is_executable
            && (segment.start..segment.start + segment.memory_bytes).contains(&image.entry())
    };
    assert!(naive.iter().any(is_code), "entry point {:#x}", image.entry());
    load_and_compare(&image, &naive, memory_bytes, &cmdline);
}

// The input.

/// Short and of any bytes, or about as long as fits.
fn any_cmdline(bytes: &mut Bytes<'_>) -> Vec<u8> {
    let choice: u8 = number(bytes);
    if choice & 0xe0 == 0xe0 {
        return vec![b'x'; 4080 + usize::from(choice & 0x1f)];
    }
    (0..choice % 4).map(|_| number(bytes)).collect()
}

/// An ELF file that is nearly right.
fn any_image(bytes: &mut Bytes<'_>, memory_bytes: u64) -> Vec<u8> {
    let mut file = Vec::new();
    let headers = number::<u8>(bytes) % 5;
    let entry = any_address(bytes, memory_bytes);
    file.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    file.extend_from_slice(&[2, 0, 62, 0, 1, 0, 0, 0]);
    file.extend_from_slice(&entry.to_le_bytes());
    file.extend_from_slice(&(ELF_HEADER_BYTES as u64).to_le_bytes());
    file.extend_from_slice(&[0; 12]);
    file.extend_from_slice(&[64, 0, 56, 0, headers, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(file.len(), ELF_HEADER_BYTES);
    for _ in 0..headers {
        let [kind, flags] = [one_of(bytes, &[1u32, 4, 0]), u32::from(number::<u8>(bytes) ^ 5)];
        let address = any_address(bytes, memory_bytes);
        let file_bytes = any_size(bytes);
        let more = any_size(bytes);
        file.extend_from_slice(&kind.to_le_bytes());
        file.extend_from_slice(&flags.to_le_bytes());
        for word in [
            any_size(bytes),
            any_address(bytes, memory_bytes),
            address,
            file_bytes,
            file_bytes.wrapping_add(more),
            0,
        ] {
            file.extend_from_slice(&word.to_le_bytes());
        }
    }
    let body = bytes.len();
    file.extend_from_slice(bytes.bytes(body).unwrap_or_default());
    file
}

fn any_address(bytes: &mut Bytes<'_>, memory_bytes: u64) -> u64 {
    let kind: u8 = number(bytes);
    let offset = u64::from(kind >> 3) << 8;
    match kind % 8 {
        0..=3 => abi::KERNEL_MIN_GPA + offset,
        4 => abi::KERNEL_MIN_GPA - offset,
        5 => memory_bytes - offset,
        6 => abi::KERNEL_MIN_GPA + u64::from(number::<u16>(bytes)),
        _ => number(bytes),
    }
}

fn any_size(bytes: &mut Bytes<'_>) -> u64 {
    let kind: u8 = number(bytes);
    match kind % 4 {
        0 => u64::from(kind >> 2),
        1 => u64::from(number::<u16>(bytes)),
        2 => 1 << (kind >> 2),
        _ => number(bytes),
    }
}

// The naive reader.

#[derive(Debug, PartialEq, Eq)]
struct Naive<'a> {
    start: u64,
    contents: &'a [u8],
    memory_bytes: u64,
    is_executable: bool,
}

impl<'a> Naive<'a> {
    fn of(segment: &Segment<'a>) -> Self {
        let Segment { start, contents, memory_bytes, is_executable, .. } = *segment;
        Self { start, contents, memory_bytes, is_executable }
    }
}

/// `N` bytes of the file.
fn at<const N: usize>(file: &[u8], offset: u64) -> Option<[u8; N]> {
    let offset = usize::try_from(offset).ok()?;
    file.get(offset..offset.checked_add(N)?)?.try_into().ok()
}

/// System V ABI, "Object files", and the contract in `docs/guest-abi.md`; `None` if either is
/// broken.
fn naive_segments(file: &[u8], memory_bytes: u64) -> Option<Vec<Naive<'_>>> {
    // 64-bit, little-endian, version 1; static executable for x86-64.
    if at(file, 0)? != *b"\x7fELF\x02\x01\x01" || at(file, 16)? != [2, 0, 62, 0] {
        return None;
    }
    let word = |offset| at(file, offset).map(u64::from_le_bytes);
    let (entry, table) = (word(24)?, word(32)?);
    let size = u16::from_le_bytes(at(file, 54)?);
    let mut count = u64::from(u16::from_le_bytes(at(file, 56)?));
    if count == u64::from(PN_XNUM) {
        // In `sh_info` of the first section header.
        count = u64::from(u32::from_le_bytes(at(file, word(40)?.checked_add(44)?)?));
    }
    if count != 0 && usize::from(size) != PROGRAM_HEADER_BYTES {
        return None;
    }
    let mut segments: Vec<Naive<'_>> = Vec::new();
    for index in 0..count {
        let header = table.checked_add(index * PROGRAM_HEADER_BYTES as u64)?;
        let field = |offset: u64| word(header.checked_add(offset)?);
        let is_load = at(file, header)? == 1u32.to_le_bytes();
        let [_, offset, _, start, file_bytes, memory, _] = [0, 8, 16, 24, 32, 40, 48].map(field);
        let (offset, start, file_bytes, memory) = (offset?, start?, file_bytes?, memory?);
        field(48)?;
        if !is_load || memory == 0 {
            continue;
        }
        let end = start.checked_add(memory)?;
        let overlaps =
            |other: &Naive<'_>| start < other.start + other.memory_bytes && other.start < end;
        if start < abi::KERNEL_MIN_GPA
            || end > memory_bytes
            || file_bytes > memory
            || segments.iter().any(overlaps)
        {
            return None;
        }
        let range =
            usize::try_from(offset).ok()?..usize::try_from(offset.checked_add(file_bytes)?).ok()?;
        let is_executable = at::<1>(file, header.checked_add(4)?)?[0] & 1 != 0;
        let contents = file.get(range)?;
        segments.push(Naive { start, contents, memory_bytes: memory, is_executable });
    }
    let is_code = |segment: &Naive<'_>| {
        segment.is_executable
            && entry >= segment.start
            && entry - segment.start < segment.memory_bytes
    };
    segments.iter().any(is_code).then_some(segments)
}

// Loading.

/// Pages by number.
type Pages = BTreeMap<u64, [u8; PAGE_SIZE]>;

fn put(pages: &mut Pages, gpa: u64, bytes: &[u8]) {
    for (gpa, byte) in (gpa..).zip(bytes) {
        let page = pages.entry(gpa / PAGE_SIZE_U64).or_insert([0; PAGE_SIZE]);
        page[Gpa::new(gpa).page_offset()] = *byte;
    }
}

fn load_and_compare(image: &Image<'_>, segments: &[Naive<'_>], memory_bytes: u64, cmdline: &[u8]) {
    let swap = SwapConfig { path: None, dir: None, bytes: 1 << 20 };
    let config = HostMmConfig { swap, ..HostMmConfig::new(MIN_HOST_MEMORY_BYTES) };
    let mm = HostMm::new(config).expect("host memory");
    let object = mm.create_object(memory_bytes).expect("guest memory");
    let fits = (cmdline.len() as u64) < abi::CMDLINE_BYTES && !cmdline.contains(&0);
    match load(&object, image, cmdline, BootMap::Everything) {
        Ok(()) => assert!(fits, "took a command line of {} bytes", cmdline.len()),
        Err(error @ (BootError::CmdlineTooLong { .. } | BootError::CmdlineNul { .. })) => {
            assert!(!fits, "{error}");
            assert_eq!(mm.stats().frames_in_use, 0, "refused, but something was written");
            return;
        }
        Err(error) => panic!("a checked image does not load: {error}"),
    }
    let mut pages = Pages::new();
    for segment in segments {
        put(&mut pages, segment.start, segment.contents);
    }
    put(&mut pages, abi::CMDLINE_GPA, cmdline);
    put(&mut pages, abi::CMDLINE_GPA + cmdline.len() as u64, &[0]);
    check_pages(&object, &pages);
    // Their content is for unit tests to check; here it counts where they are.
    let tables = [0, 1, 2].map(|page| abi::BOOT_PML4_GPA + page * PAGE_SIZE_U64);
    for gpa in tables.into_iter().chain([abi::BOOT_PARAMS_GPA]) {
        assert!(!pages.contains_key(&(gpa / PAGE_SIZE_U64)), "{gpa:#x} is also the image's");
        pages.insert(gpa / PAGE_SIZE_U64, [0; PAGE_SIZE]);
    }
    assert_eq!(mm.stats().frames_in_use, pages.len() as u64, "pages written");
    check_memory_map(&object);
}

fn check_pages(object: &MemoryObject, pages: &Pages) {
    for (gfn, expected) in pages {
        let mut found = [0; PAGE_SIZE];
        object.read(Gpa::new(gfn * PAGE_SIZE_U64), &mut found).expect("a page of the guest");
        assert!(found == *expected, "guest frame {gfn:#x}");
    }
}

/// The e820 map in the zero page: in order, without overlaps, RAM only where there is some.
fn check_memory_map(object: &MemoryObject) {
    let mut page = [0; PAGE_SIZE];
    object.read(Gpa::new(abi::BOOT_PARAMS_GPA), &mut page).expect("the zero page");
    let mut last = 0;
    for index in 0..u64::from(page[0x1e8]) {
        let entry = 0x2d0 + index * 20;
        let word = |offset| at(&page, entry + offset).map(u64::from_le_bytes);
        let (start, bytes) = (word(0).expect("a start"), word(8).expect("a size"));
        let is_ram = at(&page, entry + 16) == Some(1u32.to_le_bytes());
        assert!(start >= last, "e820 entry {index} overlaps");
        last = start.checked_add(bytes).expect("an end");
        assert!(!is_ram || last <= object.bytes(), "e820 entry {index} is no RAM");
    }
}
