//! Commands on fake memory, whose every access outside itself panics.

use proptest::prelude::*;

use crate::vmm::contract::devices::dma::tests::FakeRam;

use super::*;

const RAM: usize = 0x4_0000;
/// Where the descriptor is.
const AT: u64 = 0x80;

/// A descriptor without its status and result.
#[derive(Clone, Copy, Debug)]
struct Wanted {
    command: u32,
    source: u64,
    destination: u64,
    bytes: u64,
    pattern: u64,
}

const COPY: Wanted =
    Wanted { command: 1, source: 0x1001, destination: 0x5ffe, bytes: 0x2003, pattern: 0 };

fn ram() -> FakeRam {
    let ram = FakeRam::new(RAM);
    for (index, byte) in (0u32..).zip(ram.content().iter_mut()) {
        *byte = index.wrapping_mul(0x9e37_79b1).to_le_bytes()[3];
    }
    ram
}

/// Serves one descriptor; returns status and result as the guest finds them.
fn serve(ram: &FakeRam, wanted: &Wanted) -> (u32, u64) {
    let at = usize::try_from(AT).unwrap();
    let words = [
        u64::from(wanted.command),
        wanted.source,
        wanted.destination,
        wanted.bytes,
        wanted.pattern,
        u64::MAX,
    ];
    for (offset, word) in (at..).step_by(8).zip(words) {
        ram.content()[offset..offset + 8].copy_from_slice(&word.to_le_bytes());
    }
    let served = Engine::default().serve(ram, Gpa::new(AT)).unwrap();
    let content = ram.content();
    let status = u32::from_le_bytes(content[at + 4..at + 8].try_into().unwrap());
    let result = u64::from_le_bytes(content[at + 40..at + 48].try_into().unwrap());
    let expected = if status == 1 { Served::Done(wanted.bytes) } else { Served::Refused };
    assert_eq!(served, expected);
    (status, result)
}

fn range(at: u64, bytes: u64) -> std::ops::Range<usize> {
    usize::try_from(at).unwrap()..usize::try_from(at + bytes).unwrap()
}

#[test]
fn a_copy_copies_and_touches_nothing_else() {
    let ram = ram();
    let mut expected = ram.content().clone();
    let source = range(COPY.source, COPY.bytes);
    expected.copy_within(source, usize::try_from(COPY.destination).unwrap());
    assert_eq!(serve(&ram, &COPY), (1, 0));
    assert_eq!(ram.content()[0x100..], expected[0x100..]);
    assert_eq!(ram.content()[..0x80], expected[..0x80]);
}

#[test]
fn a_fill_repeats_its_pattern() {
    let ram = ram();
    let fill = Wanted { command: 2, pattern: 0x0807_0605_0403_0201, bytes: 19, ..COPY };
    let before = ram.content().clone();
    assert_eq!(serve(&ram, &fill), (1, 0));
    let content = ram.content();
    let filled = &content[range(fill.destination, 19)];
    assert_eq!(filled[..9], [1, 2, 3, 4, 5, 6, 7, 8, 1]);
    assert_eq!(filled[16..], [1, 2, 3]);
    let end = range(fill.destination, 19).end;
    assert_eq!(content[end..], before[end..]);
}

#[test]
fn the_checksum_is_the_one_of_the_contract() {
    let ram = ram();
    ram.content()[0x1001..0x1001 + 9].copy_from_slice(&[1, 0, 0, 0, 0, 0, 0, 0, 2]);
    let sum = Wanted { command: 3, bytes: 9, ..COPY };
    // By the words of docs/guest-abi.md.
    let step = |sum: u64, word: u64| {
        let product = u128::from(sum ^ word) * 0x9e37_79b9_7f4a_7c15;
        u64::try_from(product % (1 << 64)).unwrap().rotate_left(29)
    };
    assert_eq!(serve(&ram, &sum), (1, step(step(0, 1), 2)));
    let swapped = Wanted { source: 0x1009, bytes: 1, ..sum };
    assert_eq!(serve(&ram, &swapped), (1, step(0, 2)));
}

#[test]
fn bad_descriptors_are_refused_with_the_reason_and_change_nothing() {
    let end = RAM as u64;
    let fill = Wanted { command: 2, ..COPY };
    let sum = Wanted { command: 3, ..COPY };
    let cases = [
        (Wanted { command: 0, ..COPY }, 1),
        (Wanted { command: 4, ..COPY }, 1),
        (Wanted { command: u32::MAX, bytes: 0, ..COPY }, 1),
        (Wanted { bytes: 0, ..COPY }, 2),
        (Wanted { bytes: 0x1_0001, ..fill }, 2),
        (Wanted { bytes: u64::MAX, ..sum }, 2),
        (Wanted { source: end - 1, bytes: 2, ..COPY }, 3),
        (Wanted { destination: end, bytes: 1, ..fill }, 3),
        (Wanted { source: u64::MAX, bytes: 2, ..sum }, 3),
        (Wanted { destination: abi::WINDOW_GPA, ..COPY }, 3),
        (Wanted { destination: COPY.source, ..COPY }, 4),
        (Wanted { destination: COPY.source + COPY.bytes - 1, ..COPY }, 4),
        (Wanted { source: COPY.destination + COPY.bytes - 1, ..COPY }, 4),
    ];
    for (wanted, reason) in cases {
        let ram = ram();
        let before = ram.content().clone();
        assert_eq!(serve(&ram, &wanted), (2, reason), "{wanted:?}");
        assert_eq!(ram.content()[0x100..], before[0x100..], "{wanted:?}");
    }
    // The neighbours of the bounds.
    for wanted in [
        Wanted { bytes: 0x1_0000, source: 0, ..sum },
        Wanted { destination: end - 1, bytes: 1, ..fill },
        Wanted { destination: COPY.source + COPY.bytes, ..COPY },
        Wanted { source: COPY.destination, destination: COPY.destination - COPY.bytes, ..COPY },
    ] {
        assert_eq!(serve(&ram(), &wanted).0, 1, "{wanted:?}");
    }
}

#[test]
fn a_command_over_its_own_descriptor_still_gets_its_status() {
    let ram = ram();
    let fill = Wanted { command: 2, destination: AT - 8, bytes: 256, pattern: 7, ..COPY };
    assert_eq!(serve(&ram, &fill), (1, 0));
    assert_eq!(ram.content()[0x100], 7);
}

proptest! {
    /// Whatever a descriptor holds, it is served, and the fake memory has seen nothing outside.
    #[test]
    fn any_descriptor_is_answered(
        command in 0u32..5,
        source in any::<u64>(), destination in any::<u64>(), bytes in any::<u64>(),
        small in any::<[bool; 3]>(), pattern in any::<u64>(),
    ) {
        let cut = |value: u64, small: bool, to: u64| if small { value % to } else { value };
        let end = RAM as u64 + 2;
        let wanted = Wanted {
            command,
            source: cut(source, small[0], end),
            destination: cut(destination, small[1], end),
            bytes: cut(bytes, small[2], abi::DMA_MAX_BYTES + 2),
            pattern,
        };
        let (status, result) = serve(&ram(), &wanted);
        prop_assert!(status == 1 || (status == 2 && (1..=4).contains(&result)));
    }
}
