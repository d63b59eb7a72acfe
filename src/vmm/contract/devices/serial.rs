//! The 16550 UART: `vm-superio`'s, with an output that may fail.

use std::convert::Infallible;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_superio::serial::SerialEvents;
use vm_superio::serial::SerialState;
use vm_superio::{Serial, Trigger};

/// Guests that keep to the guest ABI have no interrupts: their UART is polled.
pub(in crate::vmm) struct NoInterrupt;

impl Trigger for NoInterrupt {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Self::E> {
        Ok(())
    }
}

/// Who is told when the guest has read all input.
type OnEmptied = Box<dyn Fn() + Send + Sync>;

/// Counts the bytes that the output did not take, and passes on that there is room for input.
#[derive(Default)]
struct Events {
    lost: AtomicU64,
    on_emptied: Option<OnEmptied>,
}

impl SerialEvents for Events {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {
        self.lost.fetch_add(1, Ordering::Relaxed);
    }
    fn in_buffer_empty(&self) {
        if let Some(on_emptied) = &self.on_emptied {
            on_emptied();
        }
    }
}

/// A serial port that prints to a console.
pub(in crate::vmm) struct SerialPort<T: Trigger = NoInterrupt> {
    uart: Serial<T, Arc<Events>, Box<dyn Write + Send>>,
    events: Arc<Events>,
}

impl SerialPort {
    pub(super) fn new(console: Box<dyn Write + Send>) -> Self {
        Self::on_events(console, NoInterrupt, Events::default())
    }

    /// Sets all registers to what another port has; the console stays.
    pub(super) fn set_state(&mut self, state: &SerialState) -> Result<(), String> {
        let meanwhile: Box<dyn Write + Send> = Box::new(std::io::sink());
        let meanwhile = Serial::with_events(NoInterrupt, self.events.clone(), meanwhile);
        let console = std::mem::replace(&mut self.uart, meanwhile).into_writer();
        // No state that a port has ever been in is refused.
        self.uart = Serial::from_state(state, NoInterrupt, self.events.clone(), console)
            .map_err(|error| error.to_string())?;
        Ok(())
    }

    pub(super) fn state(&self) -> SerialState {
        self.uart.state()
    }
}

impl<T: Trigger> SerialPort<T> {
    /// One with an interrupt line and input; `on_emptied` is called when the guest has read all of
    /// that, with whatever lock the port is behind held.
    pub(in crate::vmm) fn with_input(
        console: Box<dyn Write + Send>,
        interrupt: T,
        on_emptied: impl Fn() + Send + Sync + 'static,
    ) -> Self {
        let events = Events { on_emptied: Some(Box::new(on_emptied)), ..Events::default() };
        Self::on_events(console, interrupt, events)
    }

    fn on_events(console: Box<dyn Write + Send>, interrupt: T, events: Events) -> Self {
        let events = Arc::new(events);
        Self { uart: Serial::with_events(interrupt, events.clone(), console), events }
    }

    pub(in crate::vmm) fn read(&mut self, register: u8) -> u8 {
        self.uart.read(register)
    }

    /// A byte that the console does not take is lost, as on a line with nobody at the other end.
    pub(in crate::vmm) fn write(&mut self, register: u8, value: u8) {
        let _ = self.uart.write(register, value);
    }

    /// Lets the guest read these bytes; returns how many there was room for.
    pub(in crate::vmm) fn enqueue(&mut self, bytes: &[u8]) -> usize {
        let room = self.uart.fifo_capacity().min(bytes.len());
        if room == 0 {
            return 0;
        }
        match self.uart.enqueue_raw_bytes(&bytes[..room]) {
            Ok(taken) => taken,
            // They are in the queue; the interrupt was refused, and the next one tells of them.
            Err(vm_superio::serial::Error::Trigger(_)) => room,
            Err(_) => 0,
        }
    }

    pub(in crate::vmm) fn lost_bytes(&self) -> u64 {
        self.events.lost.load(Ordering::Relaxed)
    }
}
