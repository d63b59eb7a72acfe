//! KVM: the device, what it offers, and what kind of KVM it is.

use std::fs;
use std::sync::mpsc;
use std::time::Duration;

use super::Finding;
use crate::abi;
use crate::cli::hint;
use crate::sys::threads;
use crate::vmm::linux::NEEDS_VIRTUALISATION;
use crate::vmm::{HostKind, HostTraits, KVM_DEVICE, KvmOffer, VmError};

/// Bits of a machine address that any processor with KVM has; with less, no guest fits.
const LEAST_PHYS_BITS: u32 = 36;
/// Time for a probe that takes some milliseconds.
const PROBE_TIMEOUT: Duration = Duration::from_secs(10);

pub(super) fn examine() -> Vec<Finding> {
    let offer = match KvmOffer::ask() {
        Ok(offer) => offer,
        Err(error) => return vec![Finding::missing("KVM", error.to_string())],
    };
    let mut findings =
        vec![Finding::ok("KVM", format!("{KVM_DEVICE} can be used, API version 12"))];
    findings.push(capabilities(&offer));
    findings.push(vcpus(offer.max_vcpus));
    findings.push(address_space(&offer));
    if findings.iter().all(|finding| finding.status != super::Status::Missing) {
        findings.extend(kind(probe()));
    }
    findings
}

fn capabilities(offer: &KvmOffer) -> Finding {
    let what = "KVM capabilities";
    let names = |there: bool| -> Vec<&str> {
        let wanted = offer.capabilities.iter().filter(|(_, offered)| *offered == there);
        wanted.map(|(name, _)| name.strip_prefix("KVM_CAP_").unwrap_or(name)).collect()
    };
    let missing = names(false);
    if missing.is_empty() {
        return Finding::ok(what, names(true).join(", "));
    }
    let advice = "use Linux 4.17 or later, without patches that remove them";
    Finding::missing(what, format!("{} not there: {advice}", missing.join(", ")))
}

fn vcpus(max: usize) -> Finding {
    Finding::ok("vCPUs", format!("up to {} in one guest", max.min(abi::MAX_VCPUS)))
}

fn address_space(offer: &KvmOffer) -> Finding {
    let what = "machine addresses";
    let bits = offer.phys_bits;
    if !offer.no_execute {
        let advice = "switch it on in the firmware, or for this virtual machine";
        return Finding::missing(what, format!("guests have no no-execute pages (NX): {advice}"));
    }
    if bits < LEAST_PHYS_BITS {
        return Finding::missing(what, format!("{bits} bits are too few for any guest"));
    }
    Finding::ok(what, format!("{bits} bits, with no-execute pages"))
}

/// Probes in a thread: should KVM never return from the guest's few instructions, the thread is
/// left behind.
fn probe() -> Option<Result<HostTraits, VmError>> {
    let (sender, receiver) = mpsc::channel();
    let probing = threads::start("probe", "the probe of KVM", move || {
        // Nobody listens any more after the timeout.
        let _ = sender.send(HostTraits::probe());
    });
    if let Err(refused) = probing {
        let found = format!("{refused}{}", hint::of(&refused));
        return Some(Err(VmError::Probe { found }));
    }
    receiver.recv_timeout(PROBE_TIMEOUT).ok()
}

fn kind(probed: Option<Result<HostTraits, VmError>>) -> Vec<Finding> {
    let what = "guest code";
    let traits = match probed {
        Some(Ok(traits)) => traits,
        Some(Err(error)) => return vec![Finding::missing(what, error.to_string())],
        None => {
            let seconds = PROBE_TIMEOUT.as_secs();
            let detail = format!(
                "a guest of a few instructions did not end within {seconds} s: try again on an idle machine, or with another kernel"
            );
            return vec![Finding::missing(what, detail)];
        }
    };
    vec![
        revocation(&traits),
        nested_paging(traits.kind(), &module_parameter()),
        ring0(traits.ring0_native),
        stock_kernels(&traits),
    ]
}

fn revocation(traits: &HostTraits) -> Finding {
    let what = "revocation";
    if traits.zap_revokes {
        return Finding::ok(what, "guests lose translations of memory that is dropped by madvise");
    }
    Finding::missing(what, format!("{}; use a mainline kernel", VmError::ZapWithoutEffect))
}

fn nested_paging(kind: HostKind, parameter: &str) -> Finding {
    let what = "nested paging";
    match kind {
        HostKind::Tdp => {
            Finding::ok(what, format!("the processor translates machine addresses{parameter}"))
        }
        HostKind::Shadow => Finding::limited(
            what,
            format!(
                "KVM shadows page tables in software{parameter}: right, but a guest's faults cost more; a processor with EPT or NPT, or a host that passes it on to this virtual machine, does away with that"
            ),
        ),
    }
}

fn ring0(native: bool) -> Finding {
    let what = "ring 0";
    if native {
        return Finding::ok(what, "runs natively");
    }
    Finding::limited(
        what,
        "emulated, one instruction at a time: guests run (their code is at ring 3, natively), with dearer exits; VMX or SVM, also passed on to this virtual machine, does away with that",
    )
}

fn stock_kernels(traits: &HostTraits) -> Finding {
    let what = "stock Linux kernels";
    match traits.against_stock_kernels() {
        None => Finding::ok(what, "KVM can run them: gnomon boot --kernel /boot/vmlinuz-…"),
        Some(why) => Finding::limited(
            what,
            format!("not on this host: {why}; other guests run; for them {NEEDS_VIRTUALISATION}"),
        ),
    }
}

/// What the KVM module says about nested paging, in brackets; only a detail.
fn module_parameter() -> String {
    for (module, name) in [("kvm_intel", "ept"), ("kvm_amd", "npt")] {
        let path = format!("/sys/module/{module}/parameters/{name}");
        if let Ok(value) = fs::read_to_string(path) {
            return format!(" ({module} has {name}={})", value.trim());
        }
    }
    String::new()
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;

    fn offer() -> KvmOffer {
        KvmOffer {
            capabilities: vec![("KVM_CAP_USER_MEMORY", true), ("KVM_CAP_SYNC_REGS", true)],
            max_vcpus: 4096,
            phys_bits: 48,
            no_execute: true,
        }
    }

    fn traits(hardware: bool) -> HostTraits {
        HostTraits {
            accessed_returns: hardware,
            dirty_returns: hardware,
            clear_takes_effect: hardware,
            zap_revokes: true,
            ring0_native: hardware,
            is_pvm: !hardware,
        }
    }

    #[test]
    fn a_missing_capability_is_named() {
        assert_eq!(capabilities(&offer()).detail, "USER_MEMORY, SYNC_REGS");
        let mut old = offer();
        old.capabilities[1].1 = false;
        let finding = capabilities(&old);
        assert_eq!(finding.status, Status::Missing);
        assert!(finding.detail.starts_with("SYNC_REGS not there: use Linux 4.17"), "{finding}");
    }

    #[test]
    fn vcpus_are_bounded_by_the_contract_with_the_guest() {
        assert!(vcpus(4096).detail.contains("1023"));
        assert!(vcpus(8).detail.contains("up to 8"));
    }

    #[test]
    fn small_or_executable_everywhere_address_spaces_are_missing_something() {
        assert_eq!(address_space(&offer()).status, Status::Ok);
        let small = address_space(&KvmOffer { phys_bits: 32, ..offer() });
        assert_eq!(small.status, Status::Missing);
        let executable = address_space(&KvmOffer { no_execute: false, ..offer() });
        assert_eq!(executable.status, Status::Missing);
        assert!(executable.detail.contains("firmware"), "{executable}");
    }

    #[test]
    fn a_kvm_in_software_is_limited_and_one_in_hardware_is_not() {
        let hardware = kind(Some(Ok(traits(true))));
        assert!(hardware.iter().all(|finding| finding.status == Status::Ok), "{hardware:?}");
        let software = kind(Some(Ok(traits(false))));
        let statuses: Vec<Status> = software.iter().map(|finding| finding.status).collect();
        assert_eq!(statuses, [Status::Ok, Status::Limited, Status::Limited, Status::Limited]);
        let kernels = software.last().unwrap().to_string();
        assert!(
            kernels.contains("stock Linux kernels: not on this host: its KVM is PVM"),
            "{kernels}"
        );
    }

    #[test]
    fn a_kvm_that_runs_nothing_or_revokes_nothing_is_missing() {
        let found = "it went elsewhere".to_owned();
        let failed = kind(Some(Err(VmError::Probe { found })));
        assert_eq!(failed[0].status, Status::Missing);
        assert!(failed[0].detail.contains("it went elsewhere"), "{failed:?}");
        assert_eq!(kind(None)[0].status, Status::Missing);
        let stale = kind(Some(Ok(HostTraits { zap_revokes: false, ..traits(true) })));
        assert_eq!(stale[0].status, Status::Missing);
        assert!(stale[0].detail.contains("MADV_DONTNEED"), "{stale:?}");
    }
}
