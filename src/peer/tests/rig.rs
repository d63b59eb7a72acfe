//! A guest's memory that is served to peers, without a guest: the test writes its pages.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

use crate::addr::{Gfn, PAGE_SIZE, PAGE_SIZE_U64, Pfn};
use crate::host_mm::{
    HostFault, HostMm, HostMmConfig, Injection, InjectionPlan, MIN_HOST_MEMORY_BYTES, MemoryObject,
    Sabotage, SwapConfig, When,
};
use crate::page_format::{BODY, NUMBER_BITS, WORDS};
use crate::peer::client::watched;
use crate::peer::protocol::{MESSAGE_BYTES, Reply, ReplyReader, Request};
use crate::peer::session::Clock;
use crate::peer::{PeerServer, ServerConfig};
use crate::sync::lock;
use crate::sys::socket;

pub(super) const PAGES: u64 = 256;
pub(super) const SLOTS: u32 = 64;
/// Longest time for what must happen.
const PATIENCE: Duration = Duration::from_secs(60);

pub(super) struct Rig {
    pub(super) mm: Arc<HostMm>,
    pub(super) object: Arc<MemoryObject>,
    pub(super) server: PeerServer,
    /// What was told of peers that were cut off.
    pub(super) told: Arc<Mutex<Vec<String>>>,
}

impl Rig {
    pub(super) fn new(limit: Duration) -> Self {
        Self::with(limit, None, None)
    }

    pub(super) fn with(
        limit: Duration,
        sabotage: Option<Sabotage>,
        inject: Option<(HostFault, When)>,
    ) -> Self {
        Self::with_clock(limit, sabotage, inject, Box::new(Instant::now))
    }

    pub(super) fn with_clock(
        limit: Duration,
        sabotage: Option<Sabotage>,
        inject: Option<(HostFault, When)>,
        clock: Clock,
    ) -> Self {
        let items = inject.map(|(fault, when)| Injection { fault, when }).into_iter().collect();
        let mm = HostMm::new(HostMmConfig {
            swap: SwapConfig { path: None, dir: None, bytes: 64 << 20 },
            sabotage,
            inject: InjectionPlan { items, seed: 1 },
            check_evictions: true,
            ..HostMmConfig::new(MIN_HOST_MEMORY_BYTES)
        })
        .unwrap();
        let object = mm.create_object(PAGES * PAGE_SIZE_U64).unwrap();
        let told: Arc<Mutex<Vec<String>>> = Arc::default();
        let heard = told.clone();
        let server = PeerServer::without_socket(
            &mm,
            vec![object.clone()],
            ServerConfig { slots: SLOTS, limit },
            Box::new(move |sentence| lock(&heard).push(sentence.to_owned())),
            clock,
        )
        .unwrap();
        server.note(0, watched(Gfn::new(0), PAGES));
        Self { mm, object, server, told }
    }

    /// The other end of a connection to the server.
    pub(super) fn connect(&self) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        self.server.hand_over(theirs);
        ours
    }

    pub(super) fn raw(&self) -> RawPeer {
        let mut peer = RawPeer::on(self.connect());
        let note = watched(Gfn::new(0), PAGES);
        assert_eq!(peer.hear(), Some(Reply::Note { object: 0, note }));
        peer
    }

    /// Writes a page as the guest's oracle does.
    pub(super) fn write(&self, gfn: u64, version: u64) {
        self.object.write(Gfn::new(gfn).base(), &content(gfn, version)).unwrap();
    }

    pub(super) fn read(&self, gfn: u64) -> [u8; PAGE_SIZE] {
        let mut page = [0; PAGE_SIZE];
        self.object.read(Gfn::new(gfn).base(), &mut page).unwrap();
        page
    }

    pub(super) fn frames(&self) -> Vec<Pfn> {
        (0..self.mm.frame_count()).map(Pfn::new).collect()
    }

    /// Number of mappings that anybody has of any frame.
    pub(super) fn exported(&self) -> usize {
        let table = self.mm.frame_table();
        self.frames().into_iter().map(|pfn| table.rmap_entries(pfn).len()).sum()
    }

    pub(super) fn wait_for(&self, what: &str, is_so: impl Fn(&Self) -> bool) {
        let begun = Instant::now();
        while !is_so(self) {
            assert!(begun.elapsed() < PATIENCE, "{what}: {:?}", self.server.stats());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The server is over: nothing is left, and none of the layer's own checks found anything.
    #[track_caller]
    pub(super) fn assert_sound(&self) {
        self.server.stop();
        assert_eq!(self.server.leftovers(), Vec::<String>::new());
        assert_eq!(self.exported(), 0);
        let (violations, count) = self.mm.violations();
        assert_eq!(count, 0, "{violations:?}");
    }
}

/// A page as the guest's oracle writes it.
pub(super) fn content(gfn: u64, version: u64) -> [u8; PAGE_SIZE] {
    let magic = 5 << NUMBER_BITS;
    let mut words = [version ^ gfn.rotate_left(17); WORDS];
    words[0] = magic | gfn;
    words[1] = version;
    words[2] = words[BODY..].iter().fold(magic, |sum, &word| sum.wrapping_add(word));
    let mut page = [0; PAGE_SIZE];
    for (chunk, word) in page.chunks_exact_mut(8).zip(words) {
        chunk.copy_from_slice(&word.to_le_bytes());
    }
    page
}

/// A peer that says what the test says.
pub(super) struct RawPeer {
    pub(super) socket: UnixStream,
    reader: ReplyReader,
    region: MmapRegion,
}

impl RawPeer {
    pub(super) fn on(socket: UnixStream) -> Self {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut hello = [0; MESSAGE_BYTES];
        let (count, file) = socket::receive_with_file(&socket, &mut hello).unwrap();
        let mut reader = ReplyReader::default();
        reader.push(&hello[..count]);
        let Some(Reply::Hello { slots, .. }) = reader.take().unwrap() else { panic!("no hello") };
        let bytes = slots as usize * PAGE_SIZE;
        let region = MmapRegion::from_file(FileOffset::new(file.unwrap(), 0), bytes).unwrap();
        let mut peer = Self { socket, reader, region };
        assert!(matches!(peer.hear(), Some(Reply::Info { .. })));
        peer
    }

    pub(super) fn say(&self, request: Request) {
        (&self.socket).write_all(&request.bytes()).unwrap();
    }

    /// The next message; `None` at the end of the connection.
    pub(super) fn hear(&mut self) -> Option<Reply> {
        loop {
            if let Some(reply) = self.reader.take().unwrap() {
                return Some(reply);
            }
            let mut bytes = [0; 4096];
            match (&self.socket).read(&mut bytes).expect("it does not hang") {
                0 => return None,
                count => self.reader.push(&bytes[..count]),
            }
        }
    }

    /// The next message about a page that is lent. What the lender has queued goes out with the next
    /// thing that is sent, so the peer asks for what is refused at once, until that has happened.
    pub(super) fn hear_prompted(&mut self) -> Reply {
        let nowhere = Gfn::new(1 << 40);
        loop {
            self.say(Request::Map { object: 0, first: nowhere, count: 1, slot: SLOTS - 1 });
            let mut lent = None;
            loop {
                match self.hear().expect("it is served") {
                    Reply::Refused { gfn, .. } if gfn == nowhere => break,
                    reply => assert!(lent.replace(reply).is_none(), "one message at most"),
                }
            }
            if let Some(reply) = lent {
                return reply;
            }
        }
    }

    /// The last message before the end of the connection.
    pub(super) fn hear_out(&mut self) -> Option<Reply> {
        std::iter::from_fn(|| self.hear()).last()
    }

    pub(super) fn map(&mut self, first: u64, count: u32, slot: u32) {
        self.say(Request::Map { object: 0, first: Gfn::new(first), count, slot });
        let mut mapped: Vec<u32> = (0..count)
            .map(|_| match self.hear() {
                Some(Reply::Mapped { slot, .. }) => slot,
                other => panic!("{other:?}"),
            })
            .collect();
        mapped.sort_unstable();
        assert_eq!(mapped, (slot..slot + count).collect::<Vec<u32>>());
    }

    pub(super) fn page(&self, slot: u32) -> [u8; PAGE_SIZE] {
        let mut page = [0; PAGE_SIZE];
        let memory = self.region.as_volatile_slice();
        memory.read_slice(&mut page, slot as usize * PAGE_SIZE).unwrap();
        page
    }
}
