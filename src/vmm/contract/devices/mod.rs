//! The guest's devices: a serial port, the exit port, the hypercall port, and a DMA device, on a
//! port bus.
//!
//! Guarantee: any access of any width to any port is answered; what is not a device reads as all
//! ones and swallows writes, and is counted. A console that fails loses output, nothing else.

pub(in crate::vmm) mod dma;
pub(in crate::vmm) mod serial;

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::abi;
use crate::sync::{Mutex, lock};
use crate::vmm::cpu::emulate::PortWidth;
use crate::vmm::run::bus::Action;
use crate::vmm::run::outcome::Outcome;

use dma::DmaDevice;

use serial::SerialPort;
pub(in crate::vmm) use vm_superio::serial::SerialState;

/// All ports of one VM; shared by its vCPUs.
pub(in crate::vmm) struct PortBus {
    serial: Mutex<SerialPort>,
    dma: Arc<DmaDevice>,
    unknown: AtomicU64,
}

impl PortBus {
    /// A bus with this DMA device, and a serial port that writes to `console`.
    pub(in crate::vmm) fn new(console: Box<dyn Write + Send>, dma: Arc<DmaDevice>) -> Self {
        Self { serial: Mutex::new(SerialPort::new(console)), dma, unknown: AtomicU64::new(0) }
    }

    /// The DMA device.
    pub(in crate::vmm) fn dma(&self) -> &Arc<DmaDevice> {
        &self.dma
    }

    /// Sets the registers of its serial port to those of another bus's; the console stays.
    pub(in crate::vmm) fn set_serial_state(&self, state: &SerialState) -> Result<(), String> {
        lock(&self.serial).set_state(state)
    }

    /// The registers of its serial port.
    pub(in crate::vmm) fn serial_state(&self) -> SerialState {
        lock(&self.serial).state()
    }

    /// Accesses to ports that do not exist.
    pub(in crate::vmm) fn unknown_accesses(&self) -> u64 {
        self.unknown.load(Ordering::Relaxed)
    }

    /// Bytes that the console did not take.
    pub(in crate::vmm) fn lost_console_bytes(&self) -> u64 {
        lock(&self.serial).lost_bytes()
    }

    /// Reads from `port`.
    pub(in crate::vmm) fn read(&self, port: u16, width: PortWidth) -> u32 {
        if port == abi::PORT_DMA && width == PortWidth::Dword {
            return self.dma.unfinished();
        }
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
    pub(in crate::vmm) fn write(&self, port: u16, width: PortWidth, value: u32) -> Action {
        if port == abi::PORT_EXIT {
            let [code, ..] = value.to_le_bytes();
            return Action::End(Outcome::GuestExit(code << 1 | 1));
        }
        if port == abi::PORT_HYPERCALL && width == PortWidth::Dword {
            return Action::Hypercall;
        }
        if port == abi::PORT_DMA && width == PortWidth::Dword {
            self.dma.ring(value);
            return Action::Continue;
        }
        for (offset, byte) in (0..).zip(value.to_le_bytes()).take(width.bytes()) {
            match serial_register(port.wrapping_add(offset)) {
                Some(register) => lock(&self.serial).write(register, byte),
                None => {
                    self.unknown.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
        Action::Continue
    }
}

/// Index of the UART register behind `port`.
fn serial_register(port: u16) -> Option<u8> {
    port.checked_sub(abi::PORT_SERIAL)
        .and_then(|offset| u8::try_from(offset).ok())
        .filter(|offset| *offset < 8)
}

#[cfg(test)]
pub(in crate::vmm) mod tests {
    use super::dma::tests::FakeRam;
    use super::*;

    /// A console that keeps what it gets.
    #[derive(Clone, Default)]
    pub(in crate::vmm) struct Kept(pub(in crate::vmm) Arc<Mutex<Vec<u8>>>);

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

    fn bus(console: impl Write + Send + 'static) -> PortBus {
        let dma = Arc::new(DmaDevice::new(Arc::new(FakeRam::new(4096))));
        PortBus::new(Box::new(console), dma)
    }

    fn goes_on(action: Action) {
        assert!(matches!(action, Action::Continue), "{action:?}");
    }

    #[test]
    fn serial_output_reaches_the_console() {
        let kept = Kept::default();
        let bus = bus(kept.clone());
        for byte in b"hi\n" {
            goes_on(bus.write(0x3f8, PortWidth::Byte, u32::from(*byte)));
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
        let bus = bus(Broken);
        for _ in 0..5 {
            goes_on(bus.write(0x3f8, PortWidth::Byte, 0x41));
        }
        assert_eq!(bus.lost_console_bytes(), 5);
    }

    #[test]
    fn a_port_in_the_state_of_another_prints_to_its_own_console() {
        let source = bus(std::io::sink());
        // DLAB: the data register is the divisor's.
        source.write(0x3fb, PortWidth::Byte, 0x80);
        source.write(0x3f8, PortWidth::Byte, 0x0c);
        let kept = Kept::default();
        let clone = bus(kept.clone());
        clone.set_serial_state(&source.serial_state()).unwrap();
        assert_eq!(clone.read(0x3f8, PortWidth::Byte), 0x0c);
        clone.write(0x3fb, PortWidth::Byte, 0x03);
        clone.write(0x3f8, PortWidth::Byte, u32::from(b'x'));
        assert_eq!(*lock(&kept.0), b"x");
        assert_eq!(source.read(0x3fb, PortWidth::Byte), 0x80, "the source keeps its own");
    }

    #[test]
    fn loopback_does_not_grow_without_bound() {
        let bus = bus(std::io::sink());
        bus.write(0x3fc, PortWidth::Byte, 0x10);
        for _ in 0..1000 {
            bus.write(0x3f8, PortWidth::Byte, 0x55);
        }
        assert_eq!(bus.read(0x3f8, PortWidth::Byte), 0x55);
    }

    #[test]
    fn exit_and_hypercall_ports_ask_for_action() {
        let bus = bus(std::io::sink());
        assert!(matches!(
            bus.write(0xf4, PortWidth::Byte, 0x10),
            Action::End(Outcome::GuestExit(0x21))
        ));
        assert!(matches!(
            bus.write(0xf4, PortWidth::Dword, 0xffff_ff80),
            Action::End(Outcome::GuestExit(1))
        ));
        assert!(matches!(bus.write(0x600, PortWidth::Dword, 3), Action::Hypercall));
        goes_on(bus.write(0x600, PortWidth::Byte, 3));
    }

    #[test]
    fn the_dma_doorbell_is_one_port_of_32_bits() {
        let bus = bus(std::io::sink());
        goes_on(bus.write(0x610, PortWidth::Dword, 3));
        assert_eq!(bus.read(0x610, PortWidth::Dword), 1);
        goes_on(bus.write(0x610, PortWidth::Dword, u32::MAX));
        assert_eq!(bus.read(0x610, PortWidth::Dword), 1, "outside RAM");
        assert_eq!(bus.dma().stats().ignored_doorbells, 1);
        assert_eq!(bus.unknown_accesses(), 0);
        goes_on(bus.write(0x610, PortWidth::Byte, 3));
        assert_eq!(bus.read(0x610, PortWidth::Word), 0xffff);
        assert_eq!(bus.unknown_accesses(), 3);
    }

    #[test]
    fn unknown_ports_read_all_ones_and_are_counted_by_the_byte() {
        let bus = bus(std::io::sink());
        assert_eq!(bus.read(0x80, PortWidth::Byte), 0xff);
        assert_eq!(bus.read(0x80, PortWidth::Word), 0xffff);
        assert_eq!(bus.read(0xffff, PortWidth::Dword), u32::MAX);
        goes_on(bus.write(0x80, PortWidth::Dword, 0));
        assert_eq!(bus.unknown_accesses(), 11);
    }
}
