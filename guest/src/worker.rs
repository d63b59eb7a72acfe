//! One vCPU's part of the work: its pages, and what it does about violations.
//!
//! Page `index` belongs to vCPU `index % vcpus`, which alone reads and writes it. So a page and its
//! ledger entry change only by the hand of one thread, and the order of the two does not matter.

use core::cell::Cell;
use core::sync::atomic::Ordering;

use crate::machine::Machine;
use crate::oracle::{LINK, PageId};
use crate::pages::{self, WorkSet, count};
use crate::paging;
use crate::permute::Cycle;
use crate::vcpu::Vcpu;
use crate::{println, x86};
use gnomon_abi::{self as abi, VcpuCounters, Violation};

/// Violations that one vCPU reports to the host; all are counted.
const MOST_REPORTS: u64 = 1000;
/// Violations that one vCPU prints.
const MOST_PRINTED: u64 = 8;

/// A vCPU at work.
pub struct Worker {
    /// What all share.
    pub machine: &'static Machine,
    /// The vCPU itself.
    pub vcpu: &'static Vcpu,
    /// Its counters in the control block.
    pub counters: &'static VcpuCounters,
    /// Number of work pages that it owns.
    pub owned: u64,
    /// The order of the pointer chase through its own pages.
    chase: Cycle,
    /// Violations reported so far.
    reports: Cell<u64>,
}

impl Worker {
    /// The worker of a vCPU.
    pub fn new(machine: &'static Machine, vcpu: &'static Vcpu) -> Worker {
        let owned = Worker::owned_of_first(machine, vcpu, machine.work.pages());
        Worker {
            machine,
            vcpu,
            counters: &machine.control.counters[vcpu.index as usize],
            owned,
            chase: Cycle::new(owned, machine.options.seed ^ u64::from(vcpu.index)),
            reports: Cell::new(0),
        }
    }

    /// How many of the work pages before `end` a vCPU owns.
    fn owned_of_first(machine: &Machine, vcpu: &Vcpu, end: u64) -> u64 {
        end.saturating_sub(u64::from(vcpu.index)).div_ceil(machine.vcpus.len() as u64)
    }

    /// How many of the pages before `end` this vCPU owns.
    pub fn owned_before(&self, end: u64) -> u64 {
        Worker::owned_of_first(self.machine, self.vcpu, end)
    }

    /// Whether the host wants the run to end.
    #[inline]
    pub fn stop_asked(&self) -> bool {
        self.machine.stop_asked()
    }

    /// Number of the `page`th of the owned pages among all work pages.
    pub fn index(&self, page: u64) -> u64 {
        page * self.machine.vcpus.len() as u64 + u64::from(self.vcpu.index)
    }

    /// What the content of an owned page depends on.
    pub fn id(&self, page: u64) -> PageId {
        let gfn = self.machine.work.gfn(self.index(page));
        PageId { gfn, link: self.chase.next(page) }
    }

    /// Verifies the `page`th of the owned pages, then writes its next version if asked to; returns
    /// the owned page that this one links to, which it reads from the page.
    pub fn access(&self, page: u64, write: bool) -> u64 {
        let index = self.index(page);
        let id = self.id(page);
        let address = WorkSet::address(index);
        let content = address as *mut u64;
        let ledger = pages::version(id.gfn);
        let (version, last) = pages::content_of(ledger.load(Ordering::Relaxed));
        // SAFETY: work pages are mapped for good, and the owner alone accesses them.
        let verified = unsafe { self.machine.oracle.verify(content, id, version) };
        count(&self.counters.verified, 1);
        let mut repair = false;
        if let Err(mismatch) = verified {
            repair = true;
            let at = address + 8 * mismatch.word as u64;
            self.report(mismatch.kind, at, mismatch.expected, mismatch.found, id.gfn);
        }
        if write || repair {
            let next = pages::next_version(last);
            // SAFETY: as above.
            unsafe { self.machine.oracle.write(content, id, next) };
            ledger.store(next, Ordering::Relaxed);
            count(&self.counters.writes, 1);
        } else if version == 0 {
            return id.link;
        }
        // SAFETY: as above. Volatile, so that the chase depends on what is in memory.
        let link = unsafe { content.add(LINK).read_volatile() };
        if link < self.owned { link } else { id.link }
    }

    /// Gives an owned page back: it is zero from then on.
    pub fn free(&self, page: u64) {
        let index = self.index(page);
        let gfn = self.machine.work.gfn(index);
        // SAFETY: the page is this vCPU's, which keeps nothing in it.
        let refused = unsafe { x86::hypercall(abi::HC_FREE_PAGES, &[gfn, 1]) };
        if refused == 0 {
            let ledger = pages::version(gfn);
            ledger.store(pages::freed(ledger.load(Ordering::Relaxed)), Ordering::Relaxed);
        } else {
            self.report(Violation::Word, WorkSet::address(index), 0, refused, gfn);
        }
    }

    /// Checks the accessed and dirty bits of an owned page's entry against the ledger: a page that
    /// was written has both, a page that never was is not dirty, unless its entry was so at first.
    pub fn check_flags(&self, page: u64) {
        let index = self.index(page);
        let address = WorkSet::address(index);
        let gfn = self.machine.work.gfn(index);
        let flags = paging::ACCESSED | paging::DIRTY;
        let found = match self.machine.space.leaf_entry(address) {
            Some(entry) => entry.load(Ordering::Relaxed) & flags,
            None => 0,
        };
        let written = pages::version(gfn).load(Ordering::Relaxed) != 0;
        let is_dirty = written || pages::is_preset(index);
        let expected = if is_dirty { flags } else { paging::ACCESSED };
        if found != expected {
            self.report(Violation::Paging, address, expected, found, gfn);
        }
    }

    /// Counts a violation and, within bounds, tells host and console.
    #[cold]
    pub fn report(&self, kind: Violation, address: u64, expected: u64, found: u64, gfn: u64) {
        count(&self.counters.violations, 1);
        let reports = self.reports.get() + 1;
        self.reports.set(reports);
        if reports <= MOST_REPORTS {
            let arguments = [kind as u64, address, expected, found, gfn];
            // SAFETY: the call changes nothing in the guest.
            unsafe { x86::hypercall(abi::HC_VIOLATION, &arguments) };
        }
        if reports <= MOST_PRINTED {
            println!(
                "violation {kind:?} on vCPU {}: address {address:#x} page {gfn:#x} expected {expected:#x} found {found:#x}",
                self.vcpu.index
            );
        }
    }
}
