use crate::vmm::contract::devices::tests::Kept;

use super::*;

fn board() -> (Board, Kept) {
    let kept = Kept::default();
    (Board::new(Box::new(kept.clone()), Line::default(), Vec::new()), kept)
}

fn read<const N: usize>(board: &Board, port: u16) -> [u8; N] {
    let mut data = [0x5a; N];
    assert!(matches!(board.port_in(0, port, &mut data), Action::Continue));
    data
}

fn write(board: &Board, port: u16, data: &[u8]) -> Action {
    board.port_out(0, port, data)
}

#[test]
fn each_place_leads_where_the_table_says() {
    let (board, kept) = board();
    assert!(matches!(write(&board, 0x3f8, b"x"), Action::Continue));
    assert_eq!(*lock(&kept.0), b"x");
    assert_eq!(read(&board, 0x71), [0], "CMOS: no update in progress");
    assert_eq!(read(&board, 0xb004), [1, 0], "ACPI mode");
    assert_eq!(board.unknown_accesses(), 0);
    assert_eq!(read(&board, 0xcfc), [0xff; 4], "no PCI");
    assert_eq!(read(&board, 0x3f8), [0xff; 2], "the UART has registers of a byte");
    let mut data = [0; 8];
    board.mmio_read(0, Gpa::new(VIRTIO_BASE), &mut data);
    assert_eq!(data, [0xff; 8], "no device");
    board.mmio_write(0, Gpa::new(u64::MAX), &data);
    assert!(board.unknown_accesses() >= 4);
}

#[test]
fn power_off_and_reset_end_the_machine() {
    let (board, _) = board();
    let off = write(&board, 0xb004, &[0, 0x34]);
    assert!(matches!(off, Action::End(Outcome::PoweredOff)), "{off:?}");
    let reset = write(&board, 0x64, &[0xfe]);
    assert!(matches!(reset, Action::End(Outcome::Rebooted)), "{reset:?}");
}

#[test]
fn input_waits_for_the_guest_to_read_and_none_is_lost() {
    let (board, _) = board();
    let text: Vec<u8> = (0..=255).cycle().take(1000).collect();
    let mut found = Vec::new();
    std::thread::scope(|scope| {
        let sent = scope.spawn(|| board.send(&text));
        while found.len() < text.len() {
            // Line status: data is ready.
            if read::<1>(&board, 0x3fd)[0] & 1 != 0 {
                found.push(read::<1>(&board, 0x3f8)[0]);
            } else {
                std::thread::yield_now();
            }
        }
        assert!(sent.join().unwrap());
    });
    assert_eq!(found, text);
}

#[test]
fn the_end_of_the_machine_ends_a_wait_for_room() {
    let (board, _) = board();
    std::thread::scope(|scope| {
        let sent = scope.spawn(|| board.send(&[1; 1000]));
        while read::<1>(&board, 0x3fd)[0] & 1 == 0 {
            std::thread::yield_now();
        }
        board.over();
        assert!(!sent.join().unwrap());
    });
    assert!(!board.send(b"late"));
}
