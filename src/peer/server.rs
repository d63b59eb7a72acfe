//! The socket that peers connect to, and the peers that have.
//!
//! Guarantee: only processes of this user (and of root) are served, at most [`MAX_PEERS`] at a time;
//! they may come and go at any time, and what is kept for those that have gone is bounded, however
//! often they come. [`PeerServer::stop`] returns when every copy was taken back,
//! every client is unregistered and every thread has ended.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::{ErrorKind, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use nix::fcntl::{Flock, FlockArg};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::addr::{PAGE_SIZE, Pfn};
use crate::export_rmap::{Membership, Retain};
use crate::host_mm::{HostMm, MemoryObject};
use crate::peer::protocol::{Closing, MAX_NAMED_SLOTS, Note, Reply};
use crate::peer::session::{Clock, Common, Session};
use crate::peer::tally::{PeerStats, Tally};
use crate::sync::{Arc, Mutex, lock};
use crate::sys::names::{Leftover, folder_of};
use crate::sys::threads::NotStarted;
use crate::sys::{signal, socket, threads};

/// Peers served at a time.
pub const MAX_PEERS: usize = 16;
/// Attempts to lock the directory of the socket, and the time between two.
const LOCK_ATTEMPTS: u32 = 100;
const LOCK_RETRY: Duration = Duration::from_millis(5);
/// Peers that are gone and whose threads have not ended yet: a lender may be waiting for a page.
const MAX_LEAVING: usize = MAX_PEERS;
/// Mappings that are told of clients that are gone.
const MOST_LEFTOVERS: usize = 16;
/// Slots of a peer, unless it is said.
pub const DEFAULT_SLOTS: u32 = 1024;

/// The socket cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// There is something else.
    #[error("{}: there is something that is not a socket; name another place", .0.display())]
    NotASocket(PathBuf),
    /// Somebody answers there.
    #[error("{}: another process serves this socket; name another place", .0.display())]
    InUse(PathBuf),
    /// It cannot be made.
    #[error("{}: cannot make a socket: {source}; name another place", .path.display())]
    Bind {
        /// Where.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The host refused a thread.
    #[error(transparent)]
    Thread(#[from] NotStarted),
    /// The host refused something else.
    #[error("cannot serve peers: {0}")]
    Host(std::io::Error),
}

/// How peers are served.
#[derive(Clone, Copy, Debug)]
pub struct ServerConfig {
    /// Pages that one peer may hold at a time, at most 65,536.
    pub slots: u32,
    /// Time in which a peer must acknowledge an invalidation.
    pub limit: Duration,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self { slots: DEFAULT_SLOTS, limit: Duration::from_secs(1) }
    }
}

/// Told of each peer that was cut off, in a sentence.
pub type OnCutOff = Box<dyn Fn(&str) + Send + Sync>;

struct Shared {
    common: Arc<Common>,
    sessions: Mutex<Sessions>,
    on_cut_off: OnCutOff,
    is_over: AtomicBool,
    /// Interrupts the poll of the thread that accepts.
    wake: EventFd,
}

/// Who is connected, and what everybody is told at first.
#[derive(Default)]
struct Sessions {
    live: Vec<Arc<Session>>,
    threads: Vec<JoinHandle<()>>,
    /// Of each memory object, in order.
    infos: Vec<Reply>,
    /// What there is to say of them, by their numbers.
    notes: BTreeMap<u32, Note>,
    next_number: u64,
}

/// Serves peers until it is stopped or dropped.
pub struct PeerServer {
    shared: Arc<Shared>,
    acceptor: Mutex<Option<JoinHandle<()>>>,
    socket: Mutex<Option<Leftover>>,
}

/// What is at the path of a socket that is to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    Nothing,
    /// A socket that nobody listens on: its process has died.
    Stale,
}

fn look(path: &Path) -> Result<Found, ServeError> {
    let Ok(metadata) = path.symlink_metadata() else {
        return Ok(Found::Nothing);
    };
    if !metadata.file_type().is_socket() {
        return Err(ServeError::NotASocket(path.to_owned()));
    }
    match socket::is_bound(path) {
        Ok(false) => Ok(Found::Stale),
        _ => Err(ServeError::InUse(path.to_owned())),
    }
}

/// Whether a socket can be made there, as far as can be known without making one.
///
/// # Errors
/// [`ServeError`].
pub fn check_path(path: &Path) -> Result<(), ServeError> {
    look(path).map(drop)
}

fn bind(path: &Path) -> Result<(UnixListener, Leftover), ServeError> {
    let refused = |source| ServeError::Bind { path: path.to_owned(), source };
    let _alone = one_at_a_time(folder_of(path));
    if look(path)? == Found::Stale {
        std::fs::remove_file(path).map_err(refused)?;
    }
    let listener = socket::bind_private(path).map_err(refused)?;
    Ok((listener, Leftover::new(path).map_err(refused)?))
}

/// Keeps others of us out of a directory while the socket of one that died gives way to ours: theirs,
/// made just before, must not be taken for it. `None` where that is not to be had.
fn one_at_a_time(folder: &Path) -> Option<Flock<File>> {
    let mut folder = File::open(folder).ok()?;
    for _ in 0..LOCK_ATTEMPTS {
        match Flock::lock(folder, FlockArg::LockExclusiveNonblock) {
            Ok(locked) => return Some(locked),
            // Locked: by one of us for a moment, or by somebody else for his own reasons.
            Err((unlocked, _)) => folder = unlocked,
        }
        std::thread::sleep(LOCK_RETRY);
    }
    None
}

impl PeerServer {
    /// Serves pages of these memory objects, all of the same host memory, to peers that connect to
    /// a new socket at `path`.
    ///
    /// # Errors
    /// [`ServeError`].
    pub fn start(
        path: &Path,
        mm: &Arc<HostMm>,
        objects: Vec<Arc<MemoryObject>>,
        config: ServerConfig,
        on_cut_off: OnCutOff,
    ) -> Result<Self, ServeError> {
        let (listener, socket) = bind(path)?;
        let clock = Box::new(Instant::now);
        let server = Self::without_socket(mm, objects, config, on_cut_off, clock)?;
        *lock(&server.socket) = Some(socket);
        let shared = server.shared.clone();
        let acceptor = threads::start("peers", "peers", move || accept(&shared, &listener))?;
        *lock(&server.acceptor) = Some(acceptor);
        Ok(server)
    }

    /// A server that peers are handed to, with what it goes by for time.
    pub(super) fn without_socket(
        mm: &Arc<HostMm>,
        objects: Vec<Arc<MemoryObject>>,
        config: ServerConfig,
        on_cut_off: OnCutOff,
        clock: Clock,
    ) -> Result<Self, ServeError> {
        let info = |(number, object): (u32, &Arc<MemoryObject>)| Reply::Info {
            object: number,
            pages: object.bytes() / PAGE_SIZE as u64,
        };
        let infos = (0..).zip(&objects).map(info).collect();
        let most = u32::try_from(MAX_NAMED_SLOTS).unwrap_or(u32::MAX);
        let common = Common {
            mm: mm.clone(),
            objects,
            slots: config.slots.min(most),
            limit: config.limit,
            clock,
            tally: Tally::default(),
        };
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let wake = EventFd::from_value_and_flags(0, flags);
        let shared = Shared {
            common: Arc::new(common),
            sessions: Mutex::new(Sessions { infos, ..Sessions::default() }),
            on_cut_off,
            is_over: AtomicBool::new(false),
            wake: wake.map_err(|error| ServeError::Host(error.into()))?,
        };
        Ok(Self { shared: Arc::new(shared), acceptor: Mutex::default(), socket: Mutex::default() })
    }

    /// Serves the peer at the other end of a connection.
    #[cfg(all(test, feature = "export-notifier"))]
    pub(super) fn hand_over(&self, stream: UnixStream) {
        self.shared.admit(stream);
    }

    /// Tells all peers, those to come too, something of a memory object, in place of what they were told
    /// before; again the same is not said again.
    pub fn note(&self, object: u32, note: Note) {
        let mut sessions = lock(&self.shared.sessions);
        if sessions.notes.insert(object, note) != Some(note) {
            let reply = Reply::Note { object, note };
            sessions.live.iter().for_each(|session| session.say(&reply));
        }
    }

    /// What has happened so far.
    #[must_use]
    pub fn stats(&self) -> PeerStats {
        self.shared.common.tally.stats()
    }

    /// Nanoseconds from an invalidation to its acknowledgement and the end of its copies; `None`
    /// without any.
    #[must_use]
    pub fn latency(&self) -> Option<Histogram<u64>> {
        self.shared.common.tally.latency()
    }

    /// Takes everything back from all peers, and serves none any more. Waits as [`threads::join`] does.
    pub fn stop(&self) {
        // Relaxed: the wake-up comes after it.
        self.shared.is_over.store(true, Ordering::Relaxed);
        let _ = self.shared.wake.write(1);
        let acceptor = lock(&self.acceptor).take();
        let _ = acceptor.map(threads::join);
        drop(lock(&self.socket).take());
        let (live, threads) = {
            let mut sessions = lock(&self.shared.sessions);
            (std::mem::take(&mut sessions.live), std::mem::take(&mut sessions.threads))
        };
        live.iter().for_each(|session| session.close(Closing::EndOfRun));
        for thread in threads {
            let _ = threads::join(thread);
        }
    }

    /// Mappings that are in the reverse map of frames though their client is gone, a sentence each, at
    /// most 16. Call it once the server has stopped; VMs may be at work. It costs a look for each frame
    /// and client that maps it, and leaves off when a [stop](signal::is_stop_asked) is asked for.
    #[must_use]
    pub fn leftovers(&self) -> Vec<String> {
        let mm = &self.shared.common.mm;
        let (notifiers, table) = (mm.notifiers(), mm.frame_table());
        let (mut at_work, mut left) = (HashSet::new(), Vec::new());
        for pfn in (0..table.len()).map(Pfn::new).take_while(|_| !signal::is_stop_asked()) {
            if table.is_rmap_empty(pfn) {
                continue;
            }
            for client in table.rmap_clients(pfn) {
                if at_work.contains(&client) || notifiers.is_registered(client) {
                    at_work.insert(client);
                    continue;
                }
                // It is gone, and all that it had should have gone before. One that ends just now may
                // have let go after the look above.
                let mut slots = Vec::new();
                table.rmap_visit_batch(pfn, client, 0, |slot| {
                    slots.push(slot);
                    Retain::Keep
                });
                let client = client.as_u16();
                left.extend(slots.into_iter().map(|slot| {
                    format!("I3: frame {pfn} is exported to slot {slot} of client {client}, which is gone")
                }));
                if left.len() >= MOST_LEFTOVERS {
                    left.truncate(MOST_LEFTOVERS);
                    return left;
                }
            }
        }
        left
    }

    /// Sessions and threads that are kept, and how many of the threads are at work.
    #[cfg(all(test, feature = "export-notifier"))]
    pub(super) fn kept(&self) -> (usize, usize, usize) {
        let Sessions { live, threads, .. } = &*lock(&self.shared.sessions);
        (live.len(), threads.len(), threads.iter().filter(|thread| !thread.is_finished()).count())
    }
}

impl Drop for PeerServer {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Lets peers in until the server is over.
fn accept(shared: &Arc<Shared>, listener: &UnixListener) {
    // So that a peer that hangs up before it is accepted is not waited for.
    if listener.set_nonblocking(true).is_err() {
        return;
    }
    while !shared.is_over.load(Ordering::Relaxed) {
        let mut watched = [
            PollFd::new(listener.as_fd(), PollFlags::POLLIN),
            PollFd::new(shared.wake.as_fd(), PollFlags::POLLIN),
        ];
        let _ = poll(&mut watched, PollTimeout::NONE);
        match listener.accept() {
            Ok((stream, _)) => shared.admit(stream),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            // Out of descriptors, say: it may pass.
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

impl Shared {
    /// Serves a peer, or tells it why not.
    fn admit(self: &Arc<Self>, stream: UnixStream) {
        let mine = nix::unistd::geteuid().as_raw();
        let is_ours = socket::peer_uid(&stream).is_ok_and(|uid| uid == mine || uid == 0);
        if !is_ours {
            return self.refuse(&stream, Closing::OtherUser);
        }
        let mut sessions = lock(&self.sessions);
        sessions.forget_ended();
        let is_full = sessions.live.len() == MAX_PEERS;
        if is_full || sessions.threads.len() == MAX_PEERS + MAX_LEAVING {
            return self.refuse(&stream, Closing::TooMany);
        }
        let Ok(spare) = stream.try_clone() else {
            return self.refuse(&stream, Closing::Trouble);
        };
        let Ok(reservation) = self.common.mm.reserve_client() else {
            return self.refuse(&spare, Closing::TooMany);
        };
        let number = sessions.next_number + 1;
        let client = reservation.id();
        let Ok(session) = Session::new(self.common.clone(), client, number, stream) else {
            return self.refuse(&spare, Closing::Trouble);
        };
        let Ok((thread, register)) = self.spawn(session.clone()) else {
            return self.refuse(&spare, Closing::Trouble);
        };
        sessions.threads.push(thread);
        // From here on everything that is invalidated reaches it; it has nothing yet.
        let membership = self.common.mm.register_client(reservation, session.clone());
        // Before it hears anything: whoever has a peer's word that it was let in finds it counted.
        self.common.tally.served();
        // Before anything is served: what it asks for is answered after.
        if session.greet().is_err() {
            session.close(Closing::HungUp);
        }
        sessions.infos.iter().for_each(|info| session.say(info));
        let notes = sessions.notes.iter();
        notes.for_each(|(&object, &note)| session.say(&Reply::Note { object, note }));
        sessions.next_number = number;
        sessions.live.push(session);
        // The thread waits for this.
        let _ = register.send(membership);
    }

    /// A thread that serves a peer as soon as it is sent the client's membership, and ends if there
    /// is none.
    fn spawn(
        self: &Arc<Self>,
        session: Arc<Session>,
    ) -> Result<(JoinHandle<()>, mpsc::Sender<Membership>), NotStarted> {
        let (register, registered) = mpsc::channel();
        let shared = self.clone();
        let name = format!("peer-{}", session.number);
        let thread = threads::start(name, "a peer", move || {
            let Ok(membership) = registered.recv() else { return };
            session.serve();
            session.settle();
            drop(membership);
            shared.tell(&session);
        });
        Ok((thread?, register))
    }

    fn refuse(&self, mut stream: &UnixStream, why: Closing) {
        self.common.tally.refused();
        let mut bytes = Vec::new();
        Reply::Closed { why }.write(&mut bytes);
        // Nothing is in the socket's buffer; a peer that is gone need not be told.
        let _ = stream.write_all(&bytes);
    }

    fn tell(&self, session: &Session) {
        if let Some(end) = session.end()
            && !matches!(end.why, Closing::EndOfRun | Closing::Left)
        {
            let fault = end.fault.map(|fault| format!(": {fault}")).unwrap_or_default();
            (self.on_cut_off)(&format!("peer {} was cut off: {}{fault}", session.number, end.why));
        }
    }
}

impl Sessions {
    fn forget_ended(&mut self) {
        self.live.retain(|session| session.end().is_none());
        let (ended, threads) = std::mem::take(&mut self.threads)
            .into_iter()
            .partition(|thread: &JoinHandle<()>| thread.is_finished());
        self.threads = threads;
        let ended: Vec<JoinHandle<()>> = ended;
        for thread in ended {
            let _ = thread.join();
        }
    }
}
