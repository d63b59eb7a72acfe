//! A disk in order.

use std::sync::Arc;

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
};

use super::rig::{BOTH, BUFFERS, Driver, Piece, VERSION_1, host};
use crate::virtio::{Block, Contents, DiskMode};

pub(super) const FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;
pub(super) const CONFIG_WCE: u64 = 1 << VIRTIO_BLK_F_CONFIG_WCE;

const HEADER: u64 = BUFFERS;
const STATUS: u64 = BUFFERS + 0x100;
const DATA: u64 = BUFFERS + 0x1800;

/// Writes a header and returns its piece.
pub(super) fn header(driver: &Driver, at: u64, kind: u32, sector: u64) -> Piece {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&sector.to_le_bytes());
    driver.write(at, &bytes);
    (at, 16, false)
}

/// Has one request served; returns its status and the bytes written.
pub(super) fn request(driver: &Driver, kind: u32, sector: u64, data: &[Piece]) -> (u32, u32) {
    driver.write(STATUS, &[0xff]);
    let mut pieces = vec![header(driver, HEADER, kind, sector)];
    pieces.extend_from_slice(data);
    pieces.push((STATUS, 1, true));
    let written = driver.serve(0, &pieces);
    (driver.read(STATUS, 1)[0].into(), written)
}

pub(super) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (0u64..)
        .flat_map(|word| (seed << 32 | word).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes())
        .take(len)
        .collect()
}

fn image(bytes: u64) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(bytes).unwrap();
    file
}

#[test]
fn what_is_written_is_in_the_image_and_read_back() {
    for kind in BOTH {
        let (mm, object) = host(kind, None);
        let file = image(1 << 20);
        let block = Arc::new(
            Block::open(file.path(), DiskMode::ReadWrite, Contents::Checked, "gnomon-0").unwrap(),
        );
        let driver = Driver::ready(block.clone(), &object, VERSION_1 | FLUSH, 16);
        assert_eq!(u64::from_le_bytes(driver.config(0)), 2048, "sectors");
        assert_eq!(u32::from_le_bytes(driver.config(20)), 512, "block size");

        // More than the bounce buffer, in pieces that are no sectors, across pages.
        let content = pattern(1, 300 * 512);
        driver.write(DATA, &content);
        let half = 100_001;
        let pieces = [(DATA, half, false), (DATA + u64::from(half), 300 * 512 - half, false)];
        assert_eq!(request(&driver, VIRTIO_BLK_T_OUT, 7, &pieces), (VIRTIO_BLK_S_OK, 1));
        assert_eq!(&std::fs::read(file.path()).unwrap()[7 * 512..307 * 512], content);

        mm.evict_frames(&super::rig::all_frames(&mm)).unwrap();
        driver.write(DATA, &vec![0; content.len()]);
        let pieces = [(DATA, half, true), (DATA + u64::from(half), 300 * 512 - half, true)];
        let whole = 300 * 512 + 1;
        assert_eq!(request(&driver, VIRTIO_BLK_T_IN, 7, &pieces), (VIRTIO_BLK_S_OK, whole));
        assert_eq!(driver.read(DATA, content.len()), content);

        assert_eq!(request(&driver, VIRTIO_BLK_T_FLUSH, 0, &[]), (VIRTIO_BLK_S_OK, 1));
        let id = request(&driver, VIRTIO_BLK_T_GET_ID, 0, &[(DATA, 20, true)]);
        assert_eq!(id, (VIRTIO_BLK_S_OK, 21));
        assert_eq!(driver.read(DATA, 20), b"gnomon-0\0\0\0\0\0\0\0\0\0\0\0\0");
        assert_eq!(request(&driver, 77, 0, &[]), (VIRTIO_BLK_S_UNSUPP, 1));
        let stats = block.stats();
        assert_eq!((stats.reads, stats.writes, stats.flushes, stats.errors), (1, 1, 1, 1));
        assert!(driver.transport.check_reverse_map().is_empty());
        assert_eq!(mm.violations().1, 0);
        assert!(driver.line.edges() > 0);
    }
}

#[test]
fn a_request_past_the_end_or_of_part_of_a_sector_is_refused_and_changes_nothing() {
    let (_mm, object) = host(BOTH[0], None);
    let file = image(1 << 20);
    let block =
        Arc::new(Block::open(file.path(), DiskMode::ReadWrite, Contents::Checked, "").unwrap());
    let driver = Driver::ready(block, &object, VERSION_1 | FLUSH, 16);
    driver.write(DATA, &[1; 1024]);
    for (sector, len) in [(2048, 512), (2047, 1024), (u64::MAX, 512), (0, 511), (0, 513)] {
        for (kind, is_written) in [(VIRTIO_BLK_T_OUT, false), (VIRTIO_BLK_T_IN, true)] {
            let found = request(&driver, kind, sector, &[(DATA, len, is_written)]);
            // Without data to come, the status is all there is room for.
            let written = u32::from(!is_written);
            assert_eq!(found, (VIRTIO_BLK_S_IOERR, written), "{len} bytes at {sector}");
        }
    }
    assert_eq!(request(&driver, VIRTIO_BLK_T_IN, 2048, &[]), (VIRTIO_BLK_S_OK, 1), "nothing");
    assert!(std::fs::read(file.path()).unwrap().iter().all(|&byte| byte == 0));
    assert_eq!(driver.read(DATA, 1024), [1; 1024]);
}

#[test]
fn a_read_only_disk_is_not_written() {
    let (_mm, object) = host(BOTH[0], None);
    let file = image(1 << 20);
    let block =
        Arc::new(Block::open(file.path(), DiskMode::ReadOnly, Contents::Checked, "").unwrap());
    let driver = Driver::new(block, &object);
    assert!(driver.offered() & 1 << VIRTIO_BLK_F_RO != 0);
    assert!(driver.offered() & FLUSH == 0);
    driver.begin(VERSION_1 | 1 << VIRTIO_BLK_F_RO, 16);
    driver.write(DATA, &[1; 512]);
    let refused = request(&driver, VIRTIO_BLK_T_OUT, 0, &[(DATA, 512, false)]);
    assert_eq!(refused, (VIRTIO_BLK_S_IOERR, 1));
    let read = request(&driver, VIRTIO_BLK_T_IN, 0, &[(DATA, 512, true)]);
    assert_eq!(read, (VIRTIO_BLK_S_OK, 513));
    assert_eq!(driver.read(DATA, 512), [0; 512]);
}

/// A file of so many bytes with these at these places.
fn image_with(bytes: u64, pieces: &[(u64, &[u8])]) -> tempfile::NamedTempFile {
    let file = image(bytes);
    for (at, piece) in pieces {
        std::os::unix::fs::FileExt::write_all_at(file.as_file(), piece, *at).unwrap();
    }
    file
}

/// The bytes are those of images that `qemu-img` makes.
#[test]
fn images_of_other_formats_are_refused_by_name_unless_they_are_to_be_raw() {
    let mib = 1 << 20;
    let images: &[(u64, u64, &[u8], &str)] = &[
        (196_616, 0, b"QFI\xfb\0\0\0\x03", "is a qcow2 image"),
        (560, 0, b"QFI\xfb\0\0\0\x01", "is a qcow image"),
        (327_680, 0, b"QED\0\0\0\x01\0", "is a QED image"),
        (8 * mib, 0, b"vhdxfileQ\0E\0M\0U\0", "is a VHDX image"),
        (2560, 0, b"conectix\0\0\0\x02", "is a VHD image"),
        (mib + 31_232, mib + 31_232 - 512, b"conectix\0\0\0\x02", "is a VHD image"),
        (mib + 511, mib, b"conectix\0\0\0\0", "is a VHD image"),
        (65_536, 0, b"KDMV\x01\0\0\0", "is a VMDK image"),
        (350, 0, b"# Disk DescriptorFile\nversion=1\n", "is a VMDK image"),
        (1024, 0x40, b"\x7f\x10\xda\xbe\x01\0\x01\0", "is a VDI image"),
        (mib, 0, b"WithouFreSpacExt\x02\0\0\0", "is a Parallels image"),
        (mib, mib - 512, b"koly\0\0\0\x04", "is a DMG image"),
        (777, 0, b"\x1f\x8b\x08\0\0\0\0\0", "is a gzip image"),
        (777, 0, b"\xfd7zXZ\0\0\x04", "is an xz image"),
    ];
    for &(bytes, at, magic, name) in images {
        let file = image_with(bytes, &[(at, magic)]);
        let open = |contents| Block::open(file.path(), DiskMode::ReadOnly, contents, "");
        let said = open(Contents::Checked).unwrap_err().to_string();
        assert!(said.contains(name) && said.contains("add ,raw"), "{said}");
        let remedy = if bytes == 777 { "unpack it with" } else { "qemu-img convert -f" };
        assert!(said.contains(remedy), "{said}");
        match open(Contents::Raw) {
            Ok(_) => assert_eq!(bytes % 512, 0, "{name}"),
            Err(error) => assert!(error.to_string().contains("no multiple of 512"), "{error}"),
        }
    }
    // What guests make of their own disks is raw.
    let raw: &[(u64, &[u8])] = &[
        (510, &[0x55, 0xaa]),
        (512, b"EFI PART"),
        (1080, &[0x53, 0xef]),
        (0, b"LUKS\xba\xbe\0\x02"),
        (0, b"LABELONE"),
        (257, b"ustar"),
        (32_769, b"CD001"),
        (0, b"hsqs"),
        (512, b"QFI\xfb"),
        (0, b"QFI\xfa"),
    ];
    for piece in raw {
        let file = image_with(mib, &[*piece]);
        Block::open(file.path(), DiskMode::ReadWrite, Contents::Checked, "").unwrap();
    }
}

/// One sentence for each thing that can be wrong with an image.
#[test]
fn images_that_cannot_be_used_are_refused_with_a_sentence() {
    let open =
        |path: &std::path::Path, mode| Block::open(path, mode, Contents::Checked, "").map(drop);
    let folder = tempfile::tempdir().unwrap();
    let refused = |name: &str, sentence: &str| {
        let path = folder.path().join(name);
        for mode in [DiskMode::ReadOnly, DiskMode::ReadWrite] {
            let error = open(&path, mode).unwrap_err().to_string();
            assert!(error.contains(sentence) && error.contains(name), "{error}");
        }
    };
    refused("missing", "there is no disk image");
    std::fs::create_dir(folder.path().join("folder")).unwrap();
    refused("folder", "not a regular file, nor a block device");
    nix::unistd::mkfifo(&folder.path().join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    refused("pipe", "not a regular file");
    std::os::unix::fs::symlink("/dev/null", folder.path().join("null")).unwrap();
    refused("null", "not a regular file, nor a block device");
    std::fs::write(folder.path().join("empty"), []).unwrap();
    refused("empty", "is empty");
    std::fs::write(folder.path().join("odd"), [0; 1000]).unwrap();
    refused("odd", "has 1000 bytes, which is no multiple of 512");
    std::fs::write(folder.path().join("file"), [0; 512]).unwrap();
    refused("file/part", "cannot be opened");
}

#[test]
fn an_image_is_locked_against_writers_and_several_may_read() {
    let file = image(512);
    let open = |mode| Block::open(file.path(), mode, Contents::Checked, "");
    let writer = open(DiskMode::ReadWrite).unwrap();
    for mode in [DiskMode::ReadOnly, DiskMode::ReadWrite] {
        let error = open(mode).unwrap_err().to_string();
        assert!(error.contains("is in use already"), "{error}");
    }
    drop(writer);
    let readers = [open(DiskMode::ReadOnly).unwrap(), open(DiskMode::ReadOnly).unwrap()];
    assert!(open(DiskMode::ReadWrite).is_err());
    drop(readers);
    open(DiskMode::ReadWrite).unwrap();
}
