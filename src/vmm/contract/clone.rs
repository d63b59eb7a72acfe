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
//! done meanwhile: the clone has been built before, from nothing ([`Contract::empty_clone`]). Its vCPUs
//! begin without a single mapping and fault in what they need, which is mostly still there, in
//! frames that both VMs then map.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::sys::memory::copy_touched;
use crate::vmm::error::VmError;
use crate::vmm::run::brief_wait::BriefWait;

use super::observer::VmObserver;
use super::vm::{Contract, ContractVm};

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

impl Birth {
    /// With the moment at which the first vCPU of the clone was about to enter its guest.
    pub(super) fn figures(self, first_entry: Option<Instant>) -> CloneFigures {
        let Self { begun, paused, shared_pages } = self;
        let to_first_entry = first_entry.map(|entry| entry.saturating_duration_since(begun));
        CloneFigures { paused, to_first_entry, shared_pages }
    }
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

/// [`ContractVm::clone_running`].
pub(super) fn clone_running<P: Contract>(
    source: &ContractVm<P>,
    observer: Option<Arc<dyn VmObserver>>,
    console: Box<dyn Write + Send>,
) -> Result<ContractVm<P>, VmError> {
    let mut clone = P::empty_clone(source, observer, console)?;
    copy_moment(source, &mut clone)?;
    clone.start()?;
    Ok(clone)
}

/// Fills a VM that was just made with what `source` is at one moment.
fn copy_moment<P: Contract>(
    source: &ContractVm<P>,
    clone: &mut ContractVm<P>,
) -> Result<(), VmError> {
    let begun = Instant::now();
    let mut brief = BriefWait::begin();
    let mut census = source.machine().census(&mut brief)?;
    let starts = census.take()?;
    if starts.iter().all(Option::is_none) {
        return Err(VmError::NotRunning);
    }
    clone.machine_mut().begin_by(starts);
    source.services().bus.dma().wait_until_idle(&mut brief)?;
    source.object().copy_on_write_into(clone.object())?;
    let uncopied = |what, source| VmError::Copy { what, source };
    copy_touched(source.services().control.window(), clone.services().control.window())
        .map_err(|error| uncopied("pinned window", error))?;
    let serial = source.services().bus.serial_state();
    drop(census);
    let paused = begun.elapsed();
    let services = clone.services();
    services
        .bus
        .set_serial_state(&serial)
        .map_err(|why| uncopied("serial port", std::io::Error::other(why)))?;
    let generation = NEXT_GENERATION.fetch_add(1, Ordering::Relaxed);
    services.control.begin_generation(generation);
    let shared_pages = clone.object().shared_pages();
    clone.birth = Some(Birth { begun, paused, shared_pages });
    Ok(())
}
