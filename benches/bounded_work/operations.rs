//! What is measured.

use std::hint::black_box;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use gnomon::addr::{Gfn, Gva, PAGE_SIZE_U64, Pfn};
use gnomon::export_rmap::Owner;
use gnomon::iotlb::Iotlb;
use gnomon::peer::book::{Book, Event, Holding};
use gnomon::peer::protocol::Request;
use gnomon::shadow_mmu::Access;
use nix::time::{ClockId, clock_gettime};

use crate::guest::{Guest, host_memory};

/// Something of which there can be much.
pub(crate) struct Operation {
    pub(crate) what: &'static str,
    pub(crate) smallest: u64,
    /// How long it takes, for so many.
    pub(crate) run: fn(u64) -> Result<Duration>,
}

const fn operation(
    what: &'static str,
    smallest: u64,
    run: fn(u64) -> Result<Duration>,
) -> Operation {
    Operation { what, smallest, run }
}

pub(crate) const OPERATIONS: &[Operation] = &[
    operation("aliases of a page, CR3 load", 4096, aliases_flushed),
    operation("aliases of a page, eviction", 4096, aliases_evicted),
    operation("aliases of a page, end of the VM", 4096, aliases_ended),
    operation("pages of zeros, end of the VM", 2048, zeros_ended),
    operation("pages of zeros, a write to each", 2048, zeros_written),
    operation("large page, invlpg", 2048, large_page_flushed),
    operation("address spaces, each loaded twice and the end", 128, address_spaces),
    operation("IOTLB, pages accessed and the end", 2048, iotlb_entries),
    operation("peer's slots, lent, invalidated, acknowledged", 4096, peer_slots),
    operation("clones of clones, made, written, ended", 16, clones_of_clones),
    operation("64 GiB touched here and there, end", 1024, sparse_end),
];

/// Not a part of Gnomon: what the reverse map was.
pub(crate) const CHAIN: Operation = operation("(a chain, which must be told)", 512, chain);

const HOST_MEMORY: u64 = 16 << 20;

/// Time of a processor, not of a clock: what others do on the machine does not count. All that is
/// measured is done by the thread that asks for it.
fn timed(work: impl FnOnce() -> Result<()>) -> Result<Duration> {
    let start = processor_time()?;
    work()?;
    Ok(processor_time()?.saturating_sub(start))
}

fn processor_time() -> Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?.into())
}

fn aliases_flushed(count: u64) -> Result<Duration> {
    let mm = host_memory(HOST_MEMORY)?;
    let mut guest = Guest::of_aliases(&mm, count)?;
    guest.touch_groups(count)?;
    let context = guest.context;
    timed(|| guest.load(context))
}

fn aliases_evicted(count: u64) -> Result<Duration> {
    let mm = host_memory(HOST_MEMORY)?;
    let guest = Guest::of_aliases(&mm, count)?;
    guest.touch_groups(count)?;
    timed(|| guest.evict_data())
}

fn aliases_ended(count: u64) -> Result<Duration> {
    let mm = host_memory(HOST_MEMORY)?;
    let guest = Guest::of_aliases(&mm, count)?;
    guest.touch_groups(count)?;
    timed(move || {
        drop(guest);
        Ok(())
    })
}

fn zeros_ended(count: u64) -> Result<Duration> {
    let mm = host_memory(HOST_MEMORY)?;
    let guest = Guest::of_large_pages(&mm, count)?;
    guest.touch_all(count, Access::Read)?;
    timed(move || {
        drop(guest);
        Ok(())
    })
}

fn zeros_written(count: u64) -> Result<Duration> {
    let mm = host_memory(HOST_MEMORY.max(2 * count * PAGE_SIZE_U64))?;
    let guest = Guest::of_large_pages(&mm, count)?;
    guest.touch_all(count, Access::Read)?;
    timed(|| guest.touch_all(count, Access::Write))
}

fn large_page_flushed(count: u64) -> Result<Duration> {
    let mm = host_memory(HOST_MEMORY)?;
    let guest = Guest::of_large_pages(&mm, count)?;
    guest.touch_all(count, Access::Read)?;
    timed(|| {
        guest.shadow.invlpg(guest.root, Gva::new(0))?;
        ensure!(guest.shadow.stats().guest_flushed >= count, "not all was flushed");
        Ok(())
    })
}

fn address_spaces(count: u64) -> Result<Duration> {
    let mm = host_memory(64 << 20)?;
    let mut guest = Guest::of_address_spaces(&mm, count)?;
    timed(move || {
        for number in (0..count).chain(0..count) {
            guest.load(guest.address_space(number))?;
            guest.touch(number, Access::Read)?;
        }
        guest.shadow.recycle();
        Ok(())
    })
}

fn iotlb_entries(count: u64) -> Result<Duration> {
    const ENTRIES: usize = 64;
    let mm = host_memory(HOST_MEMORY)?;
    let object = mm.create_object(count * PAGE_SIZE_U64)?;
    let iotlb = Iotlb::new(object, ENTRIES)?;
    timed(|| {
        for gfn in (0..count).map(Gfn::new) {
            iotlb.read(gfn.base(), &mut [0; 8])?;
        }
        ensure!(iotlb.check_reverse_map().is_empty(), "I3");
        drop(iotlb);
        Ok(())
    })
}

/// As a session does, without a socket: a peer maps a page into each slot, the host takes all of them
/// in batches, and the peer acknowledges each.
fn peer_slots(count: u64) -> Result<Duration> {
    const BATCH: usize = 64;
    let slots = u32::try_from(count)?;
    let mut book = Book::new(slots, vec![count]);
    let hear = |book: &mut Book, request: &Request| -> Result<Event> {
        book.receive(&request.bytes());
        book.hear()?.context("no event")
    };
    timed(|| {
        let numbers: Vec<u32> = (0..slots).collect();
        for batch in numbers.chunks(BATCH) {
            let (first, length) = (batch[0], u32::try_from(batch.len())?);
            let gfn = Gfn::new(first.into());
            let map = Request::Map { object: 0, first: gfn, count: length, slot: first };
            hear(&mut book, &map)?;
            let job = book.take_job().context("no job")?;
            for &slot in batch {
                let owner = Owner { object: 0, gfn: Gfn::new(slot.into()) };
                ensure!(book.lend(job, Holding { owner, pfn: Pfn::new(slot) }), "not lent");
            }
            book.answer(job);
        }
        for batch in numbers.chunks(BATCH) {
            batch.iter().for_each(|&slot| book.drop_held(slot));
            let frames: Vec<Pfn> = batch.iter().copied().map(Pfn::new).collect();
            let (sequence, _) = book.announce(&frames, Instant::now()).context("nothing said")?;
            let Event::Acked(acked) = hear(&mut book, &Request::Ack { sequence })? else {
                anyhow::bail!("not acknowledged")
            };
            book.freed(&acked);
            book.sent_bytes(usize::MAX);
        }
        Ok(())
    })
}

fn clones_of_clones(count: u64) -> Result<Duration> {
    const PAGES: u64 = 64;
    let mm = host_memory(64 << 20)?;
    let first = mm.create_object(PAGES * PAGE_SIZE_U64)?;
    for gfn in (0..PAGES).map(Gfn::new) {
        first.write(gfn.base(), &[1])?;
    }
    timed(|| {
        let mut generation = vec![first];
        for number in 0..count {
            let last = generation.last().context("the first")?;
            let clone = last.copy_on_write_clone()?;
            clone.write(Gfn::new(number % PAGES).base(), &[2])?;
            generation.push(clone);
        }
        // The oldest first: what the others share outlives it.
        generation.into_iter().for_each(drop);
        Ok(())
    })
}

fn sparse_end(count: u64) -> Result<Duration> {
    const BYTES: u64 = 64 << 30;
    let mm = host_memory(HOST_MEMORY.max(2 * count * PAGE_SIZE_U64))?;
    let object = mm.create_object(BYTES)?;
    let stride = BYTES / PAGE_SIZE_U64 / count;
    for number in 0..count {
        object.write(Gfn::new(number * stride).base(), &[1])?;
    }
    timed(move || {
        drop(object);
        Ok(())
    })
}

/// Entries in a chain, of which each is removed by taking all out and putting the others back.
fn chain(count: u64) -> Result<Duration> {
    let mut chain: Vec<u64> = (0..count).collect();
    timed(|| {
        for removed in (0..count).rev() {
            let taken = std::mem::take(&mut chain);
            chain.extend(taken.into_iter().filter(|&entry| entry != removed));
            black_box(&chain);
        }
        Ok(())
    })
}
