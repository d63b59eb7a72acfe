//! A copy of a running VM, which goes on from the same moment on its own.
//!
//! Guarantee: the clone's guest finds every register, its memory, the pinned window and the
//! devices as the source's guest left them at one moment at which none of the source's vCPUs ran,
//! but for the generation number in the control block, which tells the two apart; from then on
//! neither sees what the other does. The source goes on as if nothing had been.
//!
//! The moment: every vCPU of the source comes to the gate, where it is outside the guest with
//! nothing left to handle, and gives an account of its state (`run/roster/census.rs`). The DMA device
//! finishes what it was asked for, so that none of its work is neither here nor there. While they wait, the
//! pages are shared copy-on-write and what was touched of the window is copied. Nothing else is
//! done meanwhile: the clone's KVM VM and shadow MMU have been built before, from nothing. Its vCPUs
//! begin without a single mapping and fault in what they need, which is mostly still there, in
//! frames that both VMs then map.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::sys::memory::copy_touched;
use crate::vmm::contract::control_block::{ControlBlock, window_bytes};
use crate::vmm::contract::observer::VmObserver;
use crate::vmm::error::VmError;
use crate::vmm::kvm::device::KvmDevice;
use crate::vmm::kvm::pinned::map_shared;
use crate::vmm::run::brief_wait::BriefWait;

use super::assemble::Contents;
use super::vm::Vm;

/// The next clone's generation. 0 is for VMs that booted.
static NEXT_GENERATION: AtomicU64 = AtomicU64::new(1);

/// When a clone came to be, and from how much.
#[derive(Clone, Copy)]
pub(super) struct Birth {
    /// When the source was asked to pause.
    begun: Instant,
    paused: Duration,
    shared_pages: u64,
}

/// What a clone took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CloneFigures {
    /// How long the source's vCPUs were kept from running.
    pub paused: Duration,
    /// From the request to pause the source to when the first vCPU of the clone was about to enter
    /// its guest; `None` if none has yet.
    pub to_first_entry: Option<Duration>,
    /// Pages that were the clone's without a copy.
    pub shared_pages: u64,
}

impl Vm {
    /// A clone that runs already. Its memory comes from the same host memory, its serial port
    /// prints to `console`, and `observer` is told of what its guest says.
    ///
    /// Vcpus that wait to be started wait in the clone, too; x87 and SSE registers that a halted
    /// one left are not copied.
    ///
    /// # Errors
    /// [`VmError::NotRunning`] if the VM is over or none of its vCPUs runs; [`VmError::NotInTime`] if
    /// one of them, or the DMA device, waits for something that does not come; otherwise what the host
    /// refused. The VM itself goes on in any case.
    pub fn clone_running(
        &self,
        observer: Option<Arc<dyn VmObserver>>,
        console: Box<dyn Write + Send>,
    ) -> Result<Self, VmError> {
        let shape = self.shape;
        let device = KvmDevice::open()?;
        let window = map_shared("pinned window", window_bytes(shape.memory_bytes))?;
        let contents = Contents {
            object: self.object.host_mm().create_object(shape.memory_bytes)?,
            control: ControlBlock::unfilled(window.clone(), shape.vcpus),
            window,
            console,
            observer,
            starts: Vec::new(),
        };
        let mut clone = Self::assemble(shape, &device, contents)?;
        self.copy_moment_to(&mut clone)?;
        clone.start()?;
        Ok(clone)
    }

    /// Fills a VM that was just made with what this one is at one moment.
    fn copy_moment_to(&self, clone: &mut Self) -> Result<(), VmError> {
        let begun = Instant::now();
        let mut brief = BriefWait::begin();
        let mut census = self.shared.roster.census(&self.shared.gate, &mut brief)?;
        clone.starts = census.take()?;
        if clone.starts.iter().all(Option::is_none) {
            return Err(VmError::NotRunning);
        }
        self.shared.services.bus.dma().wait_until_idle(&mut brief)?;
        self.object.copy_on_write_into(&clone.object)?;
        let uncopied = |what, reason| VmError::Copy { what, reason };
        copy_touched(&self.window, &clone.window)
            .map_err(|error| uncopied("pinned window", error.to_string()))?;
        let serial = self.shared.services.bus.serial_state();
        drop(census);
        let paused = begun.elapsed();
        clone
            .shared
            .services
            .bus
            .set_serial_state(&serial)
            .map_err(|why| uncopied("serial port", why))?;
        let generation = NEXT_GENERATION.fetch_add(1, Ordering::Relaxed);
        clone.shared.services.control.begin_generation(generation);
        clone.birth = Some(Birth { begun, paused, shared_pages: clone.object.shared_pages() });
        Ok(())
    }

    /// What it took to clone this VM; `None` for one that booted.
    #[must_use]
    pub fn clone_figures(&self) -> Option<CloneFigures> {
        let Birth { begun, paused, shared_pages } = self.birth?;
        let first_entry = self.shared.first_entry.get();
        let to_first_entry = first_entry.map(|entry| entry.saturating_duration_since(begun));
        Some(CloneFigures { paused, to_first_entry, shared_pages })
    }
}
