//! The shadow MMU: the page tables that a guest really runs on.
//!
//! The guest's own page tables are only read. Each guest page that is touched gets a shadow PTE
//! (SPTE) that points to the host frame in which the page is at the moment, and that SPTE is in
//! the frame's reverse map. The shadow MMU is an export client: it drops SPTEs when the host side
//! says that it takes the frame away.
//!
//! What this layer guarantees:
//!
//! - outside the MMU lock, the reverse map lists exactly the present SPTEs that point to frames
//!   (invariant I3);
//! - an SPTE grants no more than the guest's tables did at some moment since that guest's last
//!   `invlpg` of the address or CR3 load (a virtual TLB: changes from not-present to present need
//!   nothing);
//! - an SPTE of a page whose guest PTE is clean is read-only, so the first write sets the guest's
//!   dirty bit;
//! - upper-level entries, once present, never change until [`ShadowMmu::recycle`] (a KVM that
//!   shadows our tables would not see it).
//!
//! Lock order: a page lock may be held when the MMU lock is taken, never the other way round.

mod check;
mod client;
mod config;
mod fault;
mod fault_around;
#[doc(hidden)]
pub mod hooks;
mod roots;
mod spte;
mod stats;
mod tables;
mod virtual_access;
mod walk;
mod window;
mod zap;

use std::sync::{Arc, Mutex, OnceLock};

use vm_memory::MmapRegion;

use crate::export_rmap::{ClientGuard, ClientId, ClientLock, Membership};
use crate::host_mm::{GuestView, HostMm, MemoryObject, MmError};
#[cfg(all(test, feature = "export-notifier"))]
use crate::sync::lock;

pub use config::{MachineLayout, ShadowConfig};
pub use fault::FaultOutcome;
pub use roots::{LoadRoot, Root};
pub use stats::ShadowStats;
pub use tables::TableMemory;
pub use virtual_access::GuestAccessError;
pub use walk::{Access, PagingContext};

use roots::State;
use stats::Counters;

/// A VM's shadow MMU. Dropping it forgets every mapping and unregisters from the notifier list;
/// no vCPU may run on its tables any more.
#[derive(Debug)]
pub struct ShadowMmu {
    mmu: Arc<Mmu>,
    // Last: every mapping is forgotten by then.
    membership: Membership,
}

/// What the notifier list and the VM share.
struct Mmu {
    config: ShadowConfig,
    mm: Arc<HostMm>,
    object: Arc<MemoryObject>,
    guest_view: GuestView,
    tables: TableMemory,
    /// The pinned window's memory as KVM has it.
    window: OnceLock<Arc<MmapRegion>>,
    /// The MMU lock.
    state: ClientLock<State>,
    /// Held while everything is forgotten.
    forgetting: Mutex<()>,
    /// Called whenever a batch has let go of the MMU lock.
    #[cfg(all(test, feature = "export-notifier"))]
    between_batches: Mutex<Option<Box<dyn FnMut() + Send>>>,
    client: ClientId,
    counters: Counters,
}

impl std::fmt::Debug for Mmu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mmu").field("config", &self.config).finish_non_exhaustive()
    }
}

impl ShadowMmu {
    /// A shadow MMU without mappings, registered as an export client of the object's host memory.
    ///
    /// # Errors
    /// [`MmError::Host`] if `tables` is smaller than the configuration says, or no client number
    /// is left.
    pub fn new(
        config: ShadowConfig,
        object: Arc<MemoryObject>,
        tables: TableMemory,
        guest_view: GuestView,
    ) -> Result<Self, MmError> {
        let mm = object.host_mm().clone();
        let state = ClientLock::new(State::new(tables.pages()));
        let reservation = mm.reserve_client()?;
        let mmu = Arc::new(Mmu {
            config,
            mm: mm.clone(),
            object,
            guest_view,
            tables,
            window: OnceLock::new(),
            state,
            forgetting: Mutex::new(()),
            #[cfg(all(test, feature = "export-notifier"))]
            between_batches: Mutex::new(None),
            client: reservation.id(),
            counters: Counters::default(),
        });
        let membership = mm.register_client(reservation, mmu.clone());
        Ok(Self { mmu, membership })
    }

    /// Gives the memory behind the pinned window: an exception frame, say, may go there, and what
    /// the guest unmaps of it is zapped in this mapping, which must be a shared one of a file so
    /// that the content stays. Only the first call counts; without it a guest cannot flush a
    /// translation of the window.
    pub fn set_window(&self, window: Arc<MmapRegion>) {
        let _ = self.mmu.window.set(window);
    }

    /// The guest's memory.
    #[must_use]
    pub fn object(&self) -> &Arc<MemoryObject> {
        &self.mmu.object
    }

    /// Its number among the export clients.
    #[must_use]
    pub fn client_id(&self) -> ClientId {
        self.membership.id()
    }

    /// The frames' mapping that the VM's memslot is made of.
    #[must_use]
    pub fn guest_view(&self) -> &GuestView {
        &self.mmu.guest_view
    }
}

impl Drop for ShadowMmu {
    fn drop(&mut self) {
        self.mmu.forget_everything();
    }
}

impl Mmu {
    /// Takes the MMU lock.
    fn lock(&self) -> ClientGuard<'_, State> {
        self.state.lock()
    }

    /// Lets those who wait for the lock have it between two batches.
    fn let_others_in<'a>(&'a self, locked: ClientGuard<'a, State>) -> ClientGuard<'a, State> {
        self.state.let_others_in(locked, || {
            #[cfg(all(test, feature = "export-notifier"))]
            {
                // Not while the hook's own mutex is held: it may come here itself.
                let hook = lock(&self.between_batches).take();
                if let Some(mut hook) = hook {
                    hook();
                    lock(&self.between_batches).get_or_insert(hook);
                }
            }
        })
    }
}

// Without the notifier no host ever takes a frame from a shadow MMU: there is little to test.
#[cfg(all(any(test, feature = "fuzzing"), feature = "export-notifier"))]
pub(crate) mod reference;
#[cfg(all(test, feature = "export-notifier"))]
mod tests;
