//! A bzImage as far as its header goes: there is no kernel in it.

/// Bytes of the header, and where (Linux `Documentation/arch/x86/boot.rst`): boot protocol 2.15, code
/// above 1 MiB with a 64-bit entry, 7168 bytes of it after two sectors of setup.
const HEADER: [(usize, &[u8]); 13] = [
    (0x1f1, &[1]),
    (0x1f4, &[0xc0, 1]),
    (0x1fe, &[0x55, 0xaa]),
    (0x200, &[0xeb, 0x6a]),
    (0x202, b"HdrS"),
    (0x206, &[0x0f, 2]),
    (0x211, &[1]),
    (0x22c, &[0xff, 0xff, 0xff, 0x7f]),
    (0x230, &[0, 0, 0x20]),
    (0x234, &[1]),
    (0x236, &[3, 0, 0xff, 7]),
    (0x25a, &[0, 1]),
    (0x262, &[0x20]),
];

/// The whole file, which is taken for a kernel of Linux.
pub(crate) fn image() -> Vec<u8> {
    let mut image = vec![0; 8192];
    for (at, bytes) in HEADER {
        image[at..at + bytes.len()].copy_from_slice(bytes);
    }
    image
}
