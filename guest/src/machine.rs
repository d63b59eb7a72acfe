//! What all vCPUs share: the options, the page oracle's data, and the account of results.

use core::fmt;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::dma::DmaUnit;
use crate::options::Options;
use crate::oracle::Oracle;
use crate::pages::WorkSet;
use crate::paging::AddressSpace;
use crate::println;
use crate::shared::SharedArea;
use crate::vcpu::{Barrier, Vcpu};
use gnomon_abi::{Control, VcpuCounters};

/// Built once by the boot vCPU, then read by all.
pub struct Machine {
    /// The command line.
    pub options: Options,
    /// The control block in the pinned window.
    pub control: &'static Control,
    /// The page tables in use.
    pub space: AddressSpace,
    /// What pages must hold.
    pub oracle: Oracle,
    /// The work pages.
    pub work: WorkSet,
    /// The shared counters.
    pub shared: SharedArea,
    /// All vCPUs; index 0 is the boot vCPU.
    pub vcpus: &'static [Vcpu],
    /// What each vCPU drives the DMA device with.
    pub dma: &'static [DmaUnit],
    /// Where they meet.
    pub barrier: Barrier,
    /// Results so far.
    pub results: Results,
}

impl Machine {
    /// Whether the host wants the run to end.
    #[inline]
    pub fn stop_asked(&self) -> bool {
        self.control.stop.load(Ordering::Relaxed) != 0
    }

    /// Changes when this VM turns out to be a clone of the one that it was.
    #[inline]
    pub fn generation(&self) -> u64 {
        self.control.generation.load(Ordering::Relaxed)
    }

    /// Pages of the hot set: the first ones of the work set.
    pub fn hot_pages(&self) -> u64 {
        let pages = self.work.pages();
        self.options.hot.unwrap_or(pages / 8).clamp(1, pages)
    }

    /// The counters of all vCPUs, added up.
    pub fn totals(&self) -> Totals {
        let counters = &self.control.counters[..self.vcpus.len()];
        let sum = |field: fn(&VcpuCounters) -> &AtomicU64| {
            counters.iter().map(|c| field(c).load(Ordering::Relaxed)).sum()
        };
        Totals {
            verified: sum(|c| &c.verified),
            writes: sum(|c| &c.writes),
            shared_adds: sum(|c| &c.shared_adds),
            paging_ops: sum(|c| &c.paging_ops),
            hot_accesses: sum(|c| &c.hot_accesses),
            dma_ops: sum(|c| &c.dma_ops),
            violations: sum(|c| &c.violations),
        }
    }
}

/// Sums of the counters.
#[derive(Clone, Copy, Default)]
pub struct Totals {
    verified: u64,
    writes: u64,
    shared_adds: u64,
    paging_ops: u64,
    hot_accesses: u64,
    dma_ops: u64,
    /// Violations found.
    pub violations: u64,
}

impl Totals {
    /// What was counted since `earlier`.
    pub fn since(&self, earlier: &Totals) -> Totals {
        Totals {
            verified: self.verified - earlier.verified,
            writes: self.writes - earlier.writes,
            shared_adds: self.shared_adds - earlier.shared_adds,
            paging_ops: self.paging_ops - earlier.paging_ops,
            hot_accesses: self.hot_accesses - earlier.hot_accesses,
            dma_ops: self.dma_ops - earlier.dma_ops,
            violations: self.violations - earlier.violations,
        }
    }
}

impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "verified={} writes={}", self.verified, self.writes)?;
        let optional = [
            ("shared_adds", self.shared_adds),
            ("paging_ops", self.paging_ops),
            ("hot_accesses", self.hot_accesses),
            ("dma_ops", self.dma_ops),
        ];
        for (name, value) in optional {
            if value != 0 {
                write!(f, " {name}={value}")?;
            }
        }
        write!(f, " violations={}", self.violations)
    }
}

/// Items passed and failed.
#[derive(Default)]
pub struct Results {
    passed: AtomicU32,
    failed: AtomicU32,
}

impl Results {
    /// Prints and counts one item.
    pub fn item(&self, name: &str, passed: bool, detail: fmt::Arguments<'_>) {
        let (word, counter) = if passed { ("PASS", &self.passed) } else { ("FAIL", &self.failed) };
        counter.fetch_add(1, Ordering::Relaxed);
        println!("{word} {name}: {detail}");
    }

    /// Items passed.
    pub fn passed(&self) -> u32 {
        self.passed.load(Ordering::Relaxed)
    }

    /// Items failed.
    pub fn failed(&self) -> u32 {
        self.failed.load(Ordering::Relaxed)
    }
}
