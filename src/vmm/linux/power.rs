//! Power-off and reset: ACPI's fixed registers, the keyboard controller's reset line, and the reset
//! control register of PCI chipsets.
//!
//! Source: ACPI 6.5, 4.8.3 (PM1 events and control); Intel ICH9 datasheet, 13.7.5 (RST_CNT). No event ever happens: there is no button.

use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};

/// PM1a status, then enable: two bytes each.
pub(super) const EVENT_PORT: u16 = 0xb000;
/// Bytes of both.
pub(super) const EVENT_BYTES: u8 = 4;
/// PM1a control.
pub(super) const CONTROL_PORT: u16 = 0xb004;
/// Its bytes.
pub(super) const CONTROL_BYTES: u8 = 2;
/// The keyboard controller's command port, and ACPI's reset register.
pub(super) const RESET_PORT: u16 = 0x64;
/// What resets the machine there: pulse the processor's reset line.
pub(super) const RESET_VALUE: u8 = 0xfe;
/// The reset control register.
pub(super) const RESET_CONTROL_PORT: u16 = 0xcf9;
/// RST_CPU: what resets the machine there.
const RESET_CONTROL_CPU: u8 = 1 << 2;
/// `mov al, 0xfe; out 0x64, al; jmp $`: a firmware that knows nothing but to reset the machine, in real
/// mode.
pub(super) const FIRMWARE_RESET: [u8; 6] =
    [0xb0, RESET_VALUE, 0xe6, RESET_PORT.to_le_bytes()[0], 0xeb, 0xfe];
/// `SLP_TYP` of `\_S5`: off.
pub(super) const SLEEP_TYPE_OFF: u8 = 5;

/// PM1 control: SCI_EN. ACPI mode is always on.
const SCI_ENABLED: u16 = 1;
/// PM1 control: `SLP_TYP` begins at this bit.
const SLEEP_TYPE_SHIFT: u16 = 10;
const SLEEP_TYPE_MASK: u16 = 7;
/// PM1 control: SLP_EN.
const SLEEP_ENABLE: u16 = 1 << 13;
/// Status of a keyboard controller that is not there (nothing but "input buffer full" is clear): a
/// driver that looks for one finds none, and one that resets the machine does not wait.
const NO_CONTROLLER: u8 = 0xfd;

/// What a write asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// Nothing.
    None,
    /// End the machine.
    PowerOff,
    /// Begin again.
    Reset,
}

/// The registers.
#[derive(Debug, Default)]
pub(super) struct Power {
    enabled_events: AtomicU16,
    control: AtomicU16,
    reset_control: AtomicU8,
}

impl Power {
    /// The byte at `port`, if it is one of these registers.
    pub(super) fn read(&self, port: u16) -> Option<u8> {
        // Relaxed: each register stands for itself.
        let control = || self.control.load(Ordering::Relaxed) & !SLEEP_ENABLE | SCI_ENABLED;
        let word = match port {
            RESET_PORT => return Some(NO_CONTROLLER),
            EVENT_PORT..CONTROL_PORT if port < EVENT_PORT + 2 => 0,
            EVENT_PORT..CONTROL_PORT => self.enabled_events.load(Ordering::Relaxed),
            CONTROL_PORT | 0xb005 => control(),
            _ => return None,
        };
        Some(word.to_le_bytes()[usize::from(port & 1)])
    }

    /// The reset control register: its bits stay until it resets.
    pub(super) fn reset_control(&self) -> u8 {
        self.reset_control.load(Ordering::Relaxed)
    }

    /// A write of `data` to `port`; `None` if it is none of these registers.
    pub(super) fn write(&self, port: u16, data: &[u8]) -> Option<Request> {
        match (port, data) {
            (RESET_PORT, &[value]) => {
                Some(if value == RESET_VALUE { Request::Reset } else { Request::None })
            }
            (RESET_CONTROL_PORT, &[value]) => {
                self.reset_control.store(value & !RESET_CONTROL_CPU, Ordering::Relaxed);
                let resets = value & RESET_CONTROL_CPU != 0;
                Some(if resets { Request::Reset } else { Request::None })
            }
            (CONTROL_PORT, &[low, high]) => {
                let value = u16::from_le_bytes([low, high]);
                self.control.store(value, Ordering::Relaxed);
                let kind = value >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK;
                let is_off = value & SLEEP_ENABLE != 0 && kind == u16::from(SLEEP_TYPE_OFF);
                Some(if is_off { Request::PowerOff } else { Request::None })
            }
            (0xb002, &[low, high]) => {
                self.enabled_events.store(u16::from_le_bytes([low, high]), Ordering::Relaxed);
                Some(Request::None)
            }
            // The status, of which nothing is ever set; other widths are nobody's.
            (EVENT_PORT..=0xb005 | RESET_PORT, _) => Some(Request::None),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(power: &Power, port: u16) -> u16 {
        u16::from_le_bytes([power.read(port).unwrap(), power.read(port + 1).unwrap()])
    }

    #[test]
    fn sleep_type_5_with_the_enable_bit_is_off_and_nothing_else_is() {
        let power = Power::default();
        let written = |value: u16| power.write(0xb004, &value.to_le_bytes()).unwrap();
        assert_eq!(written(5 << 10 | 1 << 13 | 1), Request::PowerOff);
        assert_eq!(written(5 << 10), Request::None);
        for kind in [0, 1, 2, 3, 4, 6, 7] {
            assert_eq!(written(kind << 10 | 1 << 13), Request::None, "S{kind}");
        }
        assert_eq!(word(&power, 0xb004), 7 << 10 | 1, "SCI_EN is set, SLP_EN reads 0");
    }

    #[test]
    fn the_reset_command_resets_and_others_do_not() {
        let power = Power::default();
        assert_eq!(power.write(0x64, &[0xfe]), Some(Request::Reset));
        assert_eq!(power.write(0x64, &[0xaa]), Some(Request::None));
        assert_eq!(power.write(0x64, &[0xfe, 0xfe]), Some(Request::None));
        let status = power.read(0x64).unwrap();
        assert_eq!(status & 2, 0, "a driver that wants to write does not wait");
        assert_eq!(status & 1, 1, "one that probes finds data without end, so no controller");
    }

    /// As Linux does it (`reboot=p`).
    #[test]
    fn the_reset_control_register_resets_by_its_third_bit() {
        let power = Power::default();
        assert_eq!(power.reset_control(), 0);
        assert_eq!(power.write(0xcf9, &[2]), Some(Request::None));
        assert_eq!(power.reset_control(), 2);
        assert_eq!(power.write(0xcf9, &[6]), Some(Request::Reset));
        // PCI's configuration, of which the register is a part, is not there.
        assert_eq!((power.write(0xcf8, &[6, 6, 6, 6]), power.read(0xcf8)), (None, None));
    }

    #[test]
    fn enabled_events_stick_and_no_event_happens() {
        let power = Power::default();
        power.write(0xb002, &0x20u16.to_le_bytes()).unwrap();
        assert_eq!((word(&power, 0xb002), word(&power, 0xb000)), (0x20, 0));
        assert_eq!((power.read(0xb006), power.write(0xb006, &[0])), (None, None));
        assert_eq!((power.read(0x60), power.write(0x63, &[0xfe])), (None, None));
    }
}
