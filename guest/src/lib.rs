//! Gnomon's test guest.
//!
//! A kernel that does nothing but put a hypervisor's memory management to the test: it fills guest
//! memory with pages of known content, reads and rewrites them in several orders, changes its own
//! page tables, and reports everything that is not as it must be. What it relies on is the contract
//! in `docs/guest-abi.md`, nothing else.
//!
//! The image is `bare/start.rs`, with the entry point and what bare metal lacks, around this crate. The
//! host compiles the crate, too: for its image, and to test what needs no machine.

#![no_std]

/// The guest as an ELF file, which a machine boots.
#[cfg(not(bare))]
pub static IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guest.elf"));

mod boot;
mod demand;
mod descriptors;
mod dma;
mod exceptions;
mod machine;
mod memory;
pub mod options;
pub mod oracle;
mod pages;
mod paging;
pub mod permute;
mod plan;
mod probe;
mod ring0;
pub mod rng;
mod selftest;
pub mod serial;
mod shared;
mod vcpu;
mod worker;
mod workloads;
pub mod x86;

use gnomon_abi as abi;

use boot::BootParams;
use dma::DmaUnit;
use machine::{Machine, Results};
use memory::{FreeRam, PAGE_BYTES};
use options::{Mode, Options, Workload};
use oracle::Oracle;
use pages::WorkSet;
use paging::AddressSpace;
use selftest::Entry;
use shared::SharedArea;
use vcpu::{Barrier, Vcpu};

/// Most work pages in boot mode, so that a guest of any size is through in seconds.
const BOOT_PAGES: u64 = 65536;
/// Fewest work pages for each vCPU.
const LEAST_PAGES: u64 = 16;

unsafe extern "C" {
    static __image_start: u8;
    static __text_end: u8;
    static __rodata_end: u8;
    static __image_end: u8;
}

/// What the boot vCPU does, with the registers that it was entered with: RSI, and the others' bits in one.
pub extern "C" fn boot_main(boot_params: u64, other_registers: u64) -> ! {
    let entry = Entry {
        boot_params,
        other_registers,
        cr0: x86::cr0(),
        cr3: x86::cr3(),
        cr4: x86::cr4(),
        efer: x86::rdmsr(x86::MSR_EFER),
    };
    serial::init();
    // SAFETY: the boot protocol puts them there, identity-mapped as they will be in this guest's
    // own tables, and the boot area is not used for anything else.
    let boot = unsafe { BootParams::new(entry.boot_params) };
    let vcpus = x86::info(abi::INFO_VCPUS);
    let memory = x86::info(abi::INFO_MEMORY_BYTES);
    println!(
        "Gnomon test guest: ABI {}, {vcpus} vCPUs, {} MiB of memory",
        x86::info(abi::INFO_ABI_VERSION),
        memory >> 20
    );
    println!("command line: {}", boot.command_line());
    let options = Options::parse(boot.command_line(), |word| println!("ignored: {word}"));
    for range in boot.e820() {
        println!(
            "e820: {:#014x}..{:#014x} {}",
            range.start,
            range.start.saturating_add(range.bytes),
            range.kind_name()
        );
    }
    check_contract(vcpus, memory);

    // SAFETY: RAM above the image is zero and unused; both the boot tables and ours map it at its
    // physical address.
    let mut ram = unsafe { FreeRam::new(&raw const __image_end as u64, memory) };
    let machine = build(&mut ram, options, vcpus as u32, memory);
    let boot_vcpu = &machine.vcpus[0];
    // SAFETY: this is the boot vCPU, the only one to run, and this is its set-up.
    unsafe {
        exceptions::fill_idt();
        boot_vcpu.init();
    }
    selftest::run(machine, &entry, boot, memory, vcpus);
    watch_hot_pages(machine);
    vcpu::start_others(machine);
    println!(
        "work: {} pages in frames {:#x}..{:#x}, seed {:#x}",
        machine.work.pages(),
        machine.work.frames_of_first(1).0,
        machine.work.gfn(machine.work.pages() - 1) + 1,
        machine.options.seed
    );
    plan::run(machine, boot_vcpu);
    unreachable!("the boot vCPU ends the VM")
}

/// Has the host count the re-faults of the hot set separately.
fn watch_hot_pages(machine: &Machine) {
    if machine.options.selects(Workload::Hotscan) {
        let (first, count) = machine.work.frames_of_first(machine.hot_pages());
        // SAFETY: the call changes nothing in the guest.
        unsafe { x86::hypercall(abi::HC_WATCH, &[first, count]) };
    }
}

/// Stops at once if this guest and its host do not mean the same thing.
fn check_contract(vcpus: u64, memory: u64) {
    let version = x86::info(abi::INFO_ABI_VERSION);
    assert!(version == abi::ABI_VERSION, "host has ABI {version}");
    let most = abi::MAX_VCPUS as u64;
    assert!((1..=most).contains(&vcpus), "{vcpus} vCPUs");
    let window = x86::info(abi::INFO_WINDOW_BYTES);
    let ledger = memory / PAGE_BYTES * 4;
    assert!(window >= abi::CONTROL_BYTES + ledger, "pinned window too small: {window:#x} bytes");
    let control = control();
    assert!(
        control.magic == abi::CONTROL_MAGIC
            && u64::from(control.vcpus) == vcpus
            && control.memory_bytes == memory,
        "control block and HC_INFO disagree"
    );
}

fn control() -> &'static abi::Control {
    // SAFETY: the host keeps a control block there, mapped for good; what changes is atomic.
    unsafe { &*(abi::WINDOW_GPA as *const abi::Control) }
}

/// Makes the guest's own address space, switches to it, and lays out all memory.
fn build(ram: &mut FreeRam, options: Options, vcpus: u32, memory: u64) -> &'static Machine {
    let space = AddressSpace::new(ram);
    map_identity(ram, space, memory);
    // SAFETY: turns the NX bit on; no entry in use has it set.
    unsafe {
        x86::wrmsr(x86::MSR_EFER, abi::ENTRY_EFER | x86::EFER_NXE);
        x86::write_cr3(space.root().address());
    }
    let shared = SharedArea::new(ram, space);
    let all_vcpus = Vcpu::place_all(ram, vcpus, space);
    let dma = DmaUnit::place_all(ram, vcpus);
    let place = ram.reserve();
    let most = match options.mode {
        Mode::Boot => BOOT_PAGES,
        Mode::Stress => u64::MAX,
    };
    let least = u64::from(vcpus) * LEAST_PAGES;
    let most = options.pages.unwrap_or(most).min(most).max(least);
    let work = WorkSet::new(ram, space, most);
    assert!(work.pages() >= least, "out of memory: give the VM more");
    place.fill(Machine {
        control: control(),
        oracle: Oracle::new(options.seed, options.entropy_percent),
        options,
        space,
        work,
        shared,
        vcpus: all_vcpus,
        dma,
        barrier: Barrier::new(vcpus),
        results: Results::default(),
    })
}

/// Maps all RAM except page 0, and the pinned window, at their physical addresses. Code is
/// read-only, only code is executable.
fn map_identity(ram: &mut FreeRam, space: AddressSpace, memory: u64) {
    use paging::{NO_EXECUTE, WRITE};
    let text = &raw const __image_start as u64;
    let rodata = &raw const __text_end as u64;
    let data = &raw const __rodata_end as u64;
    let ranges = [
        (PAGE_BYTES, text, WRITE | NO_EXECUTE),
        (text, rodata, 0),
        (rodata, data, NO_EXECUTE),
        (data, memory, WRITE | NO_EXECUTE),
        (abi::WINDOW_GPA, abi::WINDOW_GPA + x86::info(abi::INFO_WINDOW_BYTES), WRITE | NO_EXECUTE),
    ];
    for (start, end, flags) in ranges {
        space.map(ram, start, start, end - start, flags);
    }
}
