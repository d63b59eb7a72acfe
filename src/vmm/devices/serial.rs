//! The 16550 UART: `vm-superio`'s, polled, with an output that may fail.

use std::convert::Infallible;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_superio::serial::SerialEvents;
use vm_superio::serial::SerialState;
use vm_superio::{Serial, Trigger};

/// The UART has no interrupt line: guests have no interrupts.
struct NoInterrupt;

impl Trigger for NoInterrupt {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Self::E> {
        Ok(())
    }
}

/// Counts the bytes that the output did not take.
#[derive(Default)]
struct LostBytes(AtomicU64);

impl SerialEvents for LostBytes {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
    fn in_buffer_empty(&self) {}
}

/// A serial port that prints to a console.
pub(super) struct SerialPort {
    uart: Serial<NoInterrupt, Arc<LostBytes>, Box<dyn Write + Send>>,
    lost: Arc<LostBytes>,
}

impl SerialPort {
    pub(super) fn new(console: Box<dyn Write + Send>) -> Self {
        let lost = Arc::new(LostBytes::default());
        Self { uart: Serial::with_events(NoInterrupt, lost.clone(), console), lost }
    }

    /// Sets all registers to what another port has; the console stays.
    pub(super) fn set_state(&mut self, state: &SerialState) -> Result<(), String> {
        let meanwhile: Box<dyn Write + Send> = Box::new(std::io::sink());
        let meanwhile = Serial::with_events(NoInterrupt, self.lost.clone(), meanwhile);
        let console = std::mem::replace(&mut self.uart, meanwhile).into_writer();
        // No state that a port has ever been in is refused.
        self.uart = Serial::from_state(state, NoInterrupt, self.lost.clone(), console)
            .map_err(|error| error.to_string())?;
        Ok(())
    }

    pub(super) fn state(&self) -> SerialState {
        self.uart.state()
    }

    pub(super) fn read(&mut self, register: u8) -> u8 {
        self.uart.read(register)
    }

    /// A byte that the console does not take is lost, as on a line with nobody at the other end.
    pub(super) fn write(&mut self, register: u8, value: u8) {
        let _ = self.uart.write(register, value);
    }

    pub(super) fn lost_bytes(&self) -> u64 {
        self.lost.0.load(Ordering::Relaxed)
    }
}
