//! KVM: the device, what it offers, and what kind of KVM it is.

use std::fs;
use std::sync::mpsc;
use std::time::Duration;

use super::Finding;
use crate::abi;
use crate::vmm::probe::{KvmKind, KvmOffer};
use crate::vmm::{KVM_DEVICE, KvmError};

/// Bits of a machine address that any processor with KVM has; with less, no guest fits.
const LEAST_PHYS_BITS: u32 = 36;
/// Time for a measurement that takes a quarter of a second at most.
const MEASURE_TIMEOUT: Duration = Duration::from_secs(10);

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
        findings.extend(kind(measure()));
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

/// Measures in a thread: should KVM never return from the guest's few instructions, the thread is
/// left behind.
fn measure() -> Option<Result<KvmKind, KvmError>> {
    let (sender, receiver) = mpsc::channel();
    let measuring = std::thread::Builder::new().spawn(move || {
        // Nobody listens any more after the timeout.
        let _ = sender.send(KvmKind::measure());
    });
    measuring.ok()?;
    receiver.recv_timeout(MEASURE_TIMEOUT).ok()
}

fn kind(measured: Option<Result<KvmKind, KvmError>>) -> Vec<Finding> {
    let kind = match measured {
        Some(Ok(kind)) => kind,
        Some(Err(error)) => {
            return vec![Finding::missing("guest code", format!("a first guest failed: {error}"))];
        }
        None => {
            let seconds = MEASURE_TIMEOUT.as_secs();
            let detail = format!(
                "a first guest of a few instructions did not end within {seconds} s: try again on an idle machine, or another kernel"
            );
            return vec![Finding::missing("guest code", detail)];
        }
    };
    vec![nested_paging(&kind, &module_parameter()), ring0(&kind)]
}

fn nested_paging(kind: &KvmKind, parameter: &str) -> Finding {
    let what = "nested paging";
    if kind.nested_paging {
        return Finding::ok(what, format!("the processor translates machine addresses{parameter}"));
    }
    Finding::limited(
        what,
        format!(
            "KVM shadows page tables in software{parameter}: right, but each fault of a guest costs more; a processor with EPT or NPT, or a host that passes it on to this virtual machine, does away with that"
        ),
    )
}

fn ring0(kind: &KvmKind) -> Finding {
    let what = "ring 0";
    let nanos = kind.ring0_instruction.as_nanos();
    if kind.is_ring0_native() {
        return Finding::ok(what, format!("native, {nanos} ns an instruction"));
    }
    Finding::limited(
        what,
        format!(
            "emulated, {nanos} ns an instruction: guests run (their code is at ring 3, natively), with dearer exits; VMX or SVM, also passed on to this virtual machine, does away with that"
        ),
    )
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

    fn measured(ring0_ns: u64, nested_paging: bool) -> Vec<Finding> {
        let ring0_instruction = Duration::from_nanos(ring0_ns);
        kind(Some(Ok(KvmKind { ring0_instruction, nested_paging })))
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
        let hardware = measured(1, true);
        assert!(hardware.iter().all(|finding| finding.status == Status::Ok), "{hardware:?}");
        let software = measured(800, false);
        assert!(software.iter().all(|finding| finding.status == Status::Limited), "{software:?}");
        assert!(software[1].detail.contains("800 ns"), "{software:?}");
    }

    #[test]
    fn a_kvm_that_runs_nothing_is_missing() {
        let failed = kind(Some(Err(KvmError::ApiVersion { found: 11 })));
        assert_eq!(failed[0].status, Status::Missing);
        assert!(failed[0].detail.contains("version 11"), "{failed:?}");
        assert_eq!(kind(None)[0].status, Status::Missing);
    }
}
