//! What a Linux guest's ports and device addresses lead to.
//!
//! | where | what |
//! |---|---|
//! | ports 0x3f8 to 0x3ff | serial port, interrupt 4 |
//! | ports 0x64, 0xcf9 | reset; there is no keyboard, nor PCI |
//! | ports 0x70, 0x71 | CMOS: reads as 0, for whoever waits until its update is over |
//! | ports 0xb000 to 0xb005 | ACPI events and power-off |
//! | from 0xd000_0000 on | virtio devices |
//!
//! Interrupt controllers, local APICs and the interval timer are in the kernel. Everything else reads
//! as all ones, PCI's configuration among it, which says that there is none; writes go nowhere.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::addr::Gpa;
use crate::sync::{Mutex, lock};
use crate::virtio::MmioTransport;
use crate::vmm::contract::devices::serial::SerialPort;
use crate::vmm::run::bus::{Action, Bus};
use crate::vmm::run::outcome::Outcome;

use super::input_room::Room;
use super::layout::{VIRTIO_BASE, VIRTIO_STRIDE};
use super::line::Line;
use super::power::{Power, RESET_CONTROL_PORT, Request};

const SERIAL: u16 = 0x3f8;
const SERIAL_LAST: u16 = 0x3ff;
const CMOS: u16 = 0x70;
const CMOS_LAST: u16 = 0x71;

/// The devices outside the kernel.
pub(super) struct Board {
    serial: Mutex<SerialPort<Line>>,
    room: Arc<Room>,
    power: Power,
    devices: Vec<MmioTransport>,
    unknown: AtomicU64,
}

impl Board {
    /// Devices in the order of their addresses.
    pub(super) fn new(
        console: Box<dyn Write + Send>,
        serial_line: Line,
        devices: Vec<MmioTransport>,
    ) -> Self {
        let room = Arc::<Room>::default();
        let emptied = room.clone();
        let serial = SerialPort::with_input(console, serial_line, move || emptied.made());
        Self {
            serial: Mutex::new(serial),
            room,
            power: Power::default(),
            devices,
            unknown: AtomicU64::new(0),
        }
    }

    /// Has the guest read `bytes` from its serial port, and waits until it has room for all of them;
    /// false if the machine is over first.
    pub(super) fn send(&self, bytes: &[u8]) -> bool {
        let mut rest = bytes;
        while let Some(generation) = self.room.generation() {
            let taken = lock(&self.serial).enqueue(rest);
            rest = &rest[taken..];
            if rest.is_empty() {
                return true;
            }
            self.room.wait(generation);
        }
        false
    }

    pub(super) fn devices(&self) -> &[MmioTransport] {
        &self.devices
    }

    pub(super) fn lost_console_bytes(&self) -> u64 {
        lock(&self.serial).lost_bytes()
    }

    /// Accesses to ports and addresses at which there is nothing.
    pub(super) fn unknown_accesses(&self) -> u64 {
        self.unknown.load(Ordering::Relaxed)
    }

    /// The device at an address, and how far behind its first register.
    fn device(&self, gpa: Gpa) -> Option<(&MmioTransport, u64)> {
        let offset = gpa.as_u64().checked_sub(VIRTIO_BASE)?;
        let index = usize::try_from(offset / VIRTIO_STRIDE).ok()?;
        Some((self.devices.get(index)?, offset % VIRTIO_STRIDE))
    }

    fn nothing_there(&self) {
        self.unknown.fetch_add(1, Ordering::Relaxed);
    }
}

impl Bus for Board {
    fn port_in(&self, _vcpu: usize, port: u16, data: &mut [u8]) -> Action {
        data.fill(0xff);
        match (port, &mut *data) {
            (SERIAL..=SERIAL_LAST, [byte]) => {
                let register = u8::try_from(port - SERIAL).unwrap_or(0);
                *byte = lock(&self.serial).read(register);
            }
            (CMOS..=CMOS_LAST, _) => data.fill(0),
            // No wider: PCI's configuration address has the same place.
            (RESET_CONTROL_PORT, [byte]) => *byte = self.power.reset_control(),
            _ => {
                for (at, byte) in (0..).zip(data) {
                    match self.power.read(port.wrapping_add(at)) {
                        Some(value) => *byte = value,
                        None => self.nothing_there(),
                    }
                }
            }
        }
        Action::Continue
    }

    fn port_out(&self, _vcpu: usize, port: u16, data: &[u8]) -> Action {
        match (port, data) {
            (SERIAL..=SERIAL_LAST, &[byte]) => {
                let register = u8::try_from(port - SERIAL).unwrap_or(0);
                lock(&self.serial).write(register, byte);
            }
            (CMOS..=CMOS_LAST, _) => {}
            _ => match self.power.write(port, data) {
                Some(Request::PowerOff) => return Action::End(Outcome::PoweredOff),
                Some(Request::Reset) => return Action::End(Outcome::Rebooted),
                Some(Request::None) => {}
                None => self.nothing_there(),
            },
        }
        Action::Continue
    }

    fn mmio_read(&self, _vcpu: usize, gpa: Gpa, data: &mut [u8]) -> Action {
        if let Some((device, offset)) = self.device(gpa) {
            device.read(offset, data);
        } else {
            data.fill(0xff);
            self.nothing_there();
        }
        Action::Continue
    }

    fn mmio_write(&self, _vcpu: usize, gpa: Gpa, data: &[u8]) -> Action {
        match self.device(gpa) {
            Some((device, offset)) => device.write(offset, data),
            None => self.nothing_there(),
        }
        Action::Continue
    }

    fn over(&self) {
        self.room.over();
    }
}

#[cfg(test)]
#[path = "board_tests.rs"]
mod tests;
