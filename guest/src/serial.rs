//! The serial console: whole lines, never mixed between vCPUs.

use core::fmt::{self, Write};
use core::hint::spin_loop;
use core::sync::atomic::{AtomicBool, Ordering};

use crate::x86::{in8, out8};
use gnomon_abi::PORT_SERIAL;

const LINE_STATUS: u16 = PORT_SERIAL + 5;
const THR_EMPTY: u8 = 1 << 5;
/// What a 16550 takes once its transmit FIFO is empty.
const FIFO_BYTES: usize = 16;

static LOCKED: AtomicBool = AtomicBool::new(false);

struct Port {
    room: usize,
}

impl Port {
    fn byte(&mut self, byte: u8) {
        if self.room == 0 {
            while in8(LINE_STATUS) & THR_EMPTY == 0 {
                spin_loop();
            }
            self.room = FIFO_BYTES;
        }
        out8(PORT_SERIAL, byte);
        self.room -= 1;
    }
}

impl Write for Port {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if byte == b'\n' {
                self.byte(b'\r');
            }
            self.byte(byte);
        }
        Ok(())
    }
}

/// Turns the transmit FIFO on.
pub fn init() {
    out8(PORT_SERIAL + 2, 0x07);
}

/// Writes one line.
pub fn line(arguments: fmt::Arguments<'_>) {
    while LOCKED.compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed).is_err() {
        spin_loop();
    }
    let mut port = Port { room: 0 };
    // `Port` itself never fails; a formatting error only cuts the line short.
    let _ = port.write_fmt(arguments);
    let _ = port.write_str("\n");
    LOCKED.store(false, Ordering::Release); // pairs with the Acquire above
}

/// Gives the console to a vCPU that is about to end the VM, even if a line is under way.
pub fn force_unlock() {
    LOCKED.store(false, Ordering::Release);
}

/// Prints one line on the console.
#[macro_export]
macro_rules! println {
    ($($argument:tt)*) => {
        $crate::serial::line(format_args!($($argument)*))
    };
}
