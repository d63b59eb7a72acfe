//! What the contract with the guest offers beside memory and processors, however its memory is paged:
//! control block, ports, DMA device, hypercalls' books.

use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;

use crate::host_mm::MemoryObject;
use crate::iotlb::Iotlb;
use crate::vmm::error::VmError;
use crate::vmm::run::outcome::Outcome;
use crate::vmm::run::threads::panic_message;

use super::config::IOTLB_ENTRIES;
use super::control_block::{ControlBlock, window_bytes};
use super::devices::PortBus;
use super::devices::dma::DmaDevice;
use super::observer::{Reports, VmObserver};

/// See the module's documentation.
pub(in crate::vmm) struct Services {
    pub(in crate::vmm) object: Arc<MemoryObject>,
    pub(in crate::vmm) control: ControlBlock,
    pub(in crate::vmm) bus: PortBus,
    /// The DMA device's way to memory.
    pub(in crate::vmm) iotlb: Arc<Iotlb>,
    pub(in crate::vmm) reports: Reports,
    pub(in crate::vmm) observer: Option<Arc<dyn VmObserver>>,
    /// How pages that the guest gives back are taken.
    pub(in crate::vmm) take_back: TakeBack,
    pub(in crate::vmm) window_bytes: u64,
    pub(in crate::vmm) vcpus: usize,
}

/// Takes pages that the guest has given back, by number of the first and count: they are zero when it
/// returns.
pub(in crate::vmm) type TakeBack =
    Box<dyn Fn(&MemoryObject, crate::addr::Gfn, u64) -> bool + Send + Sync>;

/// The way of host memory itself.
pub(in crate::vmm) fn free_pages() -> TakeBack {
    Box::new(|object, first, count| object.free_pages(first, count).is_ok())
}

impl Services {
    /// Those of a guest with this memory, behind whose ports there is `console`.
    ///
    /// # Errors
    /// What host memory refused: the device's way to it.
    pub(in crate::vmm) fn new(
        object: Arc<MemoryObject>,
        control: ControlBlock,
        console: Box<dyn Write + Send>,
        observer: Option<Arc<dyn VmObserver>>,
        take_back: TakeBack,
    ) -> Result<Arc<Self>, VmError> {
        let iotlb = Arc::new(Iotlb::new(object.clone(), IOTLB_ENTRIES)?);
        Ok(Arc::new(Self {
            bus: PortBus::new(console, Arc::new(DmaDevice::new(iotlb.clone()))),
            iotlb,
            reports: Reports::default(),
            observer,
            take_back,
            window_bytes: window_bytes(object.bytes()),
            vcpus: control.vcpus(),
            control,
            object,
        }))
    }

    pub(in crate::vmm) fn observe(&self, tell: impl FnOnce(&dyn VmObserver)) {
        if let Some(observer) = &self.observer {
            tell(observer.as_ref());
        }
    }

    /// Starts the DMA device's thread. A host that fails under it ends the VM as it does under a vCPU.
    pub(super) fn start_device(
        self: &Arc<Self>,
        end: impl Fn(Outcome) + Send + 'static,
    ) -> Result<JoinHandle<()>, VmError> {
        let services = self.clone();
        services.bus.dma().starting();
        let thread = std::thread::Builder::new().name("dma".to_owned());
        let spawned = thread.spawn(move || {
            match catch_unwind(AssertUnwindSafe(|| services.bus.dma().serve())) {
                Ok(Ok(())) => {}
                Ok(Err(error)) => end(Outcome::Failed(error.into())),
                Err(panic) => {
                    let message = panic_message(panic.as_ref());
                    end(Outcome::Failed(VmError::DevicePanicked { message }));
                }
            }
            services.bus.dma().over();
        });
        spawned.map_err(|source| {
            self.bus.dma().over();
            VmError::DeviceThread { source }
        })
    }
}
