//! What kind of KVM this is, measured on a VM of a few pages.
//!
//! Guarantee: the answers rest on what guest code does here, not on what modules or processors say
//! about themselves, and the VM is gone when they are there. A host that runs the few instructions
//! in another way than any known one is an error, not a guess.
//!
//! - *Ring 0*: a loop of simple instructions at CPL 0 runs natively or is emulated, one at a time.
//! - *Nested paging*: a page-table entry that is changed through the host mapping, past KVM's eyes,
//!   takes effect at the next CR3 exactly if the processor itself walks the tables. That is tried
//!   at CPL 3, which runs natively everywhere: an emulator would walk the tables, too.

use std::io;
use std::time::{Duration, Instant};

use kvm_bindings::{kvm_regs, kvm_segment};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::{ByteValued, Bytes, MmapRegion, VolatileMemory};

use super::kvm::{KvmDevice, KvmError, io_error};
use super::machine::map_pinned;

/// Bytes of memory, from machine address 0.
const MEMORY_BYTES: u64 = 0x1_0000;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const DIRECTORY: u64 = 0x3000;
const TABLE: u64 = 0x4000;
/// The loop.
const LOOP_CODE: u64 = 0x5000;
/// The load through the window.
const LOAD_CODE: u64 = 0x5800;
/// Two pages with different contents ...
const FIRST_PAGE: u64 = 0x6000;
const SECOND_PAGE: u64 = 0x7000;
/// Another root of the same tables, so that a load of CR3 is a change of it.
const OTHER_PML4: u64 = 0x9000;
/// ... one of which is mapped here.
const WINDOW: u64 = 0x8000;
const FIRST_CONTENT: u8 = 0x11;
const SECOND_CONTENT: u8 = 0x22;

/// Present, writable, for CPL 3 too.
const PTE: u64 = 0b111;
/// Ports that the code writes to.
const PORT_LOOPED: u16 = 0x10;
const PORT_LOADED: u16 = 0x11;

/// Rounds of the loop; each is two instructions.
const ROUNDS: u32 = 25_000;
/// The loop is timed so often; the shortest time is the one that nothing disturbed.
const SAMPLES: u32 = 3;
/// Above it an instruction was emulated: native ones take around 1 ns, emulated ones 800.
const NATIVE_BOUND: Duration = Duration::from_nanos(200);

const CR0_PE_ET_NE_WP_PG: u64 = 0x8001_0031;
const CR4_PAE: u64 = 0x20;
const EFER_LME_LMA: u64 = 0x500;
/// Bit 1, and ports for CPL 3.
const RFLAGS_FIXED_IOPL3: u64 = 0x3002;

/// What KVM says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvmOffer {
    /// Every capability that Gnomon needs, and whether it is there.
    pub capabilities: Vec<(&'static str, bool)>,
    /// Most vCPUs of one VM.
    pub max_vcpus: usize,
    /// Width of a machine address in bits.
    pub phys_bits: u32,
    /// Whether guests have no-execute pages.
    pub no_execute: bool,
}

impl KvmOffer {
    /// Asks KVM.
    ///
    /// # Errors
    /// [`KvmError`], if the device cannot be opened or does not say.
    pub fn ask() -> Result<Self, KvmError> {
        let device = KvmDevice::open_unchecked()?;
        let features = super::cpuid::features(device.guest_cpuid()?.as_slice());
        Ok(Self {
            capabilities: device.capabilities(),
            max_vcpus: device.max_vcpus(),
            phys_bits: features.phys_bits,
            no_execute: features.nx,
        })
    }
}

/// What was measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvmKind {
    /// Time of one simple instruction at CPL 0.
    pub ring0_instruction: Duration,
    /// Whether the processor translates machine addresses itself (EPT, NPT); otherwise KVM shadows
    /// the tables of its guests in software.
    pub nested_paging: bool,
}

impl KvmKind {
    /// Measures; takes a quarter of a second where ring 0 is emulated.
    ///
    /// # Errors
    /// [`KvmError`]: KVM is not usable, or ran the code in a way that makes no sense.
    pub fn measure() -> Result<Self, KvmError> {
        let device = KvmDevice::open()?;
        let cpuid = device.guest_cpuid()?;
        let memory = map_pinned("probe", MEMORY_BYTES)
            .map_err(|error| failed("mmap", io::Error::other(error)))?;
        write_memory(&memory)?;
        let vm = device.create_vm()?;
        vm.add_region(0, 0, &memory)?;
        let mut vcpu = vm.create_vcpu(0, &cpuid)?;
        let mut shortest = Duration::MAX;
        for _ in 0..SAMPLES {
            start(&vcpu, PML4, LOOP_CODE, Ring::Zero)?;
            let begun = Instant::now();
            expect_out(&mut vcpu, PORT_LOOPED)?;
            shortest = shortest.min(begun.elapsed());
        }
        start(&vcpu, PML4, LOAD_CODE, Ring::Three)?;
        let before = expect_out(&mut vcpu, PORT_LOADED)?;
        store(&memory, table_entry(WINDOW), SECOND_PAGE | PTE)?;
        start(&vcpu, OTHER_PML4, LOAD_CODE, Ring::Three)?;
        let after = expect_out(&mut vcpu, PORT_LOADED)?;
        let nested_paging = match (before, after) {
            (FIRST_CONTENT, SECOND_CONTENT) => true,
            (FIRST_CONTENT, FIRST_CONTENT) => false,
            other => return Err(senseless(format!("the guest read {other:x?}"))),
        };
        Ok(Self { ring0_instruction: shortest / (2 * ROUNDS), nested_paging })
    }

    /// Whether code at CPL 0 runs natively.
    #[must_use]
    pub fn is_ring0_native(&self) -> bool {
        self.ring0_instruction < NATIVE_BOUND
    }
}

/// Counts down, then writes to a port.
fn loop_code() -> Vec<u8> {
    let [port, _] = PORT_LOOPED.to_le_bytes();
    [
        &[0xb9][..], // mov ecx, ROUNDS
        &ROUNDS.to_le_bytes(),
        &[0x83, 0xe9, 0x01], // again: sub ecx, 1
        &[0x75, 0xfb],       // jnz again
        &[0xe6, port],       // out PORT_LOOPED, al
    ]
    .concat()
}

/// Writes the window's first byte to a port.
fn load_code() -> Vec<u8> {
    let [port, _] = PORT_LOADED.to_le_bytes();
    let [window @ .., _, _, _, _] = WINDOW.to_le_bytes();
    [
        &[0x8a, 0x04, 0x25][..], // mov al, [WINDOW]
        &window,
        &[0xe6, port], // out PORT_LOADED, al
    ]
    .concat()
}

/// Identity mapping of all pages but the window, contents, code.
fn write_memory(memory: &MmapRegion) -> Result<(), KvmError> {
    store(memory, PML4, PDPT | PTE)?;
    store(memory, OTHER_PML4, PDPT | PTE)?;
    store(memory, PDPT, DIRECTORY | PTE)?;
    store(memory, DIRECTORY, TABLE | PTE)?;
    for page in (0..MEMORY_BYTES).step_by(0x1000) {
        store(memory, table_entry(page), page | PTE)?;
    }
    store(memory, table_entry(WINDOW), FIRST_PAGE | PTE)?;
    store(memory, FIRST_PAGE, FIRST_CONTENT)?;
    store(memory, SECOND_PAGE, SECOND_CONTENT)?;
    write(memory, LOOP_CODE, &loop_code())?;
    write(memory, LOAD_CODE, &load_code())
}

/// Address of the page-table entry of a page below 2 MiB.
fn table_entry(page: u64) -> u64 {
    TABLE + (page >> 12) * 8
}

fn store<T: ByteValued>(memory: &MmapRegion, at: u64, value: T) -> Result<(), KvmError> {
    write(memory, at, value.as_slice())
}

fn write(memory: &MmapRegion, at: u64, bytes: &[u8]) -> Result<(), KvmError> {
    memory
        .as_volatile_slice()
        .write_slice(bytes, offset(at))
        .map_err(|error| failed("mmap", io::Error::other(error)))
}

fn offset(address: u64) -> usize {
    usize::try_from(address).unwrap_or(usize::MAX)
}

/// Privilege level of the guest's code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ring {
    Zero = 0,
    Three = 3,
}

/// Sets up 64-bit mode with the tables at `root`, at `rip`. There are no descriptor tables: nothing
/// loads a segment or takes an exception.
fn start(vcpu: &VcpuFd, root: u64, rip: u64, ring: Ring) -> Result<(), KvmError> {
    let mut sregs = vcpu.get_sregs().map_err(KvmError::request("KVM_GET_SREGS"))?;
    let data = kvm_segment {
        limit: u32::MAX,
        selector: 0x10 | ring as u16,
        type_: 3,
        present: 1,
        dpl: ring as u8,
        s: 1,
        db: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment { selector: 0x8 | ring as u16, type_: 11, db: 0, l: 1, ..data };
    [sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss] = [data; 5];
    sregs.cr0 = CR0_PE_ET_NE_WP_PG;
    sregs.cr3 = root;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME_LMA;
    vcpu.set_sregs(&sregs).map_err(KvmError::request("KVM_SET_SREGS"))?;
    let regs = kvm_regs { rip, rflags: RFLAGS_FIXED_IOPL3, ..Default::default() };
    vcpu.set_regs(&regs).map_err(KvmError::request("KVM_SET_REGS"))
}

/// Runs the guest until it writes to a port, which must be this one; returns what it wrote.
fn expect_out(vcpu: &mut VcpuFd, expected: u16) -> Result<u8, KvmError> {
    loop {
        return match vcpu.run() {
            Ok(VcpuExit::IoOut(port, &[value])) if port == expected => Ok(value),
            Ok(exit) => Err(senseless(format!("{exit:?} where port {expected:#x} was due"))),
            Err(error) if error.errno() == libc::EINTR || error.errno() == libc::EAGAIN => continue,
            Err(error) => Err(failed("KVM_RUN", io_error(error))),
        };
    }
}

fn senseless(what: String) -> KvmError {
    failed("KVM_RUN", io::Error::other(what))
}

fn failed(request: &'static str, source: io::Error) -> KvmError {
    KvmError::Request { request, source }
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions, Mnemonic};

    use super::*;

    fn decode(code: &[u8], at: u64) -> Vec<iced_x86::Instruction> {
        Decoder::with_ip(64, code, at, DecoderOptions::NONE).iter().collect()
    }

    #[test]
    fn the_programs_are_what_their_comments_say() {
        use Mnemonic::{Jne, Mov, Out, Sub};
        let mnemonics = |code: &[iced_x86::Instruction]| -> Vec<Mnemonic> {
            code.iter().map(iced_x86::Instruction::mnemonic).collect()
        };
        let counting = decode(&loop_code(), LOOP_CODE);
        assert_eq!(mnemonics(&counting), [Mov, Sub, Jne, Out]);
        assert_eq!(counting[0].immediate32(), ROUNDS);
        assert_eq!(counting[2].near_branch64(), counting[1].ip(), "jumps to the sub");
        assert_eq!(u16::from(counting[3].immediate8()), PORT_LOOPED);
        let loading = decode(&load_code(), LOAD_CODE);
        assert_eq!(mnemonics(&loading), [Mov, Out]);
        assert_eq!(loading[0].memory_displacement64(), WINDOW);
        assert_eq!(u16::from(loading[1].immediate8()), PORT_LOADED);
    }

    #[test]
    fn the_window_is_mapped_to_the_first_page_and_the_rest_to_itself() {
        let memory = map_pinned("probe", MEMORY_BYTES).unwrap();
        write_memory(&memory).unwrap();
        let read = |at: u64| -> u64 { memory.as_volatile_slice().read_obj(offset(at)).unwrap() };
        assert_eq!(read(table_entry(LOOP_CODE)), LOOP_CODE | PTE);
        assert_eq!(read(table_entry(WINDOW)), FIRST_PAGE | PTE);
        assert_eq!((read(PML4), read(OTHER_PML4)), (PDPT | PTE, PDPT | PTE));
        assert_ne!(read(FIRST_PAGE) & 0xff, read(SECOND_PAGE) & 0xff);
    }

    #[test]
    fn emulated_and_native_instructions_are_far_apart() {
        let kind =
            |nanos| KvmKind { ring0_instruction: Duration::from_nanos(nanos), nested_paging: true };
        assert!(kind(5).is_ring0_native() && !kind(800).is_ring0_native());
    }

    #[test]
    fn this_kvm_is_measured() {
        match KvmKind::measure() {
            Ok(kind) => {
                // An emulated ring 0 comes only from a KVM that shadows in software.
                assert!(kind.is_ring0_native() || !kind.nested_paging, "{kind:?}");
                assert_eq!(KvmKind::measure().unwrap().nested_paging, kind.nested_paging);
                assert!(KvmOffer::ask().unwrap().capabilities.iter().all(|(_, there)| *there));
            }
            Err(error) => {
                assert!(std::env::var_os("GNOMON_REQUIRE_KVM").is_none(), "{error}");
                eprintln!("no KVM to measure: {error}");
            }
        }
    }
}
