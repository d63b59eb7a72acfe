//! Hypercalls: the guest's requests through [`abi::PORT_HYPERCALL`].

use crate::abi;
use crate::addr::Gfn;
use crate::vmm::cpu::memory::is_usable;
use crate::vmm::cpu::{GuestCpu, TaskRegister, gpr, rflags};
use crate::vmm::run::bus::{HypercallResult, StartVcpu};
use crate::vmm::run::outcome::Outcome;
use crate::vmm::run::roster::StartRefused;

use super::observer::ViolationReport;
use super::services::Services;

/// Carries out the hypercall in `registers`, in encoding order; `start` starts a vCPU at a RIP with an
/// argument.
pub(in crate::vmm) fn hypercall(
    services: &Services,
    vcpu: usize,
    registers: &[u64; 16],
    start: &StartVcpu<'_>,
) -> HypercallResult {
    let number = registers[gpr::RAX] & u64::from(u32::MAX);
    let [rdi, rsi, rcx, r8, r9] =
        [gpr::RDI, gpr::RSI, gpr::RCX, gpr::R8, gpr::R9].map(|index| registers[index]);
    let value = match number {
        abi::HC_INFO => info(services, rdi),
        abi::HC_START_VCPU => start_vcpu(rdi, rsi, rcx, start),
        abi::HC_VIOLATION => {
            let report =
                ViolationReport { vcpu, kind: rdi, gva: rsi, expected: rcx, found: r8, page: r9 };
            services.reports.add(report);
            services.observe(|observer| observer.violation(&report));
            0
        }
        abi::HC_WATCH => {
            if !is_ram(services, rdi, rsi) {
                return HypercallResult::Value(abi::HC_ERROR);
            }
            services.object.watch(Gfn::new(rdi), rsi);
            services.observe(|observer| observer.watch(Gfn::new(rdi), rsi));
            0
        }
        abi::HC_FREE_PAGES => {
            if rsi > abi::MOST_FREED || !is_ram(services, rdi, rsi) {
                return HypercallResult::Value(abi::HC_ERROR);
            }
            match (services.take_back)(&services.object, Gfn::new(rdi), rsi) {
                true => 0,
                false => abi::HC_ERROR,
            }
        }
        abi::HC_POWER_OFF => return HypercallResult::End(Outcome::PoweredOff),
        abi::HC_PHASE => {
            services.observe(|observer| observer.phase(rdi, Gfn::new(rsi), rcx));
            0
        }
        _ => abi::HC_ERROR,
    };
    HypercallResult::Value(value)
}

/// Whether `count` guest frames from `first` are all RAM.
fn is_ram(services: &Services, first: u64, count: u64) -> bool {
    let frames = services.object.bytes() >> crate::addr::PAGE_SHIFT;
    first.checked_add(count).is_some_and(|end| end <= frames)
}

fn info(services: &Services, key: u64) -> u64 {
    match key {
        abi::INFO_ABI_VERSION => abi::ABI_VERSION,
        abi::INFO_VCPUS => services.vcpus as u64,
        abi::INFO_MEMORY_BYTES => services.object.bytes(),
        abi::INFO_WINDOW_BYTES => services.window_bytes,
        _ => abi::HC_ERROR,
    }
}

fn start_vcpu(index: u64, rip: u64, argument: u64, start: &StartVcpu<'_>) -> u64 {
    // A vCPU cannot begin where it could never have jumped to.
    if !is_usable(rip, 1) {
        return abi::HC_ERROR;
    }
    let Ok(index) = usize::try_from(index) else {
        return abi::START_NO_SUCH_VCPU;
    };
    match start(index, rip, argument) {
        Ok(()) => 0,
        Err(StartRefused::NoSuchVcpu) => abi::START_NO_SUCH_VCPU,
        Err(StartRefused::AlreadyRunning) => abi::START_ALREADY_RUNNING,
    }
}

/// The state of a vCPU that `caller` starts: its control registers and descriptor tables, and
/// nothing else of it.
pub(in crate::vmm) fn started_by(caller: &GuestCpu, rip: u64, argument: u64) -> GuestCpu {
    let mut cpu = GuestCpu {
        gpr: [0; 16],
        rip,
        rflags: rflags::ALWAYS,
        cr2: 0,
        task: TaskRegister::default(),
        fs_base: 0,
        gs_base: 0,
        kernel_gs_base: 0,
        ..caller.clone()
    };
    cpu.gpr[gpr::RDI] = argument;
    cpu
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Gpa;
    use crate::vmm::cpu::{DescriptorTable, Features};

    #[test]
    fn a_started_vcpu_has_its_callers_tables_and_a_clean_rest() {
        let features = Features { phys_bits: 48, nx: true, fsgsbase: true, xsave: true, avx: true };
        let mut caller = GuestCpu::at_boot(Gpa::new(0x5000), features);
        caller.idtr = DescriptorTable { base: 0x1234, limit: 0xfff };
        caller.gpr = [9; 16];
        caller.fs_base = 1;
        caller.rflags |= rflags::DF;
        let cpu = started_by(&caller, 0x10_0000, 42);
        assert_eq!((cpu.cr3, cpu.idtr), (0x5000, caller.idtr));
        assert_eq!((cpu.rip, cpu.rflags, cpu.fs_base), (0x10_0000, 0x202, 0));
        assert_eq!((cpu.gpr[gpr::RDI], cpu.gpr[gpr::RSP], cpu.gpr[gpr::RAX]), (42, 0, 0));
    }
}
