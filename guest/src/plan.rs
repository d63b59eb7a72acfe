//! The course of a run: all vCPUs go through the same steps and meet between them; the boot vCPU
//! does the talking.

use crate::machine::{Machine, Totals};
use crate::options::{Mode, Workload};
use crate::vcpu::Vcpu;
use crate::worker::Worker;
use crate::workloads::Workloads;
use crate::{println, x86};
use gnomon_abi::{self as abi, Violation};

/// Operations of each workload on each vCPU in a round of boot mode.
const BOOT_OPERATIONS: u64 = 2048;
/// Operations of a workload before the next one's turn in stress mode.
const SLICE_OPERATIONS: u64 = 4096;
/// The same for page-table changes: a CR3 load among them costs every mapping there is, which the
/// other workloads then fault in again.
const PAGING_SLICE_OPERATIONS: u64 = 128;

/// Does a vCPU's part. Returns only on vCPUs other than the boot vCPU, which ends the VM.
pub fn run(machine: &'static Machine, vcpu: &'static Vcpu) {
    let mut run = Run { worker: Worker::new(machine, vcpu), machine, is_boot: vcpu.index == 0 };
    let mut workloads = Workloads::new(&run.worker);
    if machine.options.fill {
        run.item("fill", |worker| sweep(worker, true));
    }
    match machine.options.mode {
        Mode::Boot => {
            run.enter(abi::PHASE_RUN);
            run.boot_rounds(&mut workloads);
        }
        Mode::Stress => {
            run.enter(abi::PHASE_RUN);
            run.stress_rounds(&mut workloads);
        }
    }
    run.enter(abi::PHASE_SWEEP);
    run.item("sweep", final_sweep);
    if run.is_boot {
        finish(machine);
    }
}

struct Run {
    worker: Worker,
    machine: &'static Machine,
    is_boot: bool,
}

impl Run {
    /// Tells the host, once all vCPUs are here, that they enter a phase.
    fn enter(&self, phase: u64) {
        self.machine.barrier.wait();
        if self.is_boot {
            let work = &self.machine.work;
            let (first, count) = work.frames_of_first(work.pages());
            // SAFETY: the call changes nothing in the guest.
            unsafe { x86::hypercall(abi::HC_PHASE, &[phase, first, count]) };
        }
        self.machine.barrier.wait();
    }

    /// One step that all vCPUs take, reported when all have.
    fn item(&mut self, name: &str, step: impl FnOnce(&Worker)) {
        let machine = self.machine;
        machine.barrier.wait();
        let before = machine.totals();
        machine.barrier.wait();
        step(&self.worker);
        machine.barrier.wait();
        if self.is_boot {
            check_shared(&self.worker);
            let totals = machine.totals().since(&before);
            machine.results.item(name, totals.violations == 0, format_args!("{totals}"));
        }
        machine.barrier.wait();
    }

    fn boot_rounds(&mut self, workloads: &mut Workloads) {
        let options = &self.machine.options;
        self.item("verify", |worker| sweep(worker, false));
        for _ in 0..options.passes.max(1) {
            for workload in Workload::ALL {
                if options.selects(workload) {
                    self.item(workload.name(), |worker| {
                        workloads.slice(worker, workload, BOOT_OPERATIONS);
                    });
                }
            }
        }
    }

    fn stress_rounds(&self, workloads: &mut Workloads) {
        let options = &self.machine.options;
        let mut rounds = 0;
        while options.passes == 0 || rounds < options.passes {
            for workload in Workload::ALL {
                if options.selects(workload) {
                    let operations = match workload {
                        Workload::Paging => PAGING_SLICE_OPERATIONS,
                        _ => SLICE_OPERATIONS,
                    };
                    workloads.slice(&self.worker, workload, operations);
                }
            }
            if self.machine.stop_asked() {
                return;
            }
            rounds += 1;
        }
    }
}

/// Accesses every owned page once, unless the host wants the run to end.
fn sweep(worker: &Worker, write: bool) {
    for page in 0..worker.owned {
        if worker.stop_asked() {
            return;
        }
        worker.access(page, write);
    }
}

/// Verifies every owned page and the flags of its mapping.
fn final_sweep(worker: &Worker) {
    for page in 0..worker.owned {
        worker.access(page, false);
        worker.check_flags(page);
    }
}

/// Compares the shared counters with what was added, while nobody adds.
fn check_shared(worker: &Worker) {
    let machine = worker.machine;
    machine.shared.check(machine.vcpus, |wrong| {
        worker.report(Violation::SharedSum, wrong.address, wrong.expected, wrong.found, wrong.gfn);
    });
}

/// The last words, and the end of the VM.
fn finish(machine: &Machine) -> ! {
    let totals: Totals = machine.totals();
    let results = &machine.results;
    let good = results.failed() == 0 && totals.violations == 0;
    println!(
        "{}: passed={} failed={} {totals}",
        if good { "PASS" } else { "FAIL" },
        results.passed(),
        results.failed(),
    );
    match machine.options.mode {
        Mode::Boot if !good => x86::exit(x86::EXIT_VIOLATION),
        _ => x86::power_off(),
    }
}
