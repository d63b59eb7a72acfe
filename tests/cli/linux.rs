//! What a user can name for a Linux guest and what cannot be: refused before there is a guest, and
//! with nothing written to any disk image.

use std::fs::{self, File};
use std::io::Write;
use std::process::{Command, Stdio};

use flate2::Compression;
use flate2::write::GzEncoder;
use nix::fcntl::{FcntlArg, fcntl};
use ruzstd::encoding::{CompressionLevel, compress_to_vec};
use tempfile::TempDir;

use super::{assert_refused, bzimage};

/// An entry of a cpio archive, and not its last: a file "a" of 8 bytes (Linux
/// `Documentation/driver-api/early-userspace/buffer-format.rst`).
fn archive_entry() -> Vec<u8> {
    let (mode, file_bytes, name_bytes) = (0o100_644, 8, 2);
    let fields = [1, mode, 0, 0, 1, 0, file_bytes, 0, 0, 0, 0, name_bytes, 0];
    let header: String = fields.iter().map(|field| format!("{field:08x}")).collect();
    format!("070701{header}a\0contents").into_bytes()
}

struct Folder(TempDir);

impl Folder {
    /// With a kernel, as far as its header goes.
    fn new() -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        folder.file("kernel", &bzimage::image());
        folder
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_owned()
    }

    fn file(&self, name: &str, content: &[u8]) -> String {
        fs::write(self.path(name), content).unwrap();
        self.path(name)
    }

    /// The kernel with these bytes changed.
    fn changed(&self, at: usize, bytes: &[u8]) -> String {
        let mut kernel = fs::read(self.path("kernel")).unwrap();
        kernel[at..at + bytes.len()].copy_from_slice(bytes);
        self.file("changed", &kernel)
    }

    #[track_caller]
    fn assert_kernel_refused(&self, kernel: &str, parts: &[&str]) {
        assert_refused(&["boot", "--kernel", kernel], parts);
    }

    #[track_caller]
    fn assert_refused(&self, words: &[&str], parts: &[&str]) {
        let kernel = self.path("kernel");
        assert_refused(&[&["boot", "--kernel", &kernel], words].concat(), parts);
    }
}

#[test]
fn malformed_kernels() {
    let folder = Folder::new();
    let whole = fs::read(folder.path("kernel")).unwrap();
    let cut = folder.file("cut", &whole[..8000]);
    folder.assert_kernel_refused(&cut, &["truncated", "8000 bytes", "copy it again"]);
    let header_alone = folder.file("header", &whole[..0x206]);
    folder.assert_kernel_refused(&header_alone, &["bzImage"]);
    folder.assert_kernel_refused(&folder.changed(0x206, &[0x0b, 2]), &["2.11", "Linux 3.8"]);
    folder.assert_kernel_refused(&folder.changed(0x236, &[0]), &["no 64-bit entry"]);
    folder.assert_kernel_refused(&folder.changed(0x211, &[0]), &["damaged header", "loadflags"]);
    let large = folder.changed(0x260, &[0, 0, 0, 0x20]);
    folder.assert_kernel_refused(&large, &["guest memory up to", "choose more memory, 528 MiB"]);
    let wide = folder.changed(0x260, &[0, 0, 0, 0x80]);
    folder.assert_kernel_refused(&wide, &["up to 2164260864 bytes (2064 MiB)", "first 1024 MiB"]);
    let high = folder.changed(0x258, &[0, 0, 0, 0, 1]);
    folder.assert_kernel_refused(&high, &["at 0x100000000", "first 1024 MiB"]);
}

/// What `tool -c` makes of a file; `None` where there is no such tool.
fn packed(tool: &str, contents: &[u8]) -> Option<Vec<u8>> {
    let mut child =
        Command::new(tool).arg("-c").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().ok()?;
    child.stdin.take()?.write_all(contents).ok()?;
    Some(child.wait_with_output().ok()?.stdout)
}

fn gzip(contents: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(contents).unwrap();
    encoder.finish().unwrap()
}

/// By the crates that unpack them, and by the tools themselves where they are.
#[test]
fn compressed_kernels() {
    let folder = Folder::new();
    let damaged = fs::read(folder.changed(0x211, &[0])).unwrap();
    for (kind, own) in [
        ("gzip", gzip(&damaged)),
        ("zstd", compress_to_vec(&damaged[..], CompressionLevel::Fastest)),
    ] {
        for packed in [Some(own), packed(kind, &damaged)].into_iter().flatten() {
            // Unpacked, and then refused for what is in it.
            let whole = folder.file(kind, &packed);
            folder.assert_kernel_refused(&whole, &["damaged header", "loadflags"]);
            let cut = folder.file("cut", &packed[..packed.len() - 7]);
            folder.assert_kernel_refused(
                &cut,
                &[&cut, kind, "is truncated (it ends", "copy it again"],
            );
        }
    }
    for (kind, start) in [
        ("xz", &b"\xfd7zXZ\0"[..]),
        ("lz4", &[0x04, 0x22, 0x4d, 0x18]),
        ("bzip2", b"BZh91AY&SY"),
        ("lzma", b"]\0\0\x80\0\xff\xff\xff\xff\xff\xff\xff\xff\0"),
        ("lzop", b"\x89LZO\0\r\n\x1a\n"),
    ] {
        let own = [start, &damaged].concat();
        for packed in [Some(own), packed(kind, &damaged)].into_iter().flatten() {
            let path = folder.file(kind, &packed);
            let name = format!("is compressed by {kind}, which is not unpacked here");
            folder.assert_kernel_refused(&path, &[&path, &name, "unpack it yourself"]);
        }
    }
    let efi = folder.file("efi", b"MZ and so on");
    folder.assert_kernel_refused(&efi, &[&efi, "EFI program", "objcopy"]);
}

/// One gzip file after the other, each of a few KiB that hold a MiB of zeros.
#[test]
fn a_kernel_that_unpacks_to_more_than_it_may() {
    let folder = Folder::new();
    let bomb = folder.file("bomb", &gzip(&vec![0; 1 << 20]).repeat(300));
    folder.assert_kernel_refused(&bomb, &[&bomb, "holds more than the 256M", "a smaller one"]);
}

#[test]
fn damaged_initial_ram_disks() {
    let folder = Folder::new();
    let empty = folder.file("empty", b"");
    folder.assert_refused(&["--initrd", &empty], &["empty", "leave --initrd out"]);
    let entry = archive_entry();
    let cut = folder.file("cut", &entry[..entry.len() - 3]);
    folder.assert_refused(&["--initrd", &cut], &["truncated", "in the middle of \"a\""]);
    let open = folder.file("open", &entry);
    folder.assert_refused(&["--initrd", &open], &["truncated", "before its last entry"]);
    let missing = folder.path("missing");
    folder.assert_refused(&["--initrd", &missing], &[&missing, "No such file"]);
}

#[test]
fn initial_ram_disks_that_are_too_large() {
    let folder = Folder::new();
    let sparse = |bytes: u64| {
        let path = folder.path("large");
        File::create(&path).unwrap().set_len(bytes).unwrap();
        path
    };
    // Beside the kernel there is no room for it.
    let large = sparse(30 << 20);
    folder.assert_refused(
        &["--initrd", &large, "--memory", "32M"],
        &["31457280 bytes", "beside the kernel", "choose more memory"],
    );
    let larger = sparse((32 << 20) + 1);
    folder.assert_refused(
        &["--initrd", &larger, "--memory", "32M"],
        &[&larger, "33554433 bytes", "32M", "choose more --memory"],
    );
    let largest = sparse(4 << 40);
    folder.assert_refused(&["--initrd", &largest], &[&largest, "name a smaller one"]);
}

#[test]
fn disk_images_that_cannot_be_used() {
    let folder = Folder::new();
    let refused = |name: &str, parts: &[&str]| {
        let path = folder.path(name);
        for mode in ["", ",ro"] {
            folder
                .assert_refused(&["--disk", &format!("{path}{mode}")], &[&[name], parts].concat());
        }
    };
    refused("missing", &["there is no disk image"]);
    folder.file("zero", b"");
    refused("zero", &["is empty"]);
    folder.file("odd", &[7; 1000]);
    refused("odd", &["1000 bytes", "no multiple of 512"]);
    assert_eq!(fs::read(folder.path("odd")).unwrap(), [7; 1000]);
    refused(".", &["not a regular file, nor a block device"]);
    refused("../../../../../../dev/null", &["not a regular file, nor a block device"]);
    let mut qcow2 = vec![0; 4096];
    qcow2[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    folder.file("qcow2", &qcow2);
    refused("qcow2", &["is a qcow2 image", "qemu-img convert -f qcow2 -O raw", "add ,raw"]);
    // As raw it is taken, and what is wrong next is told.
    let raw = format!("{},raw", folder.path("qcow2"));
    let missing = folder.path("missing");
    folder.assert_refused(&["--disk", &raw, "--disk", &missing], &["there is no disk image"]);
    assert_eq!(fs::read(folder.path("qcow2")).unwrap(), qcow2);
}

/// Images of all formats that `qemu-img` writes, where there is one.
#[test]
fn disk_images_of_other_formats() {
    let folder = Folder::new();
    for (format, options, name) in [
        ("qcow2", "", "is a qcow2 image"),
        ("qcow", "", "is a qcow image"),
        ("qed", "", "is a QED image"),
        ("vdi", "", "is a VDI image"),
        ("vdi", "static=on", "is a VDI image"),
        ("vhdx", "", "is a VHDX image"),
        ("vpc", "", "is a VHD image"),
        ("vpc", "subformat=fixed", "is a VHD image"),
        ("vmdk", "", "is a VMDK image"),
        ("vmdk", "subformat=monolithicFlat", "is a VMDK image"),
        ("vmdk", "subformat=streamOptimized", "is a VMDK image"),
        ("parallels", "", "is a Parallels image"),
    ] {
        let path = folder.path(&format!("{format}.image"));
        let mut make = Command::new("qemu-img");
        make.args(["create", "-q", "-f", format, &path, "1M"]);
        if !options.is_empty() {
            make.args(["-o", options]);
        }
        // One that was built without a format, or is not there at all.
        if !make.stderr(Stdio::null()).status().is_ok_and(|status| status.success()) {
            continue;
        }
        let before = fs::read(&path).unwrap();
        folder.assert_refused(&["--disk", &path], &[&path, name, "qemu-img convert", "add ,raw"]);
        assert!(fs::read(&path).unwrap() == before, "{format} was changed");
    }
}

#[test]
fn a_disk_image_that_somebody_else_writes() {
    let folder = Folder::new();
    let disk = folder.file("disk", &[0; 4096]);
    let user = File::options().read(true).write(true).open(&disk).unwrap();
    let whole = nix::libc::flock {
        l_type: i16::try_from(nix::libc::F_WRLCK).unwrap(),
        l_whence: 0,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    fcntl(&user, FcntlArg::F_OFD_SETLK(&whole)).unwrap();
    for mode in ["", ",ro"] {
        folder.assert_refused(
            &["--disk", &format!("{disk}{mode}")],
            &[&disk, "in use", "read-only in both"],
        );
    }
    // Twice by the same guest is once too often as well.
    let other = folder.file("other", &[0; 4096]);
    folder.assert_refused(&["--disk", &other, "--disk", &other], &[&other, "in use"]);
}
