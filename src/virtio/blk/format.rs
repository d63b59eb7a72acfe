//! Formats of disk images that are not raw, by the bytes that each begins or ends with.
//!
//! A guest that wrote such bytes to a raw disk can only have the next start of it refused: nothing of an
//! image is ever interpreted. What a guest makes of its own disk as a matter of course (partitions, file
//! systems, LUKS, a CD's image, an archive of tar) is raw.

use std::io;
use std::os::unix::fs::FileExt;

use super::disk::SECTOR_BYTES;
use crate::compressed::Compression;

/// Something else than a raw image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Of a machine's disk: its name, and the driver of `qemu-img` that reads it.
    Image(&'static str, &'static str),
    /// Of any file: its name, and a command that unpacks it.
    Compressed(&'static str, &'static str),
}

/// Bytes that are looked at.
const START_BYTES: usize = 512;

/// Where, which bytes, and the format's two names.
const STARTS: [(usize, &[u8], Format); 16] = [
    (0, b"QFI\xfb\0\0\0\x01", Format::Image("qcow", "qcow")),
    (0, b"QFI\xfb", Format::Image("qcow2", "qcow2")),
    (0, b"QED\0", Format::Image("QED", "qed")),
    (0, b"vhdxfile", Format::Image("VHDX", "vhdx")),
    (0, VHD, Format::Image("VHD", "vpc")),
    (0, b"KDMV", Format::Image("VMDK", "vmdk")),
    (0, b"COWD", Format::Image("VMDK", "vmdk")),
    (0, b"\xbe\xba\xfe\xca\0\0\0\0", Format::Image("VMDK", "vmdk")),
    (0, b"# Disk DescriptorFile", Format::Image("VMDK", "vmdk")),
    (0x40, b"\x7f\x10\xda\xbe", Format::Image("VDI", "vdi")),
    (0, b"WithoutFreeSpace", Format::Image("Parallels", "parallels")),
    (0, b"WithouFreSpacExt", Format::Image("Parallels", "parallels")),
    (0, b"Bochs Virtual HD Image", Format::Image("Bochs", "bochs")),
    (0, b"#!/bin/sh\n#V2.0 Format\n", Format::Image("cloop", "cloop")),
    (0, b"\x3a\xff\x26\xed", Format::Compressed("Android sparse", "simg2img")),
    (0, b"EVF\x09\x0d\x0a\xff\0", Format::Compressed("EnCase", "ewfexport")),
];
/// What a VHD ends with, and one that grows begins with, too.
const VHD: &[u8] = b"conectix";
/// Before that footer's last byte was written, in 2003 and earlier, it had 511 bytes.
const VHD_FOOTERS: [u64; 2] = [512, 511];
const DMG: &[u8] = b"koly";

impl Format {
    /// The format of what is on `disk`, of so many bytes; `None` if it is raw for all one can see.
    pub(super) fn of(disk: &impl FileExt, bytes: u64) -> io::Result<Option<Self>> {
        let mut start = [0; START_BYTES];
        let start = read_up_to(disk, 0, &mut start)?;
        let known = STARTS
            .iter()
            .find(|(at, magic, _)| start.get(*at..).is_some_and(|from| from.starts_with(magic)));
        if let Some(&(_, _, format)) = known {
            return Ok(Some(format));
        }
        if let Some(by) = Compression::of(start) {
            return Ok(Some(Self::Compressed(by.name(), by.command())));
        }
        let mut end = [0; 8];
        for footer in VHD_FOOTERS {
            if let Some(at) = bytes.checked_sub(footer)
                && read_up_to(disk, at, &mut end)? == VHD
            {
                return Ok(Some(Self::Image("VHD", "vpc")));
            }
        }
        if let Some(at) = bytes.checked_sub(SECTOR_BYTES)
            && read_up_to(disk, at, &mut end)?.starts_with(DMG)
        {
            return Ok(Some(Self::Image("DMG", "dmg")));
        }
        Ok(None)
    }

    /// The format's name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Image(name, _) | Self::Compressed(name, _) => name,
        }
    }

    /// A command that makes a raw image of `path`.
    pub(super) fn remedy(self, path: &std::path::Path) -> String {
        let path = path.display();
        match self {
            Self::Image(_, driver) => {
                format!("convert it with `qemu-img convert -f {driver} -O raw {path} NEW`")
            }
            Self::Compressed(_, command) => format!("unpack it with `{command} {path}`"),
        }
    }
}

/// As much as there is from `at` on.
fn read_up_to<'a>(disk: &impl FileExt, at: u64, bytes: &'a mut [u8]) -> io::Result<&'a [u8]> {
    let mut done = 0;
    while done < bytes.len() {
        match disk.read_at(&mut bytes[done..], at + done as u64) {
            Ok(0) => break,
            Ok(read) => done += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(&bytes[..done])
}
