//! VMs of processors without KVM: the contract's services are theirs all the same.

use crate::abi;
#[cfg(feature = "export-notifier")]
use crate::addr::Gpa;
use crate::host_mm::{HostMm, HostMmConfig, MIN_HOST_MEMORY_BYTES};
use crate::sync::lock;
use crate::vmm::contract::bus::AbiBus;
use crate::vmm::contract::config::MIN_MEMORY_BYTES;
use crate::vmm::contract::control_block::{ControlBlock, window_bytes};
use crate::vmm::contract::devices::tests::Kept;
use crate::vmm::contract::services::free_pages;
use crate::vmm::cpu::gpr;
use crate::vmm::kvm::pinned::map_shared;
use crate::vmm::run::fakes::{self, FakeProcessor, Op, within_a_minute};

use super::*;

/// As much memory as a guest can have at least.
const MEMORY_BYTES: u64 = MIN_MEMORY_BYTES;

impl Contract for FakeProcessor {
    fn empty_clone(
        vm: &ContractVm<Self>,
        observer: Option<Arc<dyn VmObserver>>,
        console: Box<dyn Write + Send>,
    ) -> Result<ContractVm<Self>, VmError> {
        let vcpus = vm.services().vcpus;
        Ok(vm_on(vm.object().host_mm(), vec![None; vcpus], observer, console))
    }
}

fn vm_on(
    mm: &Arc<HostMm>,
    programs: Vec<Option<Vec<Op>>>,
    observer: Option<Arc<dyn VmObserver>>,
    console: Box<dyn Write + Send>,
) -> ContractVm<FakeProcessor> {
    let object = mm.create_object(MEMORY_BYTES).unwrap();
    let window = map_shared("pinned window", window_bytes(MEMORY_BYTES)).unwrap();
    let control = ControlBlock::new(window, programs.len(), MEMORY_BYTES);
    let services = Services::new(object, control, console, observer, free_pages()).unwrap();
    let machine = fakes::machine(Arc::new(AbiBus::new(services.clone())), programs);
    ContractVm::of(machine, services)
}

/// A VM whose vCPUs begin with these programs, on host memory of its own.
pub(crate) fn vm(programs: Vec<Option<Vec<Op>>>) -> ContractVm<FakeProcessor> {
    vm_printing_to(Box::new(std::io::sink()), programs)
}

fn vm_printing_to(
    console: Box<dyn Write + Send>,
    programs: Vec<Option<Vec<Op>>>,
) -> ContractVm<FakeProcessor> {
    let mm = HostMm::new(HostMmConfig::new(MIN_HOST_MEMORY_BYTES)).unwrap();
    vm_on(&mm, programs, None, console)
}

/// A hypercall with up to three arguments.
fn call(number: u64, arguments: [u64; 3]) -> Op {
    let mut registers = [0; 16];
    registers[gpr::RAX] = number;
    for (register, argument) in [gpr::RDI, gpr::RSI, gpr::RCX].into_iter().zip(arguments) {
        registers[register] = argument;
    }
    Op::Call(registers)
}

fn answers(vm: &ContractVm<FakeProcessor>) -> Vec<u64> {
    lock(&vm.machine().space().answers).clone()
}

#[test]
fn the_contracts_ports_and_hypercalls_are_there_without_kvm() {
    within_a_minute(|| {
        let console = Kept::default();
        let program = vec![
            Op::Out(abi::PORT_SERIAL, b"!".to_vec()),
            call(abi::HC_INFO, [abi::INFO_VCPUS, 0, 0]),
            call(abi::HC_VIOLATION, [1, 2, 3]),
            call(abi::HC_POWER_OFF, [0; 3]),
        ];
        let mut vm = vm_printing_to(Box::new(console.clone()), vec![Some(program)]);
        vm.start().unwrap();
        let outcome = vm.wait(None);
        assert!(matches!(outcome, Some(Outcome::PoweredOff)), "{outcome:?}");
        assert_eq!(*lock(&console.0), b"!");
        assert_eq!(answers(&vm), [1, 0]);
        assert_eq!((vm.violation_count(), vm.counts().exits), (1, 4));
        assert!(vm.check_reverse_map().is_empty());
    });
}

#[test]
fn a_hypercall_starts_another_vcpu_and_the_exit_port_ends_them() {
    within_a_minute(|| {
        let start = call(abi::HC_START_VCPU, [1, 0x10_0000, 3]);
        let nobody = call(abi::HC_START_VCPU, [7, 0x10_0000, 3]);
        let mut vm = vm(vec![Some(vec![nobody, start, Op::Hang]), None]);
        vm.start().unwrap();
        let outcome = vm.wait(None);
        assert!(matches!(outcome, Some(Outcome::GuestExit(3))), "by its argument: {outcome:?}");
        assert_eq!(answers(&vm), [abi::START_NO_SUCH_VCPU, 0]);

        let mut vm = self::vm(vec![Some(vec![Op::Out(abi::PORT_EXIT, vec![0x10])])]);
        vm.start().unwrap();
        assert!(matches!(vm.wait(None), Some(Outcome::GuestExit(0x21))));
    });
}

#[cfg(feature = "export-notifier")]
#[test]
fn a_clone_goes_on_with_its_own_memory_and_the_source_with_its() {
    within_a_minute(|| {
        let mut source = vm(vec![Some(vec![Op::Hang]), None]);
        source.object().write(Gpa::new(0x3000), b"before").unwrap();
        assert!(matches!(
            source.clone_running(None, Box::new(std::io::sink())),
            Err(VmError::NotRunning)
        ));
        source.start().unwrap();
        let mut clone = source.clone_running(None, Box::new(std::io::sink())).unwrap();
        source.object().write(Gpa::new(0x3000), b"behind").unwrap();
        let mut found = [0; 6];
        clone.object().read(Gpa::new(0x3000), &mut found).unwrap();
        assert_eq!(&found, b"before");
        assert!(source.clone_figures().is_none());
        assert_eq!(clone.clone_figures().unwrap().shared_pages, 1);
        for vm in [&mut clone, &mut source] {
            while vm.vcpu_states()[0].1 != Position::Inside {
                std::thread::yield_now();
            }
            vm.kill();
            assert!(matches!(vm.wait(None), Some(Outcome::Killed)));
            assert!(vm.check_reverse_map().is_empty());
        }
    });
}
