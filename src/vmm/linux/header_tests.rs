use super::*;
use proptest::prelude::*;

const RAM: u64 = 64 << 20;
/// Sectors of the setup part of [`bzimage`].
const SETUP_SECTORS: u8 = 2;
/// Bytes of its protected-mode part.
const PAYLOAD_BYTES: usize = 0x1000;

/// A small file that is as a bzImage should be.
pub(in crate::vmm::linux) fn bzimage() -> Vec<u8> {
    let setup = (usize::from(SETUP_SECTORS) + 1) * 512;
    let mut image = vec![0u8; setup];
    image.extend((0..PAYLOAD_BYTES).map(|at| u8::try_from(at % 251).unwrap()));
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[SETUP_SECTORS]);
    put(0x1f4, &u32::try_from(PAYLOAD_BYTES / 16).unwrap().to_le_bytes());
    put(0x1fe, &[0x55, 0xaa]);
    // A jump over the header, which ends at 0x26c.
    put(0x200, &[0xeb, 0x6a]);
    put(0x202, b"HdrS");
    put(0x206, &0x020fu16.to_le_bytes());
    put(0x211, &[1]);
    put(0x214, &0x10_0000u32.to_le_bytes());
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x230, &0x20_0000u32.to_le_bytes());
    put(0x234, &[1]);
    put(0x236, &3u16.to_le_bytes());
    put(0x238, &2047u32.to_le_bytes());
    put(0x258, &0x100_0000u64.to_le_bytes());
    put(0x260, &0x20_0000u32.to_le_bytes());
    image
}

fn with(at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut image = bzimage();
    image[at..at + bytes.len()].copy_from_slice(bytes);
    image
}

fn refused(image: &[u8]) -> String {
    Plan::new(image, RAM).unwrap_err().to_string()
}

#[test]
fn the_plan_is_what_the_header_says() {
    let image = bzimage();
    assert!(is_bzimage(&image));
    let expected = Plan {
        load_at: 0x100_0000,
        bytes: PAYLOAD_BYTES as u64,
        end: 0x120_0000,
        max_cmdline: 2047,
        initrd_end: 0x8000_0000,
    };
    assert_eq!(Plan::new(&image, RAM).unwrap(), expected);
    // What follows, a signature, is loaded, too.
    let signed = [image, vec![9; 100]].concat();
    assert_eq!(Plan::new(&signed, RAM).unwrap().bytes, PAYLOAD_BYTES as u64 + 100);
}

#[test]
fn each_fault_has_its_sentence() {
    let image = bzimage();
    let cut = refused(&image[..image.len() - 1]);
    assert!(cut.contains("is truncated: it has 5631 bytes") && cut.contains("5632"), "{cut}");
    assert!(refused(&image[..0x210]).contains("truncated"));
    let old = refused(&with(0x206, &0x0206u16.to_le_bytes()));
    assert!(old.contains("boot protocol 2.06 and no 64-bit entry"), "{old}");
    let other = refused(&with(0x236, &[0, 0]));
    assert!(other.contains("boot protocol 2.15 and no 64-bit entry"), "{other}");
    assert!(refused(&with(0x211, &[0])).contains("loadflags is 0x0"));
    assert!(refused(&with(0x1f4, &[0; 4])).contains("syssize is 0x0"));
    assert!(refused(&with(0x258, &[0; 8])).contains("pref_address is 0x0"));
    let highest = refused(&with(0x258, &[0xff; 8]));
    assert!(highest.contains("is built to lie at 0xffffffffffffffff"), "{highest}");
    let high = refused(&with(0x258, &0x4000_0000u64.to_le_bytes()));
    assert!(high.contains("up to 1075838976 bytes (1026 MiB)"), "{high}");
    assert!(high.contains("in the first 1024 MiB") && !high.contains("damaged"), "{high}");
    let wide = refused(&with(0x260, &u32::MAX.to_le_bytes()));
    assert!(
        wide.contains("at 0x1000000 and needs guest memory") && wide.contains("4112 MiB"),
        "{wide}"
    );
    assert!(refused(&with(0x238, &[0; 4])).contains("cmdline_size is 0x0"));
    let big = refused(&with(0x260, &(64u32 << 20).to_le_bytes()));
    assert!(big.contains("up to 83886080 bytes, and there are 67108864"), "{big}");
    assert!(big.contains("choose more memory, 80 MiB at least"), "{big}");
}

#[test]
fn a_header_that_ends_early_has_zeros_after_it() {
    // It ends before `xloadflags`.
    let short = with(0x201, &[0x32]);
    assert_eq!({ read(&short).unwrap().xloadflags }, 0);
    assert_eq!({ read(&short).unwrap().kernel_alignment }, 0x20_0000);
}

proptest! {
    #[test]
    fn a_mangled_header_is_refused_or_stays_within_the_guest(
        flips in proptest::collection::vec((0x1f1..0x270usize, any::<u8>()), 1..6),
        keep in 0..0x1600usize,
        is_cut in any::<bool>(),
    ) {
        let mut image = bzimage();
        for (at, value) in flips {
            image[at] = value;
        }
        if is_cut {
            image.truncate(keep);
        }
        if let Ok(plan) = Plan::new(&image, RAM) {
            prop_assert!(plan.load_at >= layout::HIGH_MEMORY && plan.end <= RAM);
            prop_assert!(plan.load_at + plan.bytes <= plan.end);
            prop_assert!(plan.bytes <= image.len() as u64);
        }
    }
}
