//! One connected peer: an export client whose mappings are in another process.
//!
//! Guarantee: when [`flush`](ExportNotifier::flush) has returned, the peer has given up every page
//! that was invalidated before, or was cut off; either way the pages are gone from its page tables.
//! That takes no longer than the limit, whatever the peer does; time in which this process itself was
//! stopped is not the peer's, and does not count ([`Patience`]). Once a stop is asked for it takes no
//! longer than [patience](signal::is_patience_over).
//!
//! Two threads serve it. One reads and writes the socket and never takes a page lock, so that an
//! acknowledgement gets through whatever waits for it with page locks held. The other lends pages.
//! Whoever flushes sends for itself, and sleeps until the first thread says that all is done.
//!
//! Lock order: a page lock may be held when the session's lock is taken, never the other way round.

use std::convert::Infallible;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::addr::{Gfn, PAGE_SIZE, Pfn};
use crate::export_rmap::{
    ClientGuard, ClientId, ClientLock, ExportNotifier, FlushReason, Gone, Harvest, Invalidation,
    LockedPage, Owner, Retain, RevokeError, RmapEntry,
};
use crate::host_mm::{HostMm, MemoryObject};
use crate::peer::book::{Book, Event, Fault, Holding, Job};
use crate::peer::hooks::{PEER_HANG, PEER_KILL, SKIP_PUNCH};
use crate::peer::lent::LentFile;
use crate::peer::protocol::{Closing, Reply};
use crate::peer::tally::Tally;
use crate::sync::{Arc, Condvar};
use crate::sys::Patience;
use crate::sys::signal;

/// Bytes read at a time.
const READ_BYTES: usize = 4096;
/// Time between attempts to take back what the kernel would not take back.
const RETRY: Duration = Duration::from_millis(100);

/// What time it is: [`Instant::now`], but in tests.
pub(super) type Clock = Box<dyn Fn() -> Instant + Send + Sync>;

/// What all sessions of a server share.
pub(super) struct Common {
    pub(super) mm: Arc<HostMm>,
    pub(super) objects: Vec<Arc<MemoryObject>>,
    pub(super) slots: u32,
    /// Time in which a peer must acknowledge.
    pub(super) limit: Duration,
    pub(super) clock: Clock,
    pub(super) tally: Tally,
}

/// See the module's documentation.
pub(super) struct Session {
    common: Arc<Common>,
    /// Number among the peers of the server, for people.
    pub(super) number: u64,
    socket: UnixStream,
    lent: LentFile,
    /// Interrupts the poll of the socket's thread.
    wake: EventFd,
    client: ClientId,
    state: ClientLock<State>,
    /// Something in the state that somebody may wait for has changed.
    changed: Condvar,
}

struct State {
    book: Book,
    /// Why it is over.
    end: Option<End>,
    /// What the peer says is thrown away: `--inject peer-hang`.
    is_deaf: bool,
    /// The kernel did not take the pages of an ended session back.
    is_stuck: bool,
}

/// How a session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct End {
    pub(super) why: Closing,
    /// What exactly the peer did.
    pub(super) fault: Option<Fault>,
}

type Locked<'a> = ClientGuard<'a, State>;

impl Session {
    /// A session on a connected socket, not served yet.
    ///
    /// # Errors
    /// If the host has no descriptor left.
    pub(super) fn new(
        common: Arc<Common>,
        client: ClientId,
        number: u64,
        socket: UnixStream,
    ) -> std::io::Result<Arc<Self>> {
        socket.set_nonblocking(true)?;
        let pages = |object: &Arc<MemoryObject>| object.bytes() / PAGE_SIZE as u64;
        let book = Book::new(common.slots, common.objects.iter().map(pages).collect());
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Arc::new(Self {
            lent: LentFile::new(common.slots)?,
            wake: EventFd::from_value_and_flags(0, flags)?,
            common,
            number,
            socket,
            client,
            state: ClientLock::new(State { book, end: None, is_deaf: false, is_stuck: false }),
            changed: Condvar::new(),
        }))
    }

    fn lock(&self) -> Locked<'_> {
        self.state.lock()
    }

    /// A page of a slot, as it leaves the slot. Nobody wrote it there.
    fn gone(&self, slot: u32, pfn: Pfn) -> Gone {
        Gone { pfn, entry: RmapEntry::new(self.client, slot.into()), dirty: false }
    }

    /// How it ended, once it has.
    pub(super) fn end(&self) -> Option<End> {
        self.lock().end
    }

    /// Says hello, and sends the file along.
    pub(super) fn greet(&self) -> std::io::Result<()> {
        let mut hello = Vec::new();
        let objects = u32::try_from(self.common.objects.len()).unwrap_or(u32::MAX);
        let limit_ms = u32::try_from(self.common.limit.as_millis()).unwrap_or(u32::MAX);
        Reply::Hello { objects, slots: self.common.slots, limit_ms }.write(&mut hello);
        // Nothing is in the socket's buffer, which is larger than this.
        let sent = crate::sys::socket::send_with_file(&self.socket, &hello, self.lent.file())?;
        if sent == hello.len() { Ok(()) } else { Err(ErrorKind::WriteZero.into()) }
    }

    /// Tells the peer something.
    pub(super) fn say(&self, reply: &Reply) {
        let mut locked = self.lock();
        if locked.end.is_none() {
            locked.book.say(reply);
            self.send(&mut locked);
        }
    }

    /// Ends it from the server's side: everything is taken from the peer at once.
    pub(super) fn close(&self, why: Closing) {
        let mut locked = self.lock();
        self.cut_off(&mut locked, why, None);
    }

    /// Takes everything from the peer and closes its socket. The session's threads notice, and
    /// unregister the client.
    fn cut_off(&self, state: &mut Locked<'_>, why: Closing, fault: Option<Fault>) {
        if state.end.is_some() {
            return;
        }
        state.end = Some(End { why, fault });
        self.common.tally.closed(why);
        let held = state.book.all_held();
        let gone: Vec<Gone> =
            held.map(|(slot, Holding { pfn, .. })| self.gone(slot, pfn)).collect();
        let mut is_stuck = false;
        let taken = self.common.mm.frame_table().give_up(state, &gone, || {
            // What the kernel keeps is waited for: see `take_back`.
            is_stuck = self.lent.take_all().is_err();
            Ok::<(), Infallible>(())
        });
        let Ok(()) = taken;
        state.is_stuck = is_stuck;
        state.book.close(why);
        self.pump(state);
        // It may be closed already; what was sent before can still be read.
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
        let _ = self.wake.write(1);
        self.changed.notify_all();
    }

    /// Sends what is queued, as far as the socket takes it.
    fn pump(&self, state: &mut Locked<'_>) {
        loop {
            let bytes = state.book.to_send();
            if bytes.is_empty() {
                return;
            }
            match (&self.socket).write(bytes) {
                Ok(count) => state.book.sent_bytes(count),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => return self.cut_off(state, Closing::HungUp, None),
            }
        }
        if state.book.is_unread() {
            self.cut_off(state, Closing::Unread, None);
        }
    }

    /// As [`pump`](Self::pump), for other threads than the socket's: that one sends the rest.
    fn send(&self, state: &mut Locked<'_>) {
        self.pump(state);
        if !state.book.to_send().is_empty() {
            let _ = self.wake.write(1);
        }
    }

    /// Serves the peer until the session is over.
    pub(super) fn serve(self: &Arc<Self>) {
        let lender = self.clone();
        let lender = std::thread::Builder::new()
            .name(format!("lender-{}", self.number))
            .spawn(move || lender.serve_pages());
        match lender {
            Ok(lender) => {
                self.serve_socket();
                let _ = lender.join();
            }
            Err(_) => self.close(Closing::Trouble),
        }
    }

    // The socket's thread.

    /// Serves the socket until the session is over.
    fn serve_socket(&self) {
        let mut bytes = [0; READ_BYTES];
        loop {
            let events = {
                let locked = self.lock();
                if locked.end.is_some() {
                    return;
                }
                match locked.book.to_send().is_empty() {
                    true => PollFlags::POLLIN,
                    false => PollFlags::POLLIN | PollFlags::POLLOUT,
                }
            };
            let mut watched = [
                PollFd::new(self.socket.as_fd(), events),
                PollFd::new(self.wake.as_fd(), PollFlags::POLLIN),
            ];
            // An interrupted or failed poll is as good as a return: every call below is tried.
            let _ = poll(&mut watched, PollTimeout::NONE);
            let _ = self.wake.read();
            let received = (&self.socket).read(&mut bytes);
            let mut locked = self.lock();
            match received {
                Ok(0) => self.cut_off(&mut locked, Closing::HungUp, None),
                Ok(count) => self.hear(&mut locked, &bytes[..count]),
                Err(error)
                    if [ErrorKind::WouldBlock, ErrorKind::Interrupted].contains(&error.kind()) => {}
                Err(_) => self.cut_off(&mut locked, Closing::HungUp, None),
            }
            self.pump(&mut locked);
        }
    }

    /// Acts on what the peer says.
    fn hear(&self, state: &mut Locked<'_>, bytes: &[u8]) {
        // To a deaf session it is as if nothing had come.
        if state.end.is_some() || state.is_deaf {
            return;
        }
        state.book.receive(bytes);
        loop {
            let event = match state.book.hear() {
                Ok(Some(event)) => event,
                Ok(None) => return,
                Err(fault) => return self.cut_off(state, Closing::Malformed, Some(fault)),
            };
            let taken = match event {
                Event::Asked => {
                    self.changed.notify_all();
                    Ok(())
                }
                Event::Released(slots) => self.release(state, slots),
                Event::Acked(batch) => self.take(&batch.slots).map(|()| {
                    state.book.freed(&batch);
                    self.common.tally.acknowledged(batch.sent.elapsed());
                    self.changed.notify_all();
                }),
                Event::Left => return self.cut_off(state, Closing::Left, None),
            };
            if taken.is_err() {
                return self.cut_off(state, Closing::Trouble, None);
            }
        }
    }

    /// The peer has given these slots up.
    fn release(&self, state: &mut Locked<'_>, slots: std::ops::Range<u32>) -> std::io::Result<()> {
        let (slots, gone): (Vec<u32>, Vec<Gone>) = slots
            .filter_map(|slot| Some((slot, self.gone(slot, state.book.held(slot)?.pfn))))
            .unzip();
        self.common.mm.frame_table().give_up(state, &gone, || self.take(&slots))?;
        for slot in slots {
            state.book.released(slot);
            self.common.tally.unmapped();
        }
        Ok(())
    }

    fn take(&self, slots: &[u32]) -> std::io::Result<()> {
        if self.common.mm.lab().breaks(SKIP_PUNCH, || Gfn::new(0)) {
            return Ok(());
        }
        self.lent.take(slots)
    }

    /// Waits until everything was taken from the peer of an ended session.
    pub(super) fn settle(&self) {
        loop {
            let mut locked = self.lock();
            if self.take_back(&mut locked).is_ok() {
                return;
            }
            drop(locked);
            std::thread::sleep(RETRY);
        }
    }

    fn take_back(&self, state: &mut Locked<'_>) -> std::io::Result<()> {
        if state.is_stuck {
            self.lent.take_all()?;
            state.is_stuck = false;
        }
        Ok(())
    }

    // The thread that lends.

    /// Lends what is asked for until the session is over.
    fn serve_pages(&self) {
        while let Some(job) = self.next_job() {
            let pages: Vec<Gfn> = job.pages().map(|(gfn, _)| gfn).collect();
            if let Some(object) = self.common.objects.get(job.object as usize) {
                // What could not be lent is refused below, whatever the reason.
                let _ = object.lend_pages(&pages, |gfn, page, content| {
                    self.lend(job, object, gfn, page, content);
                });
            }
            let mut locked = self.lock();
            if locked.end.is_none() {
                locked.book.answer(job);
                self.send(&mut locked);
            }
        }
    }

    fn next_job(&self) -> Option<Job> {
        let mut locked = self.lock();
        loop {
            if locked.end.is_some() {
                return None;
            }
            if let Some(job) = locked.book.take_job() {
                return Some(job);
            }
            locked = self.state.wait(&self.changed, locked);
        }
    }

    /// Copies a page into its slot, under its page lock.
    fn lend(
        &self,
        job: Job,
        object: &MemoryObject,
        gfn: Gfn,
        page: &LockedPage<'_>,
        content: &[u8; PAGE_SIZE],
    ) {
        let mut locked = self.lock();
        let state = &mut locked;
        // After a cut-off nothing may get into the file any more, and at no time into a slot that
        // does not wait for just this.
        let Some(slot) = state.book.wanted(job, gfn).filter(|_| state.end.is_none()) else {
            return;
        };
        if self.lent.put(slot, content).is_err() {
            // A part of it may be there, and a slot that is refused is empty.
            if self.take(&[slot]).is_err() {
                self.cut_off(state, Closing::Trouble, None);
            }
            return;
        }
        let owner = Owner { object: object.number(), gfn };
        let exported = page.export(state, RmapEntry::new(self.client, slot.into()));
        state.book.lend(job, Holding { owner, pfn: page.pfn() });
        exported.keep();
        self.common.tally.lent();
    }
}

impl ExportNotifier for Session {
    fn invalidate_page(&self, page: &LockedPage<'_>, kind: Invalidation) -> Harvest {
        if kind == Invalidation::Clean {
            // A copy can be read while nobody writes.
            return Harvest::default();
        }
        let mut locked = self.lock();
        let book = &mut locked.book;
        let mut dropped = 0;
        page.table().rmap_visit(page.pfn(), self.client, |location| {
            // Slots are what entries were made of.
            let slot = u32::try_from(location).unwrap_or(u32::MAX);
            match (kind, book.held(slot)) {
                (Invalidation::Replace(owner), Some(holding)) if holding.owner != owner => {
                    Retain::Keep
                }
                _ => {
                    book.drop_held(slot);
                    dropped += 1;
                    Retain::Drop
                }
            }
        });
        self.common.tally.invalidated(dropped);
        // Nobody wrote a copy, and whether it was read is not known.
        Harvest::default()
    }

    fn age_page(&self, _page: &LockedPage<'_>) -> bool {
        false
    }

    fn flush(&self, frames: &[Pfn], reason: FlushReason) -> Result<(), RevokeError> {
        if reason == FlushReason::Aged {
            return Ok(());
        }
        let mut locked = self.lock();
        if locked.end.is_none()
            && let Some((sequence, is_new)) = locked.book.announce(frames, Instant::now())
        {
            if is_new {
                self.common.tally.announced();
                match self.common.mm.lab().strikes_one_of(&[PEER_HANG, PEER_KILL]) {
                    Some(fault) if fault == PEER_KILL => {
                        self.cut_off(&mut locked, Closing::Injected, None);
                    }
                    Some(_) => locked.is_deaf = true,
                    None => {}
                }
                if locked.end.is_none() {
                    self.send(&mut locked);
                }
            }
            // Whoever announced the batch was here first, so nobody waits longer than it may take.
            let mut patience = Patience::at(self.common.limit, (self.common.clock)());
            while locked.end.is_none() && locked.book.done() < sequence {
                if signal::is_patience_over() {
                    // The end of the run must not wait, and with it all peers are cut off.
                    self.cut_off(&mut locked, Closing::EndOfRun, None);
                    continue;
                }
                match patience.slice_at((self.common.clock)()) {
                    Some(slice) => {
                        locked = self.state.wait_timeout(&self.changed, locked, slice);
                    }
                    None => self.cut_off(&mut locked, Closing::TooSlow, None),
                }
            }
        }
        self.take_back(&mut locked).map_err(|source| RevokeError { frames: frames.len(), source })
    }
}
