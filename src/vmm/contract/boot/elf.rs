//! The kernel image: a static 64-bit ELF executable, checked as a whole before any of it is used.

use elf::ElfBytes;
use elf::abi::{EI_NIDENT, ELFMAGIC, EM_X86_64, ET_EXEC, PF_X, PT_LOAD};
use elf::endian::AnyEndian;
use elf::file::{Class, FileHeader, parse_ident};
use elf::parse::ParseError;
use elf::segment::{ProgramHeader, SegmentTable};

use crate::abi;

use super::BootError;

/// Most bytes that an image may have.
pub const MAX_IMAGE_BYTES: u64 = 256 << 20;

/// Bytes of the header of a 64-bit ELF file, and of a program header (`Elf64_Ehdr`, `Elf64_Phdr`).
const HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: u16 = 56;

/// A piece of the image with its place in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment<'a> {
    /// Program header index.
    pub index: usize,
    /// Guest-physical address of its first byte.
    pub start: u64,
    /// Its initialised bytes.
    pub contents: &'a [u8],
    /// Its size in memory; what follows the contents is zero.
    pub memory_bytes: u64,
    /// Whether it holds code.
    pub is_executable: bool,
}

impl Segment<'_> {
    fn end(&self) -> u64 {
        // Checked to lie inside RAM when the segment was made.
        self.start.saturating_add(self.memory_bytes)
    }
}

/// A checked kernel image.
#[derive(Clone, Debug)]
pub struct Image<'a> {
    entry: u64,
    segments: Vec<Segment<'a>>,
}

impl<'a> Image<'a> {
    /// Checks `bytes` as an image for a guest with `memory_bytes` of RAM.
    ///
    /// # Errors
    /// [`BootError`] with the first thing that is wrong.
    pub fn parse(bytes: &'a [u8], memory_bytes: u64) -> Result<Self, BootError> {
        if bytes.len() as u64 > MAX_IMAGE_BYTES {
            return Err(BootError::TooBig { bytes: bytes.len() as u64, max: MAX_IMAGE_BYTES });
        }
        check_ident(bytes)?;
        let file = ElfBytes::<AnyEndian>::minimal_parse(bytes)
            .map_err(|error| cut_off(bytes).unwrap_or_else(|| not_elf(bytes, &error)))?;
        check_kind(&file)?;
        let mut segments = Vec::new();
        for (index, header) in file.segments().into_iter().flatten().enumerate() {
            if header.p_type == PT_LOAD && header.p_memsz != 0 {
                segments.push(segment(bytes, index, &header, memory_bytes)?);
            }
        }
        if segments.is_empty() {
            return Err(BootError::NoSegments);
        }
        check_overlaps(&segments)?;
        let entry = file.ehdr.e_entry;
        let is_code = |segment: &Segment<'_>| {
            segment.is_executable && (segment.start..segment.end()).contains(&entry)
        };
        if !segments.iter().any(is_code) {
            return Err(BootError::Entry { entry });
        }
        Ok(Self { entry, segments })
    }

    /// Guest-physical address of the first instruction, which is also its virtual address.
    #[must_use]
    pub fn entry(&self) -> u64 {
        self.entry
    }

    /// The segments in the order of the program headers.
    #[must_use]
    pub fn segments(&self) -> &[Segment<'a>] {
        &self.segments
    }
}

/// The program headers of a 64-bit, little-endian ELF file; none of another. What comes after them is
/// not looked at: the file may be cut off there.
pub(in crate::vmm) fn program_headers(bytes: &[u8]) -> impl Iterator<Item = ProgramHeader> {
    let table = header(bytes).filter(|header| header.e_phentsize == PROGRAM_HEADER_BYTES);
    let table = table.and_then(|header| {
        let start = usize::try_from(header.e_phoff).ok()?;
        let size = usize::from(header.e_phnum) * usize::from(PROGRAM_HEADER_BYTES);
        let table = bytes.get(start..start.checked_add(size)?)?;
        Some(SegmentTable::new(header.endianness, header.class, table))
    });
    table.into_iter().flat_map(|table| table.iter().collect::<Vec<_>>())
}

/// The header of a 64-bit, little-endian ELF file.
fn header(bytes: &[u8]) -> Option<FileHeader<AnyEndian>> {
    let (ident, tail) = bytes.get(..HEADER_BYTES)?.split_at(EI_NIDENT);
    let ident = parse_ident(ident).ok()?;
    let is_right = (ident.0, ident.1) == (AnyEndian::Little, Class::ELF64);
    is_right.then(|| FileHeader::parse_tail(ident, tail).ok()).flatten()
}

/// That the file ends before the tables that its header names, if it does. Those of sections are at
/// the end of what linkers make.
fn cut_off(bytes: &[u8]) -> Option<BootError> {
    let header = header(bytes)?;
    let end = |offset: u64, count: u16, entry_bytes: u16| match offset {
        0 => 0,
        _ => offset.saturating_add(u64::from(count) * u64::from(entry_bytes)),
    };
    let expected = end(header.e_phoff, header.e_phnum, header.e_phentsize)
        // A number that is too large for its field stands in the first entry.
        .max(end(header.e_shoff, header.e_shnum.max(1), header.e_shentsize));
    let found = bytes.len() as u64;
    (found < expected).then_some(BootError::CutOff { found, expected })
}

/// What is wrong with a file that the parser refused, in words that are about the file.
fn not_elf(bytes: &[u8], error: &ParseError) -> BootError {
    if !bytes.starts_with(&ELFMAGIC) {
        let found = match bytes {
            [] => "it is empty".to_owned(),
            // A text, or what it is else, is known by how it begins.
            _ => format!("it begins with \"{}\"", bytes[..bytes.len().min(8)].escape_ascii()),
        };
        return BootError::NotElf { found };
    }
    let what = match error {
        _ if bytes.len() < HEADER_BYTES => "the file ends before the header does",
        ParseError::UnsupportedElfClass(_) => "it is neither for 32 nor for 64 bits",
        ParseError::UnsupportedElfEndianness(_) => "its byte order is none",
        ParseError::UnsupportedVersion(_) => "its version is not 1",
        ParseError::BadEntsize(_) => "the entries of its tables have a size that none has",
        _ => "its tables lie outside the file",
    };
    BootError::DamagedElf { what }
}

/// Refuses a file for other kinds of processors, whose header has its fields in other places.
fn check_ident(bytes: &[u8]) -> Result<(), BootError> {
    let ident = bytes.get(..EI_NIDENT).and_then(|ident| parse_ident::<AnyEndian>(ident).ok());
    let Some((endianness, class, ..)) = ident else { return Ok(()) };
    if class != Class::ELF64 {
        return wrong_kind("class", format!("{class:?}"), "64-bit (ELF64)");
    }
    if endianness != AnyEndian::Little {
        return wrong_kind("byte order", "big-endian".to_owned(), "little-endian");
    }
    Ok(())
}

fn check_kind(file: &ElfBytes<'_, AnyEndian>) -> Result<(), BootError> {
    let header = &file.ehdr;
    if header.e_machine != EM_X86_64 {
        return wrong_kind("machine", header.e_machine.to_string(), "62 (x86-64)");
    }
    if header.e_type != ET_EXEC {
        return wrong_kind(
            "type",
            header.e_type.to_string(),
            "2 (executable, not position-independent)",
        );
    }
    Ok(())
}

fn wrong_kind(field: &'static str, found: String, wanted: &'static str) -> Result<(), BootError> {
    Err(BootError::WrongKind { field, found, wanted })
}

fn segment<'a>(
    bytes: &'a [u8],
    index: usize,
    header: &ProgramHeader,
    memory_bytes: u64,
) -> Result<Segment<'a>, BootError> {
    let (offset, file_bytes) = (header.p_offset, header.p_filesz);
    if file_bytes > header.p_memsz {
        return Err(BootError::Inverted { index, file_bytes, memory_bytes: header.p_memsz });
    }
    let range = offset
        .checked_add(file_bytes)
        .and_then(|end| Some(usize::try_from(offset).ok()?..usize::try_from(end).ok()?));
    let Some(contents) = range.and_then(|range| bytes.get(range)) else {
        return Err(BootError::Truncated {
            index,
            offset,
            file_bytes,
            file_end: bytes.len() as u64,
        });
    };
    let start = header.p_paddr;
    let fits = start.checked_add(header.p_memsz).is_some_and(|end| end <= memory_bytes);
    if start < abi::KERNEL_MIN_GPA || !fits {
        return Err(BootError::OutsideRam {
            index,
            start,
            bytes: header.p_memsz,
            min: abi::KERNEL_MIN_GPA,
            end: memory_bytes,
        });
    }
    let is_executable = header.p_flags & PF_X != 0;
    Ok(Segment { index, start, contents, memory_bytes: header.p_memsz, is_executable })
}

fn check_overlaps(segments: &[Segment<'_>]) -> Result<(), BootError> {
    let mut sorted: Vec<_> = segments.iter().collect();
    sorted.sort_by_key(|segment| segment.start);
    for pair in sorted.windows(2) {
        if let [first, second] = pair
            && second.start < first.end()
        {
            return Err(BootError::Overlap {
                first: first.index,
                second: second.index,
                at: second.start,
            });
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "elf_tests.rs"]
pub(in crate::vmm) mod tests;
