//! A guest that was ended by a fault of the host, and a host that is mended afterwards: every page
//! has what its guest last wrote. The test guest's pages say themselves what they must hold.

use std::borrow::Cow;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use gnomon::addr::Gfn;
use gnomon::host_mm::hooks::{SWAP_FULL, SWAP_READ, SWAP_WRITE};
use gnomon::host_mm::{HostFault, HostMemory, HostMmConfig, Injection, InjectionPlan, When};
use gnomon::vmm::boot::TEST_GUEST;
use gnomon::vmm::{Outcome, Vm, VmConfig, VmError, VmObserver};
use libtest_mimic::Trial;
use nix::errno::Errno;

use crate::trial::kvm_trial;

const WORDS: usize = 512;
/// Page number in the bits below, the run's magic number above.
const NUMBER_BITS: u32 = 40;

pub(crate) fn trials() -> Vec<Trial> {
    let trial = |name: &str, fault, first| {
        kvm_trial(&format!("mended_after_{name}"), move || nothing_is_lost(fault, first))
    };
    vec![
        trial("failed_reads", SWAP_READ.failing(Errno::EIO), 1000),
        trial("failed_writes", SWAP_WRITE.failing(Errno::EIO), 1000),
        trial("full_swap", SWAP_FULL.plain(), 500),
        kvm_trial("mended_check_notices_a_wrong_byte", a_wrong_byte_is_noticed),
    ]
}

/// The pages that the guest works with: the first, and how many.
#[derive(Default)]
struct Work(Mutex<Option<(Gfn, u64)>>);

impl VmObserver for Work {
    fn phase(&self, _phase: u64, first: Gfn, count: u64) {
        self.0.lock().expect("nobody panics with it").get_or_insert((first, count));
    }
}

/// Runs the test guest until the fault, which strikes from call number `first` on, ends it; mends
/// the host.
fn run(fault: HostFault, first: u64) -> (Vm, Gfn, u64) {
    let when =
        When::Every { first: first.try_into().expect("not 0"), step: 1.try_into().expect("1") };
    let inject = InjectionPlan {
        items: vec![Injection { fault, when }],
        seed: 0,
        ..InjectionPlan::default()
    };
    let mut mm =
        HostMemory::new(HostMmConfig { inject, ..HostMmConfig::new(12 << 20) }).expect("memory");
    let work = Arc::new(Work::default());
    let config = VmConfig {
        memory_bytes: 32 << 20,
        // One processor: at most one page is in the middle of being written.
        vcpus: 1,
        kernel: Cow::Borrowed(TEST_GUEST),
        cmdline: "mode=stress workload=random seed=5".to_owned(),
        shadow_pages: None,
        observer: Some(work.clone()),
    };
    let mut vm = Vm::new(&config, &mm, Box::new(std::io::sink())).expect("a VM");
    mm.start_reclaim().expect("a thread");
    vm.start().expect("threads");
    let outcome = vm.wait(Some(Duration::from_secs(120))).expect("it ends by itself");
    assert!(matches!(outcome, Outcome::Failed(VmError::Host(_))), "{outcome:?}");
    mm.end_reclaim();
    mm.lab().end_injection();
    let (first, count) = work.0.lock().expect("nobody panics with it").expect("it began to work");
    (vm, first, count)
}

/// The words of a page; it must be possible to read it.
fn read(vm: &Vm, gfn: Gfn) -> [u64; WORDS] {
    let mut bytes = [0; WORDS * 8];
    vm.object().read(gfn.base(), &mut bytes).unwrap_or_else(|error| panic!("page {gfn}: {error}"));
    let mut words = [0; WORDS];
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
        *word = u64::from_le_bytes(bytes.try_into().expect("8 bytes"));
    }
    words
}

/// Whether a page holds what it says that it must; see `guest/src/oracle.rs`.
fn is_whole(words: &[u64; WORDS], gfn: Gfn) -> bool {
    let magic = words[0] >> NUMBER_BITS << NUMBER_BITS;
    let sum = words[3..].iter().fold(magic, |sum, word| sum.wrapping_add(*word));
    words[0] == magic | gfn.as_u64() && words[1] > 0 && words[2] == sum
}

fn nothing_is_lost(fault: HostFault, first: u64) {
    let (vm, first, count) = run(fault, first);
    assert_eq!(vm.violation_count(), 0, "{:?}", vm.violations());
    let audit = vm.object().audit(&vm.object().host_mm().quiet());
    assert!(audit.lost == 0 && audit.in_swap > 100 && audit.in_frames > 1000, "{audit:?}");
    let (mut written, mut torn) = (0, Vec::new());
    for number in first.as_u64()..first.as_u64() + count {
        let gfn = Gfn::new(number);
        let words = read(&vm, gfn);
        if words == [0; WORDS] {
            continue;
        }
        written += 1;
        if !is_whole(&words, gfn) {
            torn.push(gfn);
        }
    }
    assert!(written > 1000, "{written} of {count} pages were written");
    assert!(torn.len() <= 1, "of {written} written pages: {torn:?}");
    assert!(vm.shadow().check_reverse_map().is_empty());
}

fn a_wrong_byte_is_noticed() {
    let (vm, first, _) = run(SWAP_READ.failing(Errno::EIO), 1000);
    let gfns = (first.as_u64()..).map(Gfn::new);
    let gfn = gfns.into_iter().find(|&gfn| read(&vm, gfn) != [0; WORDS]).expect("a written page");
    let words = read(&vm, gfn);
    assert!(is_whole(&words, gfn));
    for word in [0, 1, 2, 3, 100, WORDS - 1] {
        let mut wrong = words;
        wrong[word] ^= if word == 1 { wrong[1] } else { 1 };
        assert!(!is_whole(&wrong, gfn), "word {word}");
    }
    assert!(!is_whole(&words, Gfn::new(gfn.as_u64() + 1)), "another page's content");
}
