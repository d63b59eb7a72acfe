//! The probe of the host's KVM, against what the kernel itself says of it.
//!
//! `GNOMON_EXPECT_HOST`, set to `shadow` or `tdp`, says what the probe has to find: the test bed
//! sets it. Without it, nested paging is expected where kvm_amd or kvm_intel says that it uses it.

#[path = "../common/trial.rs"]
mod trial;

use std::borrow::Cow;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use gnomon::host_mm::{HostMm, HostMmConfig};
use gnomon::vmm::boot::TEST_GUEST;
use gnomon::vmm::{HostKind, HostTraits, Outcome, Vm, VmConfig};
use trial::kvm_trial;

fn main() -> ExitCode {
    let trials = vec![
        kvm_trial("the_probe_finds_what_the_kernel_says", the_probe_finds_what_the_kernel_says),
        kvm_trial(
            "ageing_zaps_exactly_where_accessed_bits_need_it",
            ageing_zaps_exactly_where_accessed_bits_need_it,
        ),
    ];
    trial::run(trials, 1).exit_code()
}

/// What the kernel says of nested paging; `None` if it says nothing.
fn nested_paging() -> Option<bool> {
    let parameters = ["kvm_amd/parameters/npt", "kvm_intel/parameters/ept"];
    parameters.iter().find_map(|parameter| {
        let value = std::fs::read_to_string(Path::new("/sys/module").join(parameter)).ok()?;
        Some(matches!(value.trim(), "Y" | "1"))
    })
}

fn the_probe_finds_what_the_kernel_says() {
    let traits = HostTraits::probe().unwrap();
    eprintln!("{traits:?}");
    assert!(traits.zap_revokes, "no guest can be run on {traits:?}");
    let again = HostTraits::probe().unwrap();
    assert_eq!(traits, again, "the probe has to find the same each time");

    let expected = match std::env::var("GNOMON_EXPECT_HOST").as_deref() {
        Ok("shadow") => Some(HostKind::Shadow),
        Ok("tdp") => Some(HostKind::Tdp),
        Ok(other) => panic!("GNOMON_EXPECT_HOST={other}: neither shadow nor tdp"),
        Err(_) => nested_paging().map(|nested| match nested {
            true => HostKind::Tdp,
            false => HostKind::Shadow,
        }),
    };
    if let Some(expected) = expected {
        assert_eq!(traits.kind(), expected, "{traits:?}");
    }
    if traits.kind() == HostKind::Tdp {
        assert!(traits.ring0_native, "{traits:?}");
    }
}

/// Frames whose accessed state was cleared, and frames zapped for that, in a run of the test guest
/// in less memory than it uses.
fn aged_and_zapped(kind: Option<HostKind>) -> (u64, u64) {
    let config = VmConfig {
        memory_bytes: 16 << 20,
        vcpus: 1,
        kernel: Cow::Borrowed(TEST_GUEST),
        cmdline: "mode=boot pages=1600 workload=random,zipf".to_owned(),
        shadow_pages: None,
        observer: None,
    };
    let mm = HostMm::new(HostMmConfig::new(4 << 20)).unwrap();
    let mut vm = Vm::new_assuming(kind, &config, &mm, Box::new(std::io::sink())).unwrap();
    vm.start().unwrap();
    let outcome = vm.wait(Some(Duration::from_secs(120)));
    // Its checks of every page passed, whatever ageing saw.
    assert!(matches!(outcome, Some(Outcome::PoweredOff)), "{outcome:?}");
    let (aged, zapped) = (mm.stats().aged, vm.shadow().stats().aged_zaps);
    assert!(aged > 0, "no page was aged");
    (aged, zapped)
}

fn ageing_zaps_exactly_where_accessed_bits_need_it() {
    let (aged, zapped) = aged_and_zapped(Some(HostKind::Shadow));
    assert_eq!(zapped, aged);
    let (_, zapped) = aged_and_zapped(Some(HostKind::Tdp));
    assert_eq!(zapped, 0);
    let (aged, zapped) = aged_and_zapped(None);
    match HostTraits::probe().unwrap().kind() {
        HostKind::Shadow => assert_eq!(zapped, aged),
        HostKind::Tdp => assert_eq!(zapped, 0),
    }
}
