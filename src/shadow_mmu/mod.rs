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
mod roots;
mod spte;
mod stats;
mod tables;
mod virtual_access;
mod walk;
mod zap;

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use vm_memory::MmapRegion;

use crate::export_rmap::lock_rank::{self, Held, Rank};
use crate::export_rmap::{ClientId, Registration};
use crate::host_mm::{GuestView, HostMm, MemoryObject, MmError};
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
    registration: Option<Registration>,
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
    /// The MMU lock; taken by [`Mmu::lock`] alone.
    state: Mutex<State>,
    /// Held by the one who gets the MMU lock next, while it is somebody else's.
    turn: Mutex<()>,
    /// Held while everything is forgotten.
    forgetting: Mutex<()>,
    /// Called whenever a batch has let go of the MMU lock.
    #[cfg(all(test, feature = "export-notifier"))]
    between_batches: Mutex<Option<Box<dyn FnMut() + Send>>>,
    client: OnceLock<ClientId>,
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
        let state = Mutex::new(State::new(tables.pages()));
        let mmu = Arc::new(Mmu {
            config,
            mm: mm.clone(),
            object,
            guest_view,
            tables,
            window: OnceLock::new(),
            state,
            turn: Mutex::new(()),
            forgetting: Mutex::new(()),
            #[cfg(all(test, feature = "export-notifier"))]
            between_batches: Mutex::new(None),
            client: OnceLock::new(),
            counters: Counters::default(),
        });
        let registration = mm.register_client(mmu.clone()).map_err(|error| {
            let source = std::io::Error::other(error);
            MmError::Host { what: "an export client", source }
        })?;
        // Nothing is exported before this, so no call needs the number earlier.
        let _ = mmu.client.set(registration.id());
        Ok(Self { mmu, registration: Some(registration) })
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
    pub fn client_id(&self) -> Option<ClientId> {
        self.mmu.client.get().copied()
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
        if let Some(registration) = self.registration.take() {
            self.mmu.mm.notifiers().unregister(registration);
        }
    }
}

impl Mmu {
    /// Takes the MMU lock, in its place of the lock order: a page lock may be held, this lock and
    /// rmap entries not.
    fn lock(&self) -> LockedState<'_> {
        let held = lock_rank::wait_for(Rank::ClientMmu);
        match self.state.try_lock() {
            Ok(state) => LockedState { state, _held: held },
            Err(_) => self.lock_in_turn(held),
        }
    }

    /// Waits for the lock in front of all who come later.
    fn lock_in_turn(&self, held: Held) -> LockedState<'_> {
        let _next = lock(&self.turn);
        LockedState { state: lock(&self.state), _held: held }
    }

    /// Lets go of the lock between two batches, and takes it again: not before somebody who waits for
    /// it has had it. A mutex alone would let the one through who has just let go.
    fn let_others_in<'a>(&'a self, locked: LockedState<'a>) -> LockedState<'a> {
        drop(locked);
        #[cfg(all(test, feature = "export-notifier"))]
        {
            // Not while the hook's own mutex is held: it may come here itself.
            let hook = lock(&self.between_batches).take();
            if let Some(mut hook) = hook {
                hook();
                lock(&self.between_batches).get_or_insert(hook);
            }
        }
        self.lock_in_turn(lock_rank::wait_for(Rank::ClientMmu))
    }
}

/// What the MMU lock protects, while it is held.
struct LockedState<'a> {
    // First: fields drop in order, and the rank is held as long as the lock is.
    state: MutexGuard<'a, State>,
    _held: Held,
}

impl Deref for LockedState<'_> {
    type Target = State;

    fn deref(&self) -> &State {
        &self.state
    }
}

impl DerefMut for LockedState<'_> {
    fn deref_mut(&mut self) -> &mut State {
        &mut self.state
    }
}

// Without the notifier no host ever takes a frame from a shadow MMU: there is little to test.
#[cfg(all(any(test, feature = "fuzzing"), feature = "export-notifier"))]
pub(crate) mod reference;
#[cfg(all(test, feature = "export-notifier"))]
mod tests;
