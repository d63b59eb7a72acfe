//! Running a guest through the library, within a time limit, and what is checked after each run
//! whatever the guest did: no thread panicked, the reverse map matches the shadow tables, host
//! memory management found nothing wrong, and all threads have ended.

use std::borrow::Cow;
use std::fmt;
use std::io::{self, Write};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use gnomon::host_mm::{HostMemory, HostMm, HostMmConfig, MmStats};
use gnomon::iotlb::IotlbStats;
use gnomon::shadow_mmu::ShadowStats;
use gnomon::vmm::{
    DmaStats, GuestCounters, Outcome, VcpuCounts, ViolationReport, Vm, VmConfig, VmError,
};

use super::guest::{Guest, VALUE};

/// What kind of machine a guest gets.
#[derive(Clone)]
pub(crate) struct Machine {
    pub(crate) memory_bytes: u64,
    pub(crate) host_memory_bytes: u64,
    pub(crate) vcpus: usize,
    pub(crate) shadow_pages: Option<u32>,
    /// The guest must have ended so long after what the test does meanwhile.
    pub(crate) within: Duration,
}

impl Default for Machine {
    fn default() -> Self {
        Self {
            memory_bytes: 16 << 20,
            host_memory_bytes: 8 << 20,
            vcpus: 1,
            shadow_pages: None,
            within: Duration::from_secs(60),
        }
    }
}

/// An exception as the guest's handler reported it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) vector: u64,
    pub(crate) error_code: u64,
    pub(crate) cr2: u64,
    /// RIP, relative to the instruction that was attempted.
    pub(crate) rip: u64,
    pub(crate) rsp: u64,
}

/// A run that is over.
pub(crate) struct Ended {
    pub(crate) outcome: Outcome,
    pub(crate) reports: Vec<ViolationReport>,
    pub(crate) report_count: u64,
    pub(crate) console: Vec<u8>,
    pub(crate) counts: VcpuCounts,
    /// What the guest wrote to the control block.
    pub(crate) guest_counters: GuestCounters,
    pub(crate) memory: MmStats,
    pub(crate) shadow: ShadowStats,
    pub(crate) dma: DmaStats,
    pub(crate) iotlb: IotlbStats,
    pub(crate) unknown_port_accesses: u64,
}

/// A console that keeps all it gets.
#[derive(Clone, Default)]
struct Kept(Arc<Mutex<Vec<u8>>>);

impl Write for Kept {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("nobody panics with it").extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Machine {
    /// Runs the guest to its end, which must come in time.
    pub(crate) fn run(&self, guest: &Guest) -> Ended {
        self.run_while(guest, |_| {})
    }

    /// The same, with `meanwhile` called while the guest runs.
    pub(crate) fn run_while(&self, guest: &Guest, meanwhile: impl FnOnce(&Vm)) -> Ended {
        let (ended, in_time) = self.run_at_most(guest, meanwhile);
        assert!(in_time, "the guest did not end within {:?}: {ended:?}", self.within);
        ended
    }

    /// Runs the guest, and kills it when its time is up; the second value tells whether it ended
    /// by itself. A killed guest must be gone at once.
    pub(crate) fn run_at_most(&self, guest: &Guest, meanwhile: impl FnOnce(&Vm)) -> (Ended, bool) {
        let mut mm =
            HostMemory::new(HostMmConfig::new(self.host_memory_bytes)).expect("host memory");
        mm.start_reclaim().expect("a thread");
        let console = Kept::default();
        let config = VmConfig {
            memory_bytes: self.memory_bytes,
            vcpus: self.vcpus,
            kernel: Cow::Owned(guest.elf()),
            cmdline: String::new(),
            shadow_pages: self.shadow_pages,
            observer: None,
        };
        let mut vm = Vm::new(&config, &mm, Box::new(console.clone())).expect("a VM");
        vm.start().expect("threads");
        meanwhile(&vm);
        let ended = vm.wait(Some(self.within));
        let in_time = ended.is_some();
        let outcome = ended.unwrap_or_else(|| {
            vm.kill();
            vm.wait(Some(Duration::from_secs(60))).expect("a killed VM ends")
        });
        check_host(&vm, &mm, &outcome);
        let console = console.0.lock().expect("nobody panics with it").clone();
        let ended = Ended {
            outcome,
            reports: vm.violations(),
            report_count: vm.violation_count(),
            console,
            counts: vm.counts(),
            guest_counters: vm.guest_counters(),
            memory: mm.stats(),
            shadow: vm.shadow().stats(),
            dma: vm.dma_stats(),
            iotlb: vm.iotlb().stats(),
            unknown_port_accesses: vm.unknown_port_accesses(),
        };
        (ended, in_time)
    }
}

/// What holds after any guest.
fn check_host(vm: &Vm, mm: &HostMm, outcome: &Outcome) {
    assert!(
        !matches!(outcome, Outcome::Failed(VmError::Panicked { .. } | VmError::Host(_))),
        "{outcome:?}"
    );
    let (violations, count) = mm.violations();
    assert_eq!(count, 0, "{violations:?}");
    let mut differences = vm.shadow().check_reverse_map();
    differences.extend(vm.iotlb().check_reverse_map());
    assert!(differences.is_empty(), "{differences:?}");
    let stats = mm.stats();
    assert!(stats.peak_frames_in_use <= stats.frames, "{stats:?}");
    let resident = mm.resident_bytes().expect("the kernel counts the frames");
    assert!(resident <= mm.config().host_memory_bytes, "{resident} bytes of frames");
}

impl fmt::Debug for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The first reports tell; thousands of the same do not tell more.
        f.debug_struct("Ended")
            .field("outcome", &self.outcome)
            .field("first_reports", &self.reports.iter().take(8).collect::<Vec<_>>())
            .field("report_count", &self.report_count)
            .field(
                "console",
                &String::from_utf8_lossy(&self.console[..self.console.len().min(200)]),
            )
            .field("counts", &self.counts)
            .field("memory", &self.memory)
            .field("shadow", &self.shadow)
            .field("dma", &self.dma)
            .field("iotlb", &self.iotlb)
            .finish_non_exhaustive()
    }
}

impl Ended {
    /// The exceptions that the guest's handlers reported.
    pub(crate) fn faults(&self) -> Vec<Fault> {
        let reports = self.reports.iter().filter(|report| report.kind < VALUE);
        let fault = |report: &ViolationReport| Fault {
            vector: report.kind,
            error_code: report.expected,
            cr2: report.gva,
            rip: report.found,
            rsp: report.page,
        };
        reports.map(fault).collect()
    }

    /// The one exception that there must have been.
    pub(crate) fn fault(&self) -> Fault {
        match self.faults()[..] {
            [fault] => fault,
            _ => panic!("not one fault: {self:?}"),
        }
    }

    /// Vectors and error codes of the reported exceptions.
    pub(crate) fn vectors(&self) -> Vec<(u64, u64)> {
        self.faults().iter().map(|fault| (fault.vector, fault.error_code)).collect()
    }

    /// The values that the guest reported.
    pub(crate) fn values(&self) -> Vec<u64> {
        let reports = self.reports.iter().filter(|report| report.kind == VALUE);
        reports.map(|report| report.gva).collect()
    }

    /// The guest must have powered off.
    pub(crate) fn powered_off(self) -> Self {
        assert!(matches!(self.outcome, Outcome::PoweredOff), "{self:?}");
        self
    }

    /// The sentence that the VM ended with; it must have failed.
    pub(crate) fn failure(&self) -> String {
        match &self.outcome {
            Outcome::Failed(error) => error.to_string(),
            _ => panic!("it did not fail: {self:?}"),
        }
    }

    /// The VM must have ended with a sentence that has all these parts.
    pub(crate) fn failed_with(&self, parts: &[&str]) {
        let sentence = self.failure();
        for part in parts {
            assert!(sentence.contains(part), "no {part:?} in {sentence:?}");
        }
        assert!(!sentence.contains('\n'), "more than a sentence: {sentence:?}");
    }
}
