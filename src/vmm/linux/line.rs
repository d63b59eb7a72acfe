//! Interrupt lines: devices are made before the machine, which is what an interrupt goes to.

use std::io;
use std::sync::{Arc, OnceLock};

use vm_superio::Trigger;
use vmm_sys_util::eventfd::EventFd;

use crate::virtio::Interrupt;

/// A line to the interrupt controller; what is triggered before it is connected goes nowhere.
#[derive(Clone, Default)]
pub(super) struct Line(Arc<OnceLock<EventFd>>);

impl Line {
    /// Connects it, once, to an event that raises an edge.
    pub(super) fn connect(&self, event: EventFd) {
        // The machine connects each line once, before any vCPU runs.
        let _ = self.0.set(event);
    }

    fn raise(&self) -> io::Result<()> {
        self.0.get().map_or(Ok(()), |event| event.write(1))
    }
}

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> Result<(), Self::E> {
        self.raise()
    }
}

impl Interrupt for Line {
    fn trigger(&self) -> io::Result<()> {
        self.raise()
    }
}
