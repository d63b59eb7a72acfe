//! The peer's side: maps pages of a guest that another process runs, and checks what it gets.
//!
//! Guarantee: it ends when its time is over or the server closes the connection, and answers each
//! invalidation before it does anything else.

mod slots;
mod test_guest;

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use vm_memory::MmapRegion;

use crate::addr::{Gfn, PAGE_SIZE};
use crate::peer::protocol::{
    Closing, MAX_MAP_PAGES, MAX_NAMED_SLOTS, MAX_REQUESTS, MESSAGE_BYTES, NotAMessage, Reply,
    ReplyReader, Request,
};
use crate::sys::Patience;
use crate::sys::{signal, small_pages, socket};
use slots::Slots;
pub use slots::{Findings, TORN_LIMIT};
pub use test_guest::watched;

/// Longest sleep between looks at what is held.
const TICK: Duration = Duration::from_millis(5);
/// Time for the server to say hello.
const HELLO_LIMIT: Duration = Duration::from_secs(10);
/// Time for the server to take leave.
const GOODBYE_LIMIT: Duration = Duration::from_secs(30);
/// Time for the server to answer what it was asked, in which it speaks.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// Most pages that are asked for with one request, but for some that ask for as many as can be.
const RUN: u32 = 8;
/// How many those are. They take long, so that much happens to their slots meanwhile.
const LONG_RUN: f64 = 0.1;
/// How many pages are given up as soon as they are lent.
const AT_ONCE: f64 = 0.125;
/// Held pages that are read again at each look.
const READS: u32 = 4;

/// What a peer does.
#[derive(Clone, Copy, Debug)]
pub struct ClientConfig {
    /// How long.
    pub duration: Duration,
    /// Most pages held or asked for at a time.
    pub pages: usize,
    /// Time after which a page is given up, on average, if nobody asks for it before.
    pub hold: Duration,
    /// Of the random choices.
    pub seed: u64,
    /// Answer nothing any more from this invalidation on, but keep the mapping: a bad peer.
    pub hang_after: Option<u64>,
}

/// How a peer fared.
#[derive(Clone, Debug)]
pub struct ClientReport {
    /// Time from hello to the end.
    pub elapsed: Duration,
    /// What it did and found.
    pub findings: Findings,
    /// Why the server closed the connection; `None` if the peer left.
    pub closed: Option<Closing>,
}

/// A peer that could not do its work.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody is there.
    #[error("{}: cannot connect: {source}; start gnomon stress with --export-socket and this path first", .path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The server does not want this peer.
    #[error("the server does not serve this peer: {0}")]
    Refused(Closing),
    /// Something else is at the other end.
    #[error(
        "what is at the other end is no server of guest pages of this version: name the socket of a \
         gnomon stress --export-socket of the same version"
    )]
    NotAServer,
    /// The server says something that is no message.
    #[error("the server broke the protocol: {0}; start both from the same version of gnomon")]
    Garbled(#[from] NotAMessage),
    /// The server is gone without a word.
    #[error(
        "the server is gone: the connection ended without a word; see what its process has said"
    )]
    Vanished,
    /// The socket or the file failed.
    #[error("cannot {what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

fn failed(what: &'static str) -> impl Fn(io::Error) -> ClientError {
    move |source| ClientError::Io { what, source }
}

/// A connected peer.
pub struct Client {
    socket: UnixStream,
    reader: ReplyReader,
    slots: Slots,
    /// Pages of each memory object, once the server has told.
    objects: Vec<Option<u64>>,
    /// A slot that was given up and is to be asked for again at once.
    again: Option<u32>,
    last_turn: Instant,
    random: StdRng,
    config: ClientConfig,
    heard: u64,
    is_hanging: bool,
    /// Nothing more is asked for.
    is_finishing: bool,
    /// It has said good-bye.
    is_leaving: bool,
}

impl Client {
    /// Connects and waits for the server's hello.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn connect(path: &Path, config: ClientConfig) -> Result<Self, ClientError> {
        let socket = UnixStream::connect(path)
            .map_err(|source| ClientError::Connect { path: path.to_owned(), source })?;
        Self::on(socket, config)
    }

    /// As [`connect`](Self::connect), on a socket that is connected.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn on(socket: UnixStream, config: ClientConfig) -> Result<Self, ClientError> {
        let mut hello = [0; MESSAGE_BYTES];
        let received = wait_for_hello(&socket, &mut hello);
        let (count, file) = received.map_err(failed("receive the server's hello"))?;
        if count == 0 {
            return Err(ClientError::Vanished);
        }
        let mut reader = ReplyReader::default();
        reader.push(&hello[..count]);
        let (slots, objects) = match reader.take() {
            Ok(Some(Reply::Hello { slots, objects, .. })) => (slots, objects),
            Ok(Some(Reply::Closed { why })) => return Err(ClientError::Refused(why)),
            _ => return Err(ClientError::NotAServer),
        };
        let is_sane = (1..=MAX_NAMED_SLOTS).contains(&(slots as usize)) && objects <= 4096;
        let file = file.filter(|_| is_sane).ok_or(ClientError::NotAServer)?;
        let region = map(file, slots)?;
        socket.set_nonblocking(true).map_err(failed("set up the socket"))?;
        Ok(Self {
            socket,
            reader,
            slots: Slots::new(slots, region),
            objects: vec![None; objects as usize],
            again: None,
            last_turn: Instant::now(),
            random: StdRng::seed_from_u64(config.seed),
            config,
            heard: 0,
            is_hanging: false,
            is_finishing: false,
            is_leaving: false,
        })
    }

    /// Works until its time is over, the server closes the connection, or `is_over` says so.
    ///
    /// # Errors
    /// [`ClientError`]; what was found until then is lost.
    pub fn run(mut self, is_over: impl Fn() -> bool) -> Result<ClientReport, ClientError> {
        let begun = Instant::now();
        let mut closed = None;
        while closed.is_none() {
            if self.is_hanging || (begun.elapsed() < self.config.duration && !is_over()) {
                closed = self.turn()?;
                continue;
            }
            closed = self.finish(&is_over)?;
            if closed.is_none() {
                self.leave()?;
                break;
            }
        }
        if let Some(why) = closed {
            self.slots.closed(why);
        }
        let elapsed = begun.elapsed();
        Ok(ClientReport { elapsed, findings: self.slots.findings, closed })
    }

    /// Asks for nothing more, and waits for the answers to all that was.
    fn finish(&mut self, is_over: impl Fn() -> bool) -> Result<Option<Closing>, ClientError> {
        self.is_finishing = true;
        let begun = self.slots.lived();
        let mut patience = Patience::new(GOODBYE_LIMIT);
        while self.slots.unanswered() > 0 && !is_over() && patience.slice().is_some() {
            if let Some(why) = self.turn()? {
                return Ok(Some(why));
            }
            if self.slots.lived() - begun >= ANSWER_LIMIT {
                self.slots.never_answered();
                break;
            }
        }
        Ok(None)
    }

    /// Says good-bye and waits until the server has taken everything back.
    fn leave(&mut self) -> Result<(), ClientError> {
        self.send(Request::Bye)?;
        self.is_leaving = true;
        let mut patience = Patience::new(GOODBYE_LIMIT);
        while patience.slice().is_some() {
            if let Some(why) = self.turn()? {
                self.slots.closed(why);
                return Ok(());
            }
            if signal::is_patience_over() {
                // It has to go without a good-bye.
                return Ok(());
            }
        }
        Err(ClientError::Vanished)
    }

    /// Listens, then acts.
    fn turn(&mut self) -> Result<Option<Closing>, ClientError> {
        let mut watched = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(TICK).unwrap_or(PollTimeout::ZERO);
        // An interrupted poll is as good as one that returned.
        let _ = poll(&mut watched, timeout);
        let mut bytes = [0; 4096];
        match (&self.socket).read(&mut bytes) {
            Ok(0) => return Err(ClientError::Vanished),
            Ok(count) => self.reader.push(&bytes[..count]),
            Err(error)
                if [ErrorKind::WouldBlock, ErrorKind::Interrupted].contains(&error.kind()) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {
                return Err(ClientError::Vanished);
            }
            Err(error) => return Err(failed("read the socket")(error)),
        }
        let now = Instant::now();
        let passed = now - std::mem::replace(&mut self.last_turn, now);
        let mut has_heard = false;
        while let Some(reply) = self.reader.take()? {
            has_heard = true;
            if let Some(why) = self.hear(reply)? {
                return Ok(Some(why));
            }
        }
        self.slots.tick(passed, has_heard);
        if !self.is_hanging && !self.is_finishing {
            self.act()?;
        }
        Ok(None)
    }

    fn hear(&mut self, reply: Reply) -> Result<Option<Closing>, ClientError> {
        match reply {
            Reply::Closed { why } => return Ok(Some(why)),
            _ if self.is_hanging || self.is_leaving => {}
            Reply::Hello { .. } => return Err(ClientError::NotAServer),
            Reply::Info { object, pages } => {
                if let Some(known) = self.objects.get_mut(object as usize) {
                    *known = Some(pages);
                }
            }
            Reply::Note { object, note } => self.slots.guest.noted(object, note),
            Reply::Mapped { slot, object, gfn } => {
                let hold = match self.random.random_bool(AT_ONCE) {
                    true => Duration::ZERO,
                    false => self.config.hold.mul_f64(self.random.random_range(0.5..1.5)),
                };
                self.slots.mapped(slot, (object, gfn), hold);
            }
            Reply::Refused { slot, gfn, why } => self.slots.refused(slot, gfn, why),
            Reply::Invalidate { sequence, slots } => {
                self.heard += 1;
                if self.config.hang_after.is_some_and(|after| self.heard > after) {
                    self.is_hanging = true;
                    return Ok(None);
                }
                self.slots.invalidated(sequence, &slots);
                self.send(Request::Ack { sequence })?;
                self.slots.findings.acknowledged += 1;
            }
            Reply::Freed { sequence } => self.slots.freed(sequence),
            Reply::Unmapped { slot } => {
                self.slots.unmapped(slot);
                self.again = Some(slot);
            }
        }
        Ok(None)
    }

    /// Gives up what is behind its time, reads some of what is held, and asks for more.
    fn act(&mut self) -> Result<(), ClientError> {
        for slot in self.slots.expire(Instant::now()) {
            self.send(Request::Unmap { slot, count: 1 })?;
        }
        for _ in 0..READS {
            if let Some((slot, ..)) = self.slots.any_held(&mut self.random) {
                self.slots.verify(slot);
            }
        }
        // A slot that has just been given up, with the request that lent it maybe still under way.
        if self.slots.unanswered() < MAX_REQUESTS
            && let Some(slot) = self.again.take().filter(|&slot| self.slots.is_free(slot))
        {
            self.ask(slot, 1)?;
        }
        while self.slots.unanswered() < MAX_REQUESTS {
            let most = match self.random.random_bool(LONG_RUN) {
                true => MAX_MAP_PAGES,
                false => self.random.random_range(1..=RUN),
            };
            let run = self.slots.free_run(self.config.pages, most);
            let Some((slot, count)) = run else { return Ok(()) };
            if !self.ask(slot, count)? {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Asks for pages into free slots; `false` if there is none to ask for.
    fn ask(&mut self, slot: u32, count: u32) -> Result<bool, ClientError> {
        let Some((object, first, count)) = self.choose(count) else { return Ok(false) };
        self.slots.asked(slot, object, first, count);
        self.send(Request::Map { object, first, count, slot })?;
        Ok(true)
    }

    /// Pages to ask for: often one that is held already, otherwise any that the oracle watches.
    fn choose(&mut self, count: u32) -> Option<(u32, Gfn, u32)> {
        if self.random.random_bool(0.25)
            && let Some((_, object, gfn)) = self.slots.any_held(&mut self.random)
        {
            return Some((object, gfn, 1));
        }
        let wanted: Vec<(u32, Range<u64>)> = (0..)
            .zip(&self.objects)
            .filter_map(|(number, &pages)| Some((number, self.slots.guest.wanted(number, pages?))))
            .filter(|(_, pages)| !pages.is_empty())
            .collect();
        if wanted.is_empty() {
            return None;
        }
        let (number, pages) = &wanted[self.random.random_range(0..wanted.len())];
        let first = self.random.random_range(pages.clone());
        let inside = u32::try_from(pages.end - first).unwrap_or(u32::MAX);
        Some((*number, Gfn::new(first), count.min(inside)))
    }

    /// Sends a message; waits for room, for what is waited for is little.
    fn send(&self, request: Request) -> Result<(), ClientError> {
        let mut bytes = &request.bytes()[..];
        while !bytes.is_empty() {
            match (&self.socket).write(bytes) {
                Ok(count) => bytes = &bytes[count..],
                // To a server that has stopped to read nothing is said at the end.
                Err(error)
                    if error.kind() == ErrorKind::WouldBlock && signal::is_patience_over() =>
                {
                    return Ok(());
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    let mut watched = [PollFd::new(self.socket.as_fd(), PollFlags::POLLOUT)];
                    let _ = poll(&mut watched, PollTimeout::from(100u16));
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // Closed: what the server said before tells why.
                Err(error) if error.kind() == ErrorKind::BrokenPipe => return Ok(()),
                Err(error) => return Err(failed("write to the socket")(error)),
            }
        }
        Ok(())
    }
}

/// Receives the first bytes that the server sends, and the file with them.
fn wait_for_hello(socket: &UnixStream, hello: &mut [u8]) -> io::Result<(usize, Option<File>)> {
    let mut patience = Patience::new(HELLO_LIMIT);
    let late = || io::Error::new(ErrorKind::TimedOut, "nothing came in 10 s");
    loop {
        let slice = patience.slice().ok_or_else(late)?;
        socket.set_read_timeout(Some(slice))?;
        match socket::receive_with_file(socket, hello) {
            Err(error)
                if [ErrorKind::WouldBlock, ErrorKind::Interrupted].contains(&error.kind()) => {}
            received => return received,
        }
    }
}

/// Maps the file that pages are lent in.
fn map(file: File, slots: u32) -> Result<MmapRegion, ClientError> {
    let bytes = slots as usize * PAGE_SIZE;
    let long_enough = file.metadata().is_ok_and(|metadata| metadata.len() >= bytes as u64);
    if !long_enough {
        return Err(ClientError::NotAServer);
    }
    small_pages::map(file, bytes as u64).map_err(failed("map the file of lent pages"))
}
