//! The control for `late-install`, which dawdles between reading a page and installing its mapping,
//! and for `skip-iotlb-wait`, which dawdles in the middle of a device's access: with the same
//! dawdling and the check, or the wait, in place nothing is found. So what is caught is what is
//! missing, not the delay.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use gnomon::addr::{Gfn, Pfn};
use gnomon::export_rmap::client::LATE_INSTALL;
use gnomon::export_rmap::lab::{DAWDLE, Rule};
use gnomon::host_mm::{HostMemory, HostMm, HostMmConfig};
use gnomon::iotlb::IotlbStats;
use gnomon::shadow_mmu::ShadowStats;
use gnomon::vmm::boot::TEST_GUEST;
use gnomon::vmm::{Outcome, Vm, VmConfig, VmObserver};
use libtest_mimic::Trial;

use crate::trial::kvm_trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        kvm_trial("dawdling_alone_is_harmless", dawdling_alone_is_harmless),
        kvm_trial("dawdling_without_the_check_is_not", dawdling_without_the_check_is_not),
    ]
}

/// Limits the sabotage to the pages that the guest's oracle watches.
struct Limit(Arc<HostMm>);

impl VmObserver for Limit {
    fn phase(&self, _phase: u64, first: Gfn, count: u64) {
        self.0.lab().limit_sabotage(first, count);
    }
}

/// What a run came to.
struct Run {
    violations: u64,
    clean_end: bool,
    shadow: ShadowStats,
    iotlb: IotlbStats,
}

/// Long enough for what is no matter of luck.
const BRIEFLY: Duration = Duration::from_secs(5);
/// How long the machine may take to bring about what is a matter of luck.
const GIVE_UP: Duration = Duration::from_secs(60);
/// The guest's share: how long nothing is evicted, again and again.
const AIR: Duration = Duration::from_millis(1);

/// Runs the test guest's random workload while all frames are evicted and cleaned in turn, until
/// `enough`, the first violation, or [`GIVE_UP`].
fn run(sabotage: Rule, enough: impl Fn(Duration, &ShadowStats, &IotlbStats) -> bool) -> Run {
    let mut host = HostMmConfig::new(16 << 20);
    host.sabotage = Some(sabotage);
    host.check_evictions = true;
    let mut mm = HostMemory::new(host).expect("host memory");
    mm.lab().limit_sabotage(Gfn::new(0), 0);
    let config = VmConfig {
        memory_bytes: 32 << 20,
        vcpus: 2,
        kernel: Cow::Borrowed(TEST_GUEST),
        cmdline: "mode=stress workload=random seed=5 fill=0 dma=10".to_owned(),
        shadow_pages: None,
        observer: Some(Arc::new(Limit(mm.clone()))),
    };
    let mut vm = Vm::new(&config, &mm, Box::new(std::io::sink())).expect("a VM");
    mm.start_reclaim().expect("a thread");
    vm.start().expect("threads");
    let frames: Vec<Pfn> = (0..mm.frame_count()).map(Pfn::new).collect();
    let found = |vm: &Vm| vm.violation_count() + mm.violations().1;
    let begin = Instant::now();
    let goes_on = |vm: &Vm| {
        let time = begin.elapsed();
        time < GIVE_UP && !enough(time, &vm.shadow().stats(), &vm.iotlb().stats())
    };
    let mut outcome = None;
    'work: while goes_on(&vm) {
        for (number, some) in frames.chunks(16).enumerate() {
            let invalidated =
                if number % 4 == 0 { mm.clean_frames(some) } else { mm.evict_frames(some) };
            invalidated.expect("swap takes them");
            // On a machine with little to spare the guest must get on, too.
            let pause = if number % 16 == 0 { AIR } else { Duration::ZERO };
            outcome = vm.wait(Some(pause));
            if outcome.is_some() || found(&vm) > 0 {
                break 'work;
            }
        }
    }
    vm.request_stop();
    let outcome = outcome.or_else(|| vm.wait(Some(Duration::from_secs(60)))).unwrap_or_else(|| {
        vm.kill();
        vm.wait(Some(Duration::from_secs(30))).expect("a killed VM ends")
    });
    let differences =
        vm.shadow().check_reverse_map().len() as u64 + vm.iotlb().check_reverse_map().len() as u64;
    Run {
        violations: found(&vm) + differences,
        clean_end: matches!(outcome, Outcome::PoweredOff),
        shadow: vm.shadow().stats(),
        iotlb: vm.iotlb().stats(),
    }
}

fn dawdling_alone_is_harmless() {
    // Until it did widen both windows: faults were overtaken and started over, and flushes slept
    // while the device was in the middle of an access.
    let wide = |shadow: &ShadowStats, iotlb: &IotlbStats| shadow.retries > 10 && iotlb.waits > 0;
    let run = run(DAWDLE, |time, shadow, iotlb| time > BRIEFLY && wide(shadow, iotlb));
    assert_eq!(run.violations, 0);
    assert!(run.clean_end);
    assert!(wide(&run.shadow, &run.iotlb), "{:?} {:?}", run.shadow, run.iotlb);
}

fn dawdling_without_the_check_is_not() {
    let run = run(LATE_INSTALL, |_, _, _| false);
    assert!(run.violations > 0 || !run.clean_end, "{:?}", run.shadow);
}
