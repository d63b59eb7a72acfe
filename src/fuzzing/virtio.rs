//! Any registers, rings and buffers, while the host takes pages away, on a disk and on a balloon.
//!
//! Checked, besides that nothing panics: no transfer leaves the disk, none writes one that is
//! read-only; a device that needs a reset says why; whatever came before, a driver that begins anew is
//! served, with the data that a naive disk has, or with those pages zero that are wholly in what it
//! gave up, and no other; invariants I3 and I6; and everything is given back in the end.
//!
//! An input makes no system call: the frames are mapped once for all inputs, swap is memory, and the
//! device works when it is told to instead of on a thread.

use std::cell::Cell;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use super::{Bytes, number, one_of};
use crate::addr::{Gpa, PAGE_SIZE, PAGE_SIZE_U64, Pfn};
use crate::host_mm::{
    FrameMemory, HostMm, HostMmConfig, MIN_HOST_MEMORY_BYTES, MemoryObject, SwapConfig,
};
use crate::iotlb::Iotlb;
use crate::sync::lock;
use crate::virtio::{Balloon, Block, Disk, DiskMode, Interrupt, MmioTransport};

const MAX_STEPS: usize = 100;
const FRAMES: u32 = 32;
const RAM_PAGES: u64 = 48;
/// Rings of queue `n` are in page `RINGS + n`.
const RINGS: u64 = 1;
const AVAILABLE: u64 = 0x400;
const USED: u64 = 0x800;
/// Page for what is no data of a sound request, and first page of its data.
const SMALL: u64 = 8;
const DATA: u64 = 16;
const DATA_PAGES: u64 = 8;
const SECTORS: u64 = 40;
const MAX_QUEUE: usize = 5;
const NEEDS_RESET: u32 = 64;

thread_local! {
    static MEMORY: Cell<Option<FrameMemory>> = const { Cell::new(None) };
}

pub(super) fn run(data: &[u8]) {
    let mut bytes = Bytes::new(data);
    let memory = MEMORY.take().unwrap_or_else(|| FrameMemory::new(FRAMES).expect("frames"));
    let swap = SwapConfig { path: None, dir: None, bytes: 1 << 20 };
    let choice: u8 = number(&mut bytes);
    let share_zero = choice & 4 != 0;
    let config = HostMmConfig {
        swap,
        check_evictions: true,
        share_zero,
        ..HostMmConfig::new(MIN_HOST_MEMORY_BYTES)
    };
    let mm = HostMm::on_memory(config, &memory).expect("host memory");
    let object = mm.create_object(RAM_PAGES * PAGE_SIZE_U64).expect("guest memory");
    let mut case = Case::new(&mm, &object, &memory, choice);
    for _ in 0..MAX_STEPS {
        if bytes.is_empty() {
            break;
        }
        case.step(&mut bytes);
    }
    case.sound(&mut bytes);
    assert_eq!(case.transport.check_reverse_map(), Vec::<String>::new());
    assert_eq!(mm.violations().1, 0, "{:?}", mm.violations().0);
    drop(case);
    drop(object);
    let stats = mm.stats();
    assert!(stats.swap_slots_used == 0 || share_zero, "{stats:?}");
    // The shared pages of zeros stay.
    assert!(stats.frames_in_use == 0 || share_zero, "{stats:?}");
    (0..FRAMES).for_each(|raw| memory.poison(Pfn::new(raw)).expect("a frame"));
    MEMORY.set(Some(memory));
}

/// A disk that knows its bounds.
#[derive(Clone)]
struct Sectors {
    content: Arc<Mutex<Vec<u8>>>,
    mode: DiskMode,
}

impl Sectors {
    fn range(&self, len: usize, offset: u64) -> std::ops::Range<usize> {
        let offset = usize::try_from(offset).expect("an offset");
        let end = offset + len;
        assert!(
            end <= lock(&self.content).len(),
            "bytes {offset} to {end} are no part of the disk"
        );
        offset..end
    }
}

impl FileExt for Sectors {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let range = self.range(buf.len(), offset);
        buf.copy_from_slice(&lock(&self.content)[range]);
        Ok(buf.len())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize> {
        assert_eq!(self.mode, DiskMode::ReadWrite, "a write to a disk that is read-only");
        let range = self.range(buf.len(), offset);
        lock(&self.content)[range].copy_from_slice(buf);
        Ok(buf.len())
    }
}

impl Disk for Sectors {
    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

struct NoLine;

impl Interrupt for NoLine {
    fn trigger(&self) -> io::Result<()> {
        Ok(())
    }
}

struct Case<'a> {
    mm: &'a HostMm,
    object: &'a MemoryObject,
    transport: MmioTransport,
    /// `None` for a balloon.
    disk: Option<Sectors>,
    size: u16,
    available: [u16; MAX_QUEUE],
    descriptors: u16,
}

impl<'a> Case<'a> {
    fn new(
        mm: &'a HostMm,
        object: &'a Arc<MemoryObject>,
        memory: &FrameMemory,
        choice: u8,
    ) -> Self {
        let iotlb = Iotlb::with_view(object.clone(), 4, memory.guest_view()).expect("a client");
        let line = Arc::new(NoLine);
        let mode = if choice & 2 == 0 { DiskMode::ReadWrite } else { DiskMode::ReadOnly };
        let len = usize::try_from(SECTORS * 512).expect("a size");
        let disk = Sectors { content: Arc::new(Mutex::new(vec![0x11; len])), mode };
        let (transport, disk) = if choice & 1 == 0 {
            let block = Block::on(Box::new(disk.clone()), len as u64, mode, "fuzzed");
            (MmioTransport::idle(Arc::new(block), iotlb, line), Some(disk))
        } else {
            let balloon = Balloon::new(object.clone());
            (MmioTransport::idle(Arc::new(balloon), iotlb, line), None)
        };
        let mut this = Self {
            mm,
            object,
            transport,
            disk,
            size: 8,
            available: [0; MAX_QUEUE],
            descriptors: 0,
        };
        this.begin(8, u64::MAX);
        this
    }

    fn set(&self, register: u64, value: u32) {
        self.transport.write(register, &value.to_le_bytes());
    }

    fn get(&self, register: u64) -> u32 {
        let mut word = [0; 4];
        self.transport.read(register, &mut word);
        u32::from_le_bytes(word)
    }

    fn write(&self, gpa: u64, bytes: &[u8]) {
        self.object.write(Gpa::new(gpa), bytes).expect("guest memory");
    }

    fn read(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.object.read(Gpa::new(gpa), &mut bytes).expect("guest memory");
        bytes
    }

    fn work_off(&self) {
        self.transport.work_off();
        let says_why = self.transport.failure().is_some_and(|why| !why.is_empty());
        assert!(
            self.get(0x70) & NEEDS_RESET == 0 || says_why,
            "it needs a reset, and says nothing"
        );
    }

    /// From a reset to a driven device with empty rings, with those of the features that it offers.
    fn begin(&mut self, size: u16, features: u64) {
        self.set(0x70, 0);
        assert_eq!(self.get(0x70), 0);
        self.set(0x70, 3);
        for word in [0, 1] {
            self.set(0x14, word);
            self.set(0x24, word);
            let asked = u32::try_from(features >> (32 * word) & u64::from(u32::MAX));
            // VIRTIO_F_VERSION_1 is the lowest of the second word.
            self.set(0x20, self.get(0x10) & (asked.expect("a word") | word));
        }
        self.set(0x70, 11);
        for queue in 0..self.queues() {
            let base = (RINGS + queue as u64) * PAGE_SIZE_U64;
            self.write(base, &[0; PAGE_SIZE]);
            self.set(0x30, u32::try_from(queue).expect("a queue"));
            self.set(0x38, size.into());
            for (register, part) in [(0x80, 0), (0x90, AVAILABLE), (0xa0, USED)] {
                self.set(register, u32::try_from(base + part).expect("an address"));
                self.set(register + 4, 0);
            }
            self.set(0x44, 1);
        }
        self.set(0x70, 15);
        assert_eq!(self.get(0x70), 15);
        (self.size, self.available, self.descriptors) = (size, [0; MAX_QUEUE], 0);
    }

    fn queues(&self) -> usize {
        if self.disk.is_some() { 1 } else { MAX_QUEUE }
    }

    fn describe(&self, queue: usize, index: u16, fields: (u64, u32, u16, u16)) {
        let mut bytes = fields.0.to_le_bytes().to_vec();
        bytes.extend_from_slice(&fields.1.to_le_bytes());
        bytes.extend_from_slice(&fields.2.to_le_bytes());
        bytes.extend_from_slice(&fields.3.to_le_bytes());
        let base = (RINGS + queue as u64) * PAGE_SIZE_U64;
        self.write(base + 16 * u64::from(index % self.size), &bytes);
    }

    fn offer(&mut self, queue: usize, head: u16) {
        let base = (RINGS + queue as u64) * PAGE_SIZE_U64 + AVAILABLE;
        let index = &mut self.available[queue];
        let entry = base + 4 + 2 * u64::from(*index % self.size);
        *index = index.wrapping_add(1);
        let index = *index;
        self.write(entry, &head.to_le_bytes());
        self.write(base + 2, &index.to_le_bytes());
    }

    fn step(&mut self, bytes: &mut Bytes<'_>) {
        let queue = usize::from(number::<u8>(bytes)) % self.queues();
        match number::<u8>(bytes) % 14 {
            0 => {
                let (offset, len) = any_access(bytes);
                let value: u64 = number(bytes);
                self.transport.write(offset, &value.to_le_bytes()[..len]);
            }
            1 => {
                let (offset, len) = any_access(bytes);
                self.transport.read(offset, &mut [0; 8][..len]);
            }
            2 => {
                let features = one_of(bytes, &[u64::MAX, 0, 1 << 29, !(1 << 29)]);
                self.begin(one_of(bytes, &[8, 16, 4, 2, 1]), features);
            }
            3..=5 => {
                let index = number::<u8>(bytes) % 16;
                let fields = (any_gpa(bytes), any_len(bytes), any_flags(bytes), any_next(bytes));
                self.describe(queue, index.into(), fields);
            }
            6 | 7 => {
                let head = any_next(bytes);
                self.offer(queue, head);
            }
            8 => {
                let claim = (RINGS + queue as u64) * PAGE_SIZE_U64 + AVAILABLE + 2;
                self.write(claim, &number::<u16>(bytes).to_le_bytes());
            }
            9 | 10 => {
                self.set(0x50, u32::try_from(queue).expect("a queue"));
                self.work_off();
            }
            11 => self.take_pages(bytes),
            12 => {
                let gpa = any_gpa(bytes) % (RAM_PAGES * PAGE_SIZE_U64 - 8);
                self.write(gpa, &number::<u64>(bytes).to_le_bytes());
            }
            _ => self.sound(bytes),
        }
    }

    fn take_pages(&self, bytes: &mut Bytes<'_>) {
        let first = number::<u8>(bytes);
        let frames: Vec<Pfn> =
            (0..FRAMES).filter(|raw| raw % 8 != u32::from(first % 9)).map(Pfn::new).collect();
        if first & 0x80 == 0 {
            self.mm.evict_frames(&frames).expect("an eviction");
        } else {
            self.mm.clean_frames(&frames).expect("a cleaning");
        }
    }

    /// A driver that keeps to the rules finds what it must.
    fn sound(&mut self, bytes: &mut Bytes<'_>) {
        self.begin(8, u64::MAX);
        for page in DATA..DATA + DATA_PAGES {
            self.write(page * PAGE_SIZE_U64, &[u8::try_from(page).expect("a page"); PAGE_SIZE]);
        }
        if let Some(disk) = self.disk.clone() {
            self.sound_transfer(&disk, bytes);
        } else {
            self.sound_surrender(bytes);
        }
    }

    /// Has one buffer served.
    fn serve(&mut self, queue: usize, pieces: &[(u64, u32, bool)], bytes: &mut Bytes<'_>) {
        for (index, &(gpa, len, is_written)) in (0..).zip(pieces) {
            let is_last = usize::from(index) + 1 == pieces.len();
            let flags = u16::from(!is_last) | u16::from(is_written) << 1;
            self.describe(queue, index, (gpa, len, flags, index + 1));
        }
        self.offer(queue, 0);
        self.take_pages(bytes);
        self.set(0x50, u32::try_from(queue).expect("a queue"));
        self.work_off();
        let used = (RINGS + queue as u64) * PAGE_SIZE_U64 + USED;
        assert_eq!(self.read(used + 2, 2), [1, 0], "it came back: {:?}", self.transport.failure());
        assert_eq!(self.get(0x70), 15);
    }

    fn sound_transfer(&mut self, disk: &Sectors, bytes: &mut Bytes<'_>) {
        let sector = u64::from(number::<u8>(bytes)) % (SECTORS + 4);
        let sectors = u64::from(number::<u8>(bytes)) % 48;
        let is_write = number::<u8>(bytes) & 1 != 0;
        let start = DATA * PAGE_SIZE_U64 + u64::from(number::<u8>(bytes));
        let len = u32::try_from(sectors * 512).expect("a size");
        let cut = u32::from(number::<u16>(bytes)).min(len);
        let (header, status) = (SMALL * PAGE_SIZE_U64 + 8, SMALL * PAGE_SIZE_U64 + 100);
        let mut words = u32::from(is_write).to_le_bytes().to_vec();
        words.extend_from_slice(&[0; 4]);
        words.extend_from_slice(&sector.to_le_bytes());
        self.write(header, &words);
        self.write(status, &[0xff]);
        let whole = usize::try_from(len).expect("a size");
        let memory = self.read(start, whole);
        let before = lock(&disk.content).clone();
        let second = (start + u64::from(cut), len - cut, !is_write);
        let pieces = [(header, 16, false), (start, cut, !is_write), second, (status, 1, true)];
        self.serve(0, &pieces, bytes);
        let fits = sector + sectors <= SECTORS && !(is_write && disk.mode == DiskMode::ReadOnly);
        assert_eq!(self.read(status, 1), [u8::from(!fits)], "sector {sector}, {sectors} sectors");
        let at = usize::try_from(sector * 512).expect("an offset");
        let (mut expected, mut in_memory) = (before.clone(), memory.clone());
        match (fits, is_write) {
            (true, true) => expected[at..at + whole].copy_from_slice(&memory),
            (true, false) => in_memory.copy_from_slice(&before[at..at + whole]),
            (false, _) => {}
        }
        assert!(*lock(&disk.content) == expected, "the disk is not what it must be");
        assert!(self.read(start, whole) == in_memory, "memory is not what it must be");
    }

    fn sound_surrender(&mut self, bytes: &mut Bytes<'_>) {
        let mut gone = [false; 8];
        assert_eq!(gone.len() as u64, DATA_PAGES);
        if number::<u8>(bytes) & 1 != 0 {
            let start = u64::from(number::<u16>(bytes)) % (DATA_PAGES * PAGE_SIZE_U64);
            let len = u64::from(number::<u16>(bytes)).min(DATA_PAGES * PAGE_SIZE_U64 - start);
            for (page, is_gone) in (0..).zip(&mut gone) {
                let from = page * PAGE_SIZE_U64;
                *is_gone = from >= start && from + PAGE_SIZE_U64 <= start + len;
            }
            let gpa = DATA * PAGE_SIZE_U64 + start;
            let queue = one_of(bytes, &[2, 4]);
            self.serve(queue, &[(gpa, u32::try_from(len).expect("a length"), true)], bytes);
        } else {
            let mut numbers = Vec::new();
            for _ in 0..number::<u8>(bytes) % 8 {
                let page = u64::from(number::<u8>(bytes)) % DATA_PAGES;
                gone[usize::try_from(page).expect("a page")] = true;
                numbers
                    .extend_from_slice(&u32::try_from(DATA + page).expect("a page").to_le_bytes());
            }
            let list = SMALL * PAGE_SIZE_U64 + 3;
            self.write(list, &numbers);
            let len = u32::try_from(numbers.len()).expect("a length");
            self.serve(0, &[(list, len, false)], bytes);
        }
        for (page, is_gone) in (DATA..).zip(gone) {
            let byte = if is_gone { 0 } else { u8::try_from(page).expect("a page") };
            let content = self.read(page * PAGE_SIZE_U64, PAGE_SIZE);
            // In one step, which the fuzzer's instruments do not slow down.
            assert!(content == [byte; PAGE_SIZE], "page {page}, gone: {is_gone}");
        }
    }
}

// Choices.

fn any_access(bytes: &mut Bytes<'_>) -> (u64, usize) {
    let offset = match number::<u8>(bytes) % 4 {
        0..=2 => u64::from(number::<u8>(bytes)) * 4,
        _ => number(bytes),
    };
    (offset, one_of(bytes, &[4, 4, 4, 1, 2, 8, 0]))
}

fn any_gpa(bytes: &mut Bytes<'_>) -> u64 {
    let page = u64::from(number::<u8>(bytes));
    match page {
        0..=0xef => page % (RAM_PAGES + 2) * PAGE_SIZE_U64 + u64::from(number::<u8>(bytes)) * 16,
        _ => number(bytes),
    }
}

fn any_len(bytes: &mut Bytes<'_>) -> u32 {
    let kind: u8 = number(bytes);
    match kind % 8 {
        0 | 1 => 16,
        2 => 1,
        3 | 4 => 512 * u32::from(kind >> 3),
        5 => kind.into(),
        6 => number::<u16>(bytes).into(),
        _ => number(bytes),
    }
}

fn any_flags(bytes: &mut Bytes<'_>) -> u16 {
    let flags: u8 = number(bytes);
    // Mostly the two that are usual.
    (flags & if flags & 0xe0 == 0 { 0x1f } else { 3 }).into()
}

fn any_next(bytes: &mut Bytes<'_>) -> u16 {
    let next: u8 = number(bytes);
    if next >= 0xf8 { number(bytes) } else { (next % 18).into() }
}
