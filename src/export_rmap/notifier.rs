//! The export notifier: the trait that clients implement, and the list that the host side walks.
//!
//! Guarantees:
//!
//! - [`NotifierList::notify`] takes no lock: it walks a snapshot of the list, as the mail's
//!   `hlist_for_each_entry_rcu` did. Receivers may sleep (the walk is no RCU read section).
//! - a [`Membership`] is dropped only when no call into its notifier is running and none can start any
//!   more (invariant I7). The mail's version lacks this: its caller could free the
//!   notifier under a walker's feet. By then the list has let go of the client, too: its end is
//!   never a walker's business.

use std::io;

use crate::addr::Pfn;
use crate::flags::PageFlags;
use crate::frame_table::Owner;
use crate::numbers::Numbers;
use crate::page_lock::LockedPage;
use crate::rmap::ClientId;
use crate::sync::{Arc, AtomicU64, Condvar, Mutex, Ordering, Snapshot, lock};
use crate::trace;

/// What the host is about to do to a page, and so what its clients must give up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Invalidation {
    /// `try_to_unmap`: every mapping of the page goes.
    Unmap,
    /// `page_mkclean`: mappings may stay, but none may write; their dirty state is handed over.
    Clean,
    /// `do_wp_page`: this one of several pages that share the frame moves to another frame. A client
    /// gives up its mappings of it, and may give up more of the frame; those of other memory objects
    /// may stay.
    Replace(Owner),
    /// Somebody is about to write the page: clients that hold copies of it give them up. Mappings
    /// stay as they are; they are read-only while a copy is out.
    Recall,
}

impl Invalidation {
    /// For tracepoints.
    const fn name(self) -> &'static str {
        match self {
            Self::Unmap => "unmap",
            Self::Clean => "clean",
            Self::Replace(_) => "replace",
            Self::Recall => "recall",
        }
    }
}

/// What an invalidation found in the mappings that it changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Harvest {
    /// Some mapping had been written through since the last harvest.
    pub dirty: bool,
    /// Some mapping had been used since the last harvest.
    pub accessed: bool,
}

impl Harvest {
    /// Both findings together.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self { dirty: self.dirty || other.dirty, accessed: self.accessed || other.accessed }
    }
}

/// Why translations of some frames are to be revoked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlushReason {
    /// Mappings were removed or lost a right: nobody may use the old ones once `flush` returns.
    Invalidated,
    /// Accessed bits were cleared: they must be set again at the next use. Nothing is wrong if an
    /// old translation lives on.
    Aged,
    /// Copies were recalled ([`Invalidation::Recall`]): nobody may use them once `flush` returns.
    /// Mappings were not touched.
    Recalled,
}

impl FlushReason {
    /// For tracepoints.
    const fn name(self) -> &'static str {
        match self {
            Self::Invalidated => "invalidated",
            Self::Aged => "aged",
            Self::Recalled => "recalled",
        }
    }
}

/// A client could not revoke translations; the frames must not be used for anything else.
#[derive(Debug, thiserror::Error)]
#[error("revoking the guest's translations of {frames} frames failed: {source}")]
pub struct RevokeError {
    /// Number of frames that were to be revoked.
    pub frames: usize,
    /// What the kernel said.
    pub source: io::Error,
}

/// A receiver of invalidations: `struct export_notifier_ops` of the mail. Each client keeps its
/// mappings of frames in the common [reverse map](crate::rmap).
pub trait ExportNotifier: Send + Sync {
    /// The mail's `invalidate_page`: "called with the page lock held after ptes are modified or
    /// removed". Changes or removes this client's mappings as `kind` says, removes them from the
    /// reverse map (which clears `EXPORTED` with the last one) and hands over what they recorded.
    ///
    /// Translations that processors or devices still cache may be used until
    /// [`flush`](Self::flush) has returned. May sleep; must not take a page lock.
    fn invalidate_page(&self, page: &LockedPage<'_>, kind: Invalidation) -> Harvest;

    /// Clears the accessed state of this client's mappings of the page; whether any was set.
    fn age_page(&self, page: &LockedPage<'_>) -> bool;

    /// For checks: whether anything is left that an invalidation of this kind ends, a mapping or what
    /// somebody caches of one, once its [`flush`](Self::flush) has returned and while the page is
    /// still locked. A client that cannot tell says no.
    fn still_allows(&self, _page: &LockedPage<'_>, _kind: Invalidation) -> bool {
        false
    }

    /// Revokes every cached translation of these frames that the mappings no longer allow. The
    /// frames' page locks are held unless the reason is [`FlushReason::Aged`].
    ///
    /// # Errors
    /// If the kernel refuses; the frames must then stay with their pages.
    fn flush(&self, frames: &[Pfn], reason: FlushReason) -> Result<(), RevokeError>;
}

/// Set in [`Entry::state`] once the entry is unregistered; the rest counts running calls.
const CLOSED: u64 = 1 << 63;

struct Entry {
    id: ClientId,
    /// `None` once the entry is closed: a walker that still has it in its snapshot of the list must
    /// not be the one that drops the client, with page locks held that the client's end may want.
    notifier: Snapshot<Option<Arc<dyn ExportNotifier>>>,
    state: AtomicU64,
    drained_mutex: Mutex<()>,
    drained: Condvar,
}

impl Entry {
    /// Counts a call in, unless the entry is closed.
    fn enter(&self) -> Option<InCall<'_>> {
        let call = InCall { entry: self };
        // Acquire: a call that got in sees everything from before `register`. The count is raised
        // first and looked at second, so that `close` either sees the call or stops it.
        let before = self.state.fetch_add(1, Ordering::Acquire);
        (before & CLOSED == 0).then_some(call)
        // A refused `call` is dropped here and counts itself out again.
    }

    /// Lets no further call in, waits for those that are, and lets go of the client.
    fn close(&self) {
        self.state.fetch_or(CLOSED, Ordering::AcqRel);
        let mut guard = lock(&self.drained_mutex);
        // Acquire pairs with the Release in `InCall::drop`: what the last call did happened before.
        while self.state.load(Ordering::Acquire) != CLOSED {
            guard = self.drained.wait(guard).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        drop(guard);
        self.notifier.store(None);
    }
}

struct InCall<'a> {
    entry: &'a Entry,
}

impl Drop for InCall<'_> {
    fn drop(&mut self) {
        // Release pairs with the Acquire in `close`.
        if self.entry.state.fetch_sub(1, Ordering::Release) == CLOSED + 1 {
            // Under the mutex, or the wake-up could fall between `close`'s look and its wait.
            let _guard = lock(&self.entry.drained_mutex);
            self.entry.drained.notify_all();
        }
    }
}

/// A client's number, until this is dropped.
struct Number {
    list: NotifierList,
    id: ClientId,
}

impl Drop for Number {
    fn drop(&mut self) {
        lock(&self.list.list.writers).give_back(self.id.as_u16());
    }
}

/// A number for a client that is about to be made; dropping it gives the number back.
#[must_use = "dropping it gives the number back"]
pub struct Reservation {
    number: Number,
}

impl Reservation {
    /// The number, for the client's rmap entries.
    #[must_use]
    pub fn id(&self) -> ClientId {
        self.number.id
    }

    /// `export_notifier_register`: from when this returns, each notification reaches `notifier`.
    pub fn register(self, notifier: Arc<dyn ExportNotifier>) -> Membership {
        let Self { number } = self;
        let entry = Arc::new(Entry {
            id: number.id,
            notifier: Snapshot::new(Some(notifier)),
            state: AtomicU64::new(0),
            drained_mutex: Mutex::new(()),
            drained: Condvar::new(),
        });
        number.list.change(|entries| entries.push(entry.clone()));
        Membership { entry, number }
    }
}

/// A client's place in the list. Dropping it is `export_notifier_unregister`, completed: it ends when no
/// call into the notifier is running and none can start. So it must not be dropped inside one of the
/// notifier's own calls, which would wait for itself, and not before the client has given up its
/// mappings: keep it beside the client, not in it.
#[must_use = "a client is told of invalidations as long as its membership lives"]
pub struct Membership {
    entry: Arc<Entry>,
    // After the entry is closed: a number is free once nobody uses it.
    number: Number,
}

impl Membership {
    /// The client's number.
    #[must_use]
    pub fn id(&self) -> ClientId {
        self.number.id
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        self.number.list.change(|entries| {
            entries.retain(|entry| !Arc::ptr_eq(entry, &self.entry));
        });
        // A walker may still hold the old snapshot: it is stopped, or waited for, at the entry.
        self.entry.close();
    }
}

impl std::fmt::Debug for Membership {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Membership").field("id", &self.id()).finish_non_exhaustive()
    }
}

/// More clients at a time than there are client numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no client number is left: there are {} export clients", ClientId::MAX)]
pub struct TooManyClients;

/// The list of export notifiers: the mail's `export_notifier_list`. A clone is the same list.
#[derive(Clone)]
pub struct NotifierList {
    list: Arc<List>,
}

struct List {
    entries: Snapshot<Vec<Arc<Entry>>>,
    /// Serialises writers, as the mail's `export_notifier_list_lock`; holds the clients' numbers.
    writers: Mutex<Numbers>,
}

impl Default for NotifierList {
    fn default() -> Self {
        Self {
            list: Arc::new(List {
                entries: Snapshot::new(Vec::new()),
                writers: Mutex::new(Numbers::below(ClientId::MAX)),
            }),
        }
    }
}

impl std::fmt::Debug for NotifierList {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NotifierList").field("len", &self.list.entries.load().len()).finish()
    }
}

impl NotifierList {
    /// A number for a client, which is made with it and then [registered](Reservation::register). That
    /// of a client that is gone is given again once all others have been: a late rmap entry, which nobody
    /// should have left, is not taken for another's soon.
    ///
    /// # Errors
    /// If there are [`ClientId::MAX`] clients.
    pub fn reserve(&self) -> Result<Reservation, TooManyClients> {
        let id = lock(&self.list.writers).take().and_then(ClientId::new).ok_or(TooManyClients)?;
        Ok(Reservation { number: Number { list: self.clone(), id } })
    }

    /// [`reserve`](Self::reserve) and [`register`](Reservation::register) in one, for a client that need not
    /// know its number to be made.
    ///
    /// # Errors
    /// As [`reserve`](Self::reserve).
    pub fn register(
        &self,
        notifier: Arc<dyn ExportNotifier>,
    ) -> Result<Membership, TooManyClients> {
        Ok(self.reserve()?.register(notifier))
    }

    fn change(&self, change: impl FnOnce(&mut Vec<Arc<Entry>>)) {
        let writers = lock(&self.list.writers);
        let mut entries = self.list.entries.load().to_vec();
        change(&mut entries);
        self.list.entries.store(entries);
        drop(writers);
    }

    /// Whether a client has this number.
    #[must_use]
    pub fn is_registered(&self, client: ClientId) -> bool {
        self.list.entries.load().iter().any(|entry| entry.id == client)
    }

    /// `export_notifier(function, args…)`: calls `call` with each registered notifier.
    pub fn notify(&self, mut call: impl FnMut(&dyn ExportNotifier)) {
        if cfg!(not(feature = "export-notifier")) {
            return;
        }
        for entry in self.list.entries.load().iter() {
            if let Some(_in_call) = entry.enter()
                && let Some(notifier) = &**entry.notifier.load()
            {
                call(&**notifier);
            }
        }
    }

    /// Tells every client that the locked page is invalidated, if any maps it at all: an
    /// invalidation of a frame that is not exported costs one relaxed load.
    ///
    /// Call it after [`LockedPage::begin_invalidation`].
    pub fn invalidate_page(&self, page: &LockedPage<'_>, kind: Invalidation) -> Harvest {
        let mut harvest = Harvest::default();
        trace::point!(
            "invalidate",
            pfn = page.pfn().index(),
            object = page.owner().object,
            gfn = page.owner().gfn.as_u64(),
            kind = kind.name(),
            exported = page.frame().is_exported(),
        );
        if page.frame().is_exported() {
            self.notify(|client| harvest = harvest.or(client.invalidate_page(page, kind)));
        }
        harvest
    }

    /// Clears the accessed state of the locked page in every client; whether any was set.
    pub fn age_page(&self, page: &LockedPage<'_>) -> bool {
        let mut accessed = false;
        if page.frame().is_exported() {
            self.notify(|client| accessed |= client.age_page(page));
        }
        accessed
    }

    /// Whether any client [still allows](ExportNotifier::still_allows) what an invalidation ended.
    pub fn still_allowed(&self, page: &LockedPage<'_>, kind: Invalidation) -> bool {
        let mut found = false;
        self.notify(|client| found |= client.still_allows(page, kind));
        found
    }

    /// As [`flush`](Self::flush), for pages that are locked; whoever takes one away must do so by this.
    /// A frame of which the flush failed keeps that in mind until one of [its
    /// mappings](FlushReason::Invalidated) has succeeded: clients have given up their entries by then, so
    /// that it may be exported no more.
    ///
    /// # Errors
    /// As [`flush`](Self::flush).
    pub fn revoke(
        &self,
        pages: &[&LockedPage<'_>],
        reason: FlushReason,
    ) -> Result<(), RevokeError> {
        let frames: Vec<Pfn> = pages.iter().map(|page| page.pfn()).collect();
        let flushed = self.flush(&frames, reason);
        for page in pages {
            if flushed.is_err() {
                page.set_flags(PageFlags::FLUSH_DUE);
            } else if reason == FlushReason::Invalidated
                && page.flags().contains(PageFlags::FLUSH_DUE)
            {
                page.clear_flags(PageFlags::FLUSH_DUE);
            }
        }
        flushed
    }

    /// Has every client revoke its translations of these frames: one flush for a batch.
    ///
    /// # Errors
    /// The first client's error; the others are called all the same.
    pub fn flush(&self, frames: &[Pfn], reason: FlushReason) -> Result<(), RevokeError> {
        let mut result = Ok(());
        if trace::is_on() {
            for frame in frames {
                trace::point!("flush", pfn = frame.index(), reason = reason.name());
            }
        }
        if !frames.is_empty() {
            self.notify(|client| {
                let flushed = client.flush(frames, reason);
                if result.is_ok() {
                    result = flushed;
                }
            });
        }
        result
    }
}

#[cfg(all(test, not(any(loom, shuttle)), feature = "export-notifier"))]
#[path = "notifier_tests.rs"]
mod tests;
