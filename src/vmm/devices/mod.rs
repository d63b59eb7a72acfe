//! The guest's devices: a serial port, the exit port, and the hypercall port, on a port bus.
//!
//! Guarantee: any access of any width to any port is answered; what is not a device reads as all
//! ones and swallows writes, and is counted. A console that fails loses output, nothing else.

mod serial;

use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::abi;
use crate::sync::{Mutex, lock};

use super::emulate::PortWidth;
use serial::SerialPort;

pub(super) use vm_superio::serial::SerialState;

/// What a port write asks of the vCPU thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PortAction {
    /// Nothing more.
    None,
    /// End the VM with this exit code.
    Exit(u8),
    /// Carry out the hypercall that the registers hold.
    Hypercall,
}

/// All ports of one VM; shared by its vCPUs.
pub(super) struct PortBus {
    serial: Mutex<SerialPort>,
    unknown: AtomicU64,
}

impl PortBus {
    /// A bus whose serial port writes to `console`.
    pub(super) fn new(console: Box<dyn Write + Send>) -> Self {
        Self { serial: Mutex::new(SerialPort::new(console)), unknown: AtomicU64::new(0) }
    }

    /// Puts the devices in the state of another bus's; the console stays.
    pub(super) fn set_state(&self, state: &SerialState) -> Result<(), String> {
        lock(&self.serial).set_state(state)
    }

    /// The state of its devices.
    pub(super) fn state(&self) -> SerialState {
        lock(&self.serial).state()
    }

    /// Accesses to ports that do not exist.
    pub(super) fn unknown_accesses(&self) -> u64 {
        self.unknown.load(Ordering::Relaxed)
    }

    /// Bytes that the console did not take.
    pub(super) fn lost_console_bytes(&self) -> u64 {
        lock(&self.serial).lost_bytes()
    }

    /// Reads from `port`.
    pub(super) fn read(&self, port: u16, width: PortWidth) -> u32 {
        // A wide access is one access to each byte's port, as on the ISA bus.
        let mut bytes = [0u8; 4];
        for (port, byte) in
            (0..4).map(|offset| port.wrapping_add(offset)).zip(&mut bytes).take(width.bytes())
        {
            *byte = match serial_register(port) {
                Some(register) => lock(&self.serial).read(register),
                None => {
                    self.unknown.fetch_add(1, Ordering::Relaxed);
                    0xff
                }
            };
        }
        u32::from_le_bytes(bytes)
    }

    /// Writes `value` to `port`.
    pub(super) fn write(&self, port: u16, width: PortWidth, value: u32) -> PortAction {
        if port == abi::PORT_EXIT {
            let [code, ..] = value.to_le_bytes();
            return PortAction::Exit(code << 1 | 1);
        }
        if port == abi::PORT_HYPERCALL && width == PortWidth::Dword {
            return PortAction::Hypercall;
        }
        for (offset, byte) in (0..).zip(value.to_le_bytes()).take(width.bytes()) {
            match serial_register(port.wrapping_add(offset)) {
                Some(register) => lock(&self.serial).write(register, byte),
                None => {
                    self.unknown.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
        PortAction::None
    }
}

/// Index of the UART register behind `port`.
fn serial_register(port: u16) -> Option<u8> {
    port.checked_sub(abi::PORT_SERIAL)
        .and_then(|offset| u8::try_from(offset).ok())
        .filter(|offset| *offset < 8)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    /// A console that keeps what it gets.
    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>);

    impl Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            lock(&self.0).extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    /// A console that is gone.
    struct Broken;

    impl Write for Broken {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::BrokenPipe.into())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn serial_output_reaches_the_console() {
        let kept = Kept::default();
        let bus = PortBus::new(Box::new(kept.clone()));
        for byte in b"hi\n" {
            assert_eq!(bus.write(0x3f8, PortWidth::Byte, u32::from(*byte)), PortAction::None);
        }
        assert_eq!(*lock(&kept.0), b"hi\n");
        assert_eq!(
            bus.read(0x3fd, PortWidth::Byte) & 0x20,
            0x20,
            "the transmitter is always ready"
        );
        assert_eq!(bus.unknown_accesses(), 0);
    }

    #[test]
    fn a_broken_console_loses_bytes_and_nothing_else() {
        let bus = PortBus::new(Box::new(Broken));
        for _ in 0..5 {
            assert_eq!(bus.write(0x3f8, PortWidth::Byte, 0x41), PortAction::None);
        }
        assert_eq!(bus.lost_console_bytes(), 5);
    }

    #[test]
    fn a_port_in_anothers_state_prints_to_its_own_console() {
        let source = PortBus::new(Box::new(std::io::sink()));
        // DLAB: the data register is the divisor's.
        source.write(0x3fb, PortWidth::Byte, 0x80);
        source.write(0x3f8, PortWidth::Byte, 0x0c);
        let kept = Kept::default();
        let clone = PortBus::new(Box::new(kept.clone()));
        clone.set_state(&source.state()).unwrap();
        assert_eq!(clone.read(0x3f8, PortWidth::Byte), 0x0c);
        clone.write(0x3fb, PortWidth::Byte, 0x03);
        clone.write(0x3f8, PortWidth::Byte, u32::from(b'x'));
        assert_eq!(*lock(&kept.0), b"x");
        assert_eq!(source.read(0x3fb, PortWidth::Byte), 0x80, "the source keeps its own");
    }

    #[test]
    fn loopback_does_not_grow_without_bound() {
        let bus = PortBus::new(Box::new(std::io::sink()));
        bus.write(0x3fc, PortWidth::Byte, 0x10);
        for _ in 0..1000 {
            bus.write(0x3f8, PortWidth::Byte, 0x55);
        }
        assert_eq!(bus.read(0x3f8, PortWidth::Byte), 0x55);
    }

    #[test]
    fn exit_and_hypercall_ports_ask_for_action() {
        let bus = PortBus::new(Box::new(std::io::sink()));
        assert_eq!(bus.write(0xf4, PortWidth::Byte, 0x10), PortAction::Exit(0x21));
        assert_eq!(bus.write(0xf4, PortWidth::Dword, 0xffff_ff80), PortAction::Exit(1));
        assert_eq!(bus.write(0x600, PortWidth::Dword, 3), PortAction::Hypercall);
        assert_eq!(bus.write(0x600, PortWidth::Byte, 3), PortAction::None);
    }

    #[test]
    fn unknown_ports_read_all_ones_and_are_counted_by_the_byte() {
        let bus = PortBus::new(Box::new(std::io::sink()));
        assert_eq!(bus.read(0x80, PortWidth::Byte), 0xff);
        assert_eq!(bus.read(0x80, PortWidth::Word), 0xffff);
        assert_eq!(bus.read(0xffff, PortWidth::Dword), u32::MAX);
        assert_eq!(bus.write(0x80, PortWidth::Dword, 0), PortAction::None);
        assert_eq!(bus.unknown_accesses(), 11);
    }
}
