//! Direct paging: the guest's memory is a window over the frames' memfd, at the addresses that KVM
//! (or whoever else touches it) uses, and its page tables are the kernel's. The second way to install
//! and zap guest mappings, beside the shadow MMU, and an export client like it.
//!
//! What this layer guarantees, on host memory of [`Placement::Identity`]:
//!
//! - the window's page tables map a page only while the reverse map lists it, or, read-only, while
//!   the page is in its frame: a page that is evicted stays readable until its frame is punched;
//! - a page that can be written counts as written: its dirty state is the right to write, and goes
//!   with it;
//! - whoever touches the window after somebody removed a range of it (`MADV_REMOVE`) finds zeros
//!   there, wherever the pages were;
//! - what cannot be resolved is told to the owner in a sentence; nothing in here waits for ever.
//!
//! | step of the protocol | shadow paging | here |
//! |---|---|---|
//! | install | an SPTE | `UFFDIO_CONTINUE`, of neighbours too |
//! | take the right to write | clear a bit, zap the frame | `UFFDIO_WRITEPROTECT` |
//! | take the mapping | clear the SPTE, zap the frame | write-protect; `PUNCH_HOLE` after the page was written out |
//! | accessed | a bit of the SPTE | the page's mapping is taken away, and it faults again |
//! | dirty | a bit of the SPTE | it could be written |
//!
//! # Why there is no deadlock
//!
//! The kernel lets a thread that removes a part of the window (`MADV_DONTNEED`, `MADV_REMOVE`) go on
//! only once the event was read. Whoever reads events must therefore never wait for somebody who
//! may be in the middle of that.
//!
//! - **Evicting and cleaning remove nothing.** They write-protect, which raises no event, and the end
//!   of the mapping is the punch, which raises none either. Both happen with page locks held.
//! - **Ageing** is the only `MADV_DONTNEED` (`zap.rs`). It is done by reclaim, with page locks held.
//! - **Events are read by one thread for each part of the window, and it never waits** (`reader.rs`):
//!   it takes page locks only if they are free, frames only if there are any, and the MMU lock, whose
//!   holders wait for nothing. A fault for which that is not enough is another thread's (`worker.rs`),
//!   which may wait for page locks, reclaim for itself, and age: the reader goes on meanwhile.
//! - A change that the kernel refuses since an event is unread (`EAGAIN`) is tried again by those who
//!   are not the reader, and set aside by the reader until it has read the event.
//!
//! # Why no fault outlives a removal
//!
//! A fault may be read before the removal that came first, since the kernel hands out faults first;
//! and between reading an event and noting it, the remover is already on its way. So events are read
//! with the MMU lock held, and no mapping is installed without it: an install comes either before the
//! removal began (which then takes the mapping away), or while its event is unread (`EAGAIN`), or
//! after it was noted. Faults on a range whose removal is noted and not yet done queue up behind it.
//! The kernel does not say when the remover has punched the range; a frame found without memory after
//! that holds a page of zeros ([`HostMm::expect_holes`]).
//!
//! Lock order: a page lock may be held when the MMU lock is taken, never the other way round. There
//! is one MMU lock for each part of the window, and nobody takes two.
//!
//! [`Placement::Identity`]: crate::host_mm::Placement::Identity

mod ahead;
mod check;
mod client;
mod error;
mod events;
mod install;
mod reader;
mod resolve;
mod shard;
mod stats;
mod table;
mod turn;
mod worker;
mod zap;

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::addr::{Gfn, PAGE_SIZE, PAGE_SIZE_U64};
use crate::export_rmap::{ClientId, Membership};
use crate::host_mm::{GuestView, HostMm, MemoryObject, MmError};
use crate::sync::lock;
use crate::sys::memory;
use crate::sys::uffd::Features;

pub use error::DirectError;
pub use stats::DirectStats;

use shard::Shard;
use stats::Counters;
use table::Table;

/// How direct paging is done.
#[derive(Clone, Copy, Debug)]
pub struct DirectConfig {
    /// Parts of the window, each with a userfaultfd and threads of its own; at least 1.
    pub shards: usize,
    /// Most pages that one fault maps: itself and those after it that are in frames; at least 1, and
    /// then nothing is read ahead.
    pub fault_around: usize,
    /// How long a thread that reads faults looks for the next one before it sleeps, as long as faults
    /// come that fast. A sleeping thread is woken in about the time that a fault takes.
    pub spin: Duration,
    /// Features of userfaultfd that may be used if the kernel has them.
    pub features: Features,
}

impl Default for DirectConfig {
    fn default() -> Self {
        Self {
            shards: 1,
            fault_around: 8,
            spin: Duration::from_micros(50),
            features: Features::all(),
        }
    }
}

/// What is told of what could not be resolved.
type OnFailure = Box<dyn Fn(DirectError) + Send + Sync>;

/// Pages a guest's memory in a window. Dropping it ends the paging: whoever waits for a page goes on
/// with what the memfd holds, so nobody may use the window any more.
#[derive(Debug)]
pub struct DirectMmu {
    mmu: Arc<Mmu>,
    readers: Vec<JoinHandle<()>>,
    workers: Vec<JoinHandle<()>>,
    // Last: every mapping is forgotten by then.
    membership: Membership,
}

/// What the threads and the notifier list share.
struct Mmu {
    config: DirectConfig,
    mm: Arc<HostMm>,
    object: Arc<MemoryObject>,
    view: GuestView,
    table: Table,
    shards: Vec<Shard>,
    pages_per_shard: u64,
    client: ClientId,
    counters: Counters,
    /// No zap may begin any more: soon nobody reads its event.
    ending: AtomicBool,
    /// The window, or a part of it, is not ours any more: what is mapped there is in no books.
    let_go: AtomicBool,
    failure: Mutex<Option<String>>,
    /// What the kernel maps, for checks; `None` if it does not tell.
    pagemap: OnceLock<Option<std::fs::File>>,
    on_failure: OnFailure,
    /// What overtakes the next fault between its look at the page and its install.
    #[cfg(test)]
    overtaking: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl std::fmt::Debug for Mmu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mmu").field("config", &self.config).finish_non_exhaustive()
    }
}

impl DirectMmu {
    /// Pages the object's memory in `view`, whose pages nobody has touched yet. `on_failure` is called
    /// by a thread in here, for each fault that cannot be resolved and for whatever else ends the
    /// guest; it must not wait for the guest, nor ask for statistics, nor drop this.
    ///
    /// # Errors
    /// [`MmError::Uffd`] if faults cannot be handled here; [`MmError::Host`] for memory that is not of
    /// [`Placement::Identity`](crate::host_mm::Placement::Identity), without a thread, or without a
    /// client number.
    pub fn new(
        config: DirectConfig,
        object: Arc<MemoryObject>,
        view: GuestView,
        on_failure: impl Fn(DirectError) + Send + Sync + 'static,
    ) -> Result<Self, MmError> {
        let mm = object.host_mm().clone();
        let refused = |why: &str| MmError::Host {
            what: "direct paging",
            source: std::io::Error::other(why.to_owned()),
        };
        if !matches!(mm.config().placement, crate::host_mm::Placement::Identity { .. }) {
            return Err(refused("it needs host memory of placement `identity`"));
        }
        if cfg!(not(feature = "export-notifier")) {
            return Err(refused("it needs the feature `export-notifier`"));
        }
        let pages = view.region().size() / PAGE_SIZE;
        let pages_per_shard = pages.div_ceil(config.shards.max(1)).max(1);
        let shards = (0..pages)
            .step_by(pages_per_shard)
            .map(|first| {
                let end = (first + pages_per_shard).min(pages);
                Shard::open(&view, first..end, config.features)
            })
            .collect::<Result<Vec<_>, _>>()?;
        let reservation = mm.reserve_client()?;
        let mmu = Arc::new(Mmu {
            config,
            mm: mm.clone(),
            object,
            view,
            table: Table::new(pages),
            shards,
            pages_per_shard: pages_per_shard as u64,
            client: reservation.id(),
            counters: Counters::default(),
            ending: AtomicBool::new(false),
            let_go: AtomicBool::new(false),
            failure: Mutex::default(),
            pagemap: OnceLock::new(),
            on_failure: Box::new(on_failure),
            #[cfg(test)]
            overtaking: Mutex::default(),
        });
        let membership = mm.register_client(reservation, mmu.clone());
        // From here on dropping it ends what was begun.
        let mut this = Self { mmu, readers: Vec::new(), workers: Vec::new(), membership };
        for shard in 0..this.mmu.shards.len() {
            this.workers.push(this.spawn("gnomon-page-in", shard, Mmu::work)?);
            this.readers.push(this.spawn("gnomon-faults", shard, Mmu::read_faults)?);
        }
        Ok(this)
    }

    fn spawn(
        &self,
        name: &str,
        shard: usize,
        body: impl FnOnce(&Mmu, &Shard) + Send + 'static,
    ) -> Result<JoinHandle<()>, MmError> {
        let mmu = self.mmu.clone();
        std::thread::Builder::new()
            .name(format!("{name}-{shard}"))
            .spawn(move || body(&mmu, &mmu.shards[shard]))
            .map_err(|source| MmError::Host { what: "a thread for direct paging", source })
    }

    /// The guest's memory.
    #[must_use]
    pub fn object(&self) -> &Arc<MemoryObject> {
        &self.mmu.object
    }

    /// The window: page `gfn` of the guest is at byte `gfn * 4096`.
    #[must_use]
    pub fn window(&self) -> &GuestView {
        &self.mmu.view
    }

    /// What has happened so far: all of it, to those whose faults were resolved. Waits for what the
    /// threads in here are at, so the caller must hold no page.
    #[must_use]
    pub fn stats(&self) -> DirectStats {
        self.mmu.shards.iter().for_each(Shard::await_turns);
        self.mmu.counters.snapshot()
    }

    /// The first failure, as a sentence.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        lock(&self.mmu.failure).clone()
    }

    /// Its number among the export clients.
    #[must_use]
    pub fn client_id(&self) -> ClientId {
        self.membership.id()
    }

    /// Removes `count` pages from `first` from the window, as any other part of the process might
    /// (`MADV_REMOVE`), and waits until that is done: they are zero.
    ///
    /// # Errors
    /// If they are not all of the window, or the kernel refuses.
    pub fn remove(&self, first: Gfn, count: u64) -> io::Result<()> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let bytes = |pages: u64| {
            let bytes = pages.checked_mul(PAGE_SIZE_U64).ok_or_else(invalid)?;
            usize::try_from(bytes).map_err(|_| invalid())
        };
        memory::remove(self.mmu.view.region(), bytes(first.as_u64())?, bytes(count)?)?;
        self.settle();
        Ok(())
    }

    /// Lets everybody go who waits for a page, with what the memfd holds: for the end of a guest whose
    /// vCPUs have been told to stop, when one of them waits for a page that cannot be had.
    pub fn let_go(&self) {
        // Relaxed: looked at by a check, which nothing may run beside.
        self.mmu.let_go.store(true, Ordering::Relaxed);
        for shard in &self.mmu.shards {
            // It ends with the descriptor at the latest.
            let _ = shard.window.unregister();
        }
    }

    /// Waits until every removal of a part of the window whose call has returned is done: for those
    /// who look at the guest's memory by other ways than the window.
    pub fn settle(&self) {
        self.mmu.shards.iter().for_each(Shard::settle);
    }
}

impl Drop for DirectMmu {
    fn drop(&mut self) {
        let mmu = &*self.mmu;
        // Release pairs with the Acquire in `zap`: who does not see it has the lock taken next.
        mmu.ending.store(true, Ordering::Release);
        mmu.shards.iter().for_each(Shard::await_zap);
        // Workers first: what they wait for may need an event to be read.
        mmu.shards.iter().for_each(Shard::stop_worker);
        self.workers.drain(..).for_each(|thread| drop(thread.join()));
        mmu.shards.iter().for_each(Shard::stop_reader);
        self.readers.drain(..).for_each(|thread| drop(thread.join()));
        self.let_go();
        self.mmu.forget_everything();
    }
}

impl Mmu {
    fn shard_of(&self, page: u64) -> Option<&Shard> {
        self.shards.get(usize::try_from(page / self.pages_per_shard).ok()?)
    }

    fn fail(&self, error: DirectError) {
        lock(&self.failure).get_or_insert_with(|| error.to_string());
        (self.on_failure)(error);
    }
}

/// Byte offset of a page in the window.
fn offset_of(page: u64) -> usize {
    // Pages of a window fit the address space.
    usize::try_from(page * PAGE_SIZE_U64).unwrap_or(usize::MAX)
}

#[cfg(all(test, feature = "export-notifier"))]
mod tests;
