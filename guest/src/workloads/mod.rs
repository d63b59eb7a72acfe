//! The workloads. Each goes on where its last slice ended, in an order that only the seed decides.

mod contested;
mod demand;
mod dma;
mod paging;
mod shared;

pub use paging::PagingBlock;

use crate::options::Workload;
use crate::pages::count;
use crate::permute::{Scramble, zipf_rank};
use crate::rng::Rng;
use crate::worker::Worker;
use dma::DmaChannel;
use paging::PagingState;
use shared::SharedState;

/// Accesses to the hot set for each page of the scan: what makes it hot.
const HOT_PER_STEP: u64 = 8;

/// Where one vCPU stands in each workload.
pub struct Workloads {
    rng: Rng,
    /// The VM's generation that the random choices are of.
    generation: u64,
    /// Next page of the sequential sweep.
    sweep: u64,
    /// Spreads Zipf's ranks over the pages.
    ranks: Scramble,
    /// Next page of the pointer chase.
    chase: u64,
    shared: SharedState,
    paging: PagingState,
    dma: DmaChannel,
    /// Owned pages in the hot set; they come first.
    hot: u64,
    /// Next page of the scan.
    scan: u64,
}

impl Workloads {
    /// The start of all workloads of a vCPU.
    pub fn new(worker: &Worker) -> Workloads {
        let seed = worker.machine.options.seed;
        let stream = u64::from(worker.vcpu.index);
        let generation = worker.machine.generation();
        let hot = worker.owned_before(worker.machine.hot_pages());
        Workloads {
            rng: Rng::of_generation(seed, stream, generation),
            generation,
            sweep: 0,
            ranks: Scramble::new(worker.owned, seed ^ !stream),
            chase: 0,
            shared: SharedState::new(),
            paging: PagingState::new(worker, Rng::of_generation(seed, !stream, generation)),
            dma: DmaChannel::new(),
            hot,
            scan: hot,
        }
    }

    /// Runs up to `operations` of a workload; fewer if the host wants the run to end.
    pub fn slice(&mut self, worker: &Worker, workload: Workload, operations: u64) {
        self.operations(worker, workload, operations);
        self.dma.finish(worker);
    }

    fn operations(&mut self, worker: &Worker, workload: Workload, operations: u64) {
        for _ in 0..operations {
            if worker.stop_asked() {
                return;
            }
            if worker.machine.generation() != self.generation {
                self.part_ways(worker);
            }
            match workload {
                Workload::Seq => {
                    let page = self.sweep;
                    self.sweep = (page + 1) % worker.owned;
                    self.touch(worker, page);
                }
                Workload::Random => {
                    let page = self.rng.below(worker.owned);
                    self.touch(worker, page);
                }
                Workload::Zipf => {
                    let rank = zipf_rank(&mut self.rng, worker.owned);
                    self.touch(worker, self.ranks.apply(rank));
                }
                Workload::Chase => self.chase = self.touch(worker, self.chase),
                Workload::Shared => self.shared.operation(worker, &mut self.rng),
                Workload::Paging => self.paging.operation(worker),
                Workload::Hotscan => self.hot_and_scan(worker),
            }
        }
    }

    /// After a clone: from here on all random choices are other ones, and each workload goes on at
    /// another place, so that a clone and its source do not do the same work.
    #[cold]
    fn part_ways(&mut self, worker: &Worker) {
        let seed = worker.machine.options.seed;
        let stream = u64::from(worker.vcpu.index);
        self.generation = worker.machine.generation();
        self.rng = Rng::of_generation(seed, stream, self.generation);
        self.paging.choose_anew(Rng::of_generation(seed, !stream, self.generation));
        self.sweep = self.rng.below(worker.owned);
        self.chase = self.rng.below(worker.owned);
        self.scan = self.hot + self.rng.below(worker.owned - self.hot);
    }

    /// Reads or writes an owned page, as the write percentage has it.
    /// Now and then it gives the page back before, or has the DMA device access it instead, if asked
    /// to. Returns the owned page that this one links to.
    fn touch(&mut self, worker: &Worker, page: u64) -> u64 {
        self.dma.before(worker, page);
        let dma = worker.machine.options.dma_percent;
        if dma != 0 && self.rng.percent(dma) {
            self.dma.begin(worker, &mut self.rng, page);
            return worker.id(page).link;
        }
        let free = worker.machine.options.free_percent;
        if free != 0 && self.rng.percent(free) {
            worker.free(page);
        }
        let write = self.rng.percent(worker.machine.options.write_percent);
        worker.access(page, write)
    }

    /// Accesses to the hot set in random order, then one step of the scan over the rest.
    fn hot_and_scan(&mut self, worker: &Worker) {
        if self.hot != 0 {
            for _ in 0..HOT_PER_STEP {
                let page = self.rng.below(self.hot);
                self.touch(worker, page);
            }
            count(&worker.counters.hot_accesses, HOT_PER_STEP);
        }
        if self.scan == worker.owned {
            self.scan = self.hot;
        }
        if self.scan < worker.owned {
            self.touch(worker, self.scan);
            self.scan += 1;
        }
    }
}
