//! Emulation of the privileged instructions of a guest that runs at CPL 3.
//!
//! Guarantee: [`emulate`] either completes one instruction or leaves the state untouched and says
//! why. It trusts nothing: the instruction is fetched and its operands are read with the guest's
//! own rights, and no guest state makes it loop or panic. It knows neither KVM nor the shadow MMU;
//! what has to happen outside the guest's state comes back as an [`Effect`].
//!
//! An instruction that is not privileged and still raised #GP (a non-canonical address, a selector
//! that is not the guest's own) gets its #GP delivered. One that CPUID does not name raises #UD, as on a
//! processor without it. A privileged one that is not in the list of `docs/guest-abi.md` ends the guest
//! with its disassembly.

mod absent;
mod control;
mod msr;
mod operand;
mod port;
mod segment;

use iced_x86::{
    Decoder, DecoderError, DecoderOptions, Formatter, Instruction, Mnemonic, NasmFormatter,
    Register,
};

use crate::addr::{Gva, PAGE_SIZE};
use crate::shadow_mmu::Access;
use crate::vmm::error::GuestError;

use super::exceptions::{Exception, Stop, vector};
use super::memory::{AccessError, VirtualMemory};
use super::state::{GuestCpu, gpr, rflags};

/// Longest instruction (Intel SDM Vol. 2, 2.3.11).
const MAX_INSTRUCTION_BYTES: usize = 15;

/// Width of a port access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortWidth {
    /// 8 bits.
    Byte,
    /// 16 bits.
    Word,
    /// 32 bits.
    Dword,
}

impl PortWidth {
    /// The width in bytes.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::Byte => 1,
            Self::Word => 2,
            Self::Dword => 4,
        }
    }

    /// The width of `bytes` bytes, if ports have it.
    #[must_use]
    pub const fn from_bytes(bytes: usize) -> Option<Self> {
        match bytes {
            1 => Some(Self::Byte),
            2 => Some(Self::Word),
            4 => Some(Self::Dword),
            _ => None,
        }
    }

    /// All bits of this width set.
    #[must_use]
    pub const fn mask(self) -> u32 {
        match self {
            Self::Byte => 0xff,
            Self::Word => 0xffff,
            Self::Dword => u32::MAX,
        }
    }
}

/// What an instruction asks of the world outside the guest's registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// CR3 was written or a paging control changed: find the shadow root, forget what that forgets.
    LoadRoot,
    /// `invlpg`: forget the translation of this address.
    FlushPage(Gva),
    /// `hlt`: park the vCPU.
    Halt,
    /// `cpuid`: the answer goes into EAX, EBX, ECX and EDX.
    Cpuid {
        /// EAX.
        leaf: u32,
        /// ECX.
        subleaf: u32,
    },
    /// `int vector` at `rip`: deliver that.
    Interrupt {
        /// Vector.
        vector: u8,
        /// Address of the instruction.
        rip: u64,
    },
    /// `in` and `ins`.
    PortRead {
        /// First port.
        port: u16,
        /// Width.
        width: PortWidth,
        /// Where the value goes.
        into: Destination,
    },
    /// `out`.
    PortWrite {
        /// First port.
        port: u16,
        /// Width.
        width: PortWidth,
        /// Value, zero above its width.
        value: u32,
    },
}

/// Where the value of a port goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// AL, AX or EAX ([`GuestCpu::complete_port_read`]).
    Accumulator,
    /// This guest virtual address, which the guest may write.
    Memory(u64),
}

/// An instruction that was completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Emulated {
    /// What remains to be done outside.
    pub effect: Effect,
    /// TF was set before the instruction, which does not hold it back: #DB is due after it.
    pub single_step: bool,
}

/// Emulates the instruction at `cpu.rip`, which raised #GP with `error_code`.
///
/// # Errors
/// [`Stop`]; `cpu` is then unchanged.
pub fn emulate(
    cpu: &mut GuestCpu,
    memory: &dyn VirtualMemory,
    error_code: u32,
) -> Result<Emulated, Stop> {
    let instruction = fetch(cpu, memory, error_code)?;
    let mut step = Step { cpu: cpu.clone(), memory, instruction };
    step.cpu.rip = instruction.next_ip();
    let effect = step.execute(error_code)?;
    let single_step = cpu.rflags & rflags::TF != 0 && !holds_traps_back(&instruction);
    *cpu = step.cpu;
    // All clear it but `iretq`, which has it from the stack.
    if instruction.mnemonic() != Mnemonic::Iretq {
        cpu.rflags &= !rflags::RF;
    }
    Ok(Emulated { effect, single_step })
}

/// Emulates the instruction at `cpu.rip`, which raised #UD, if it is `int n`: some hosts refuse that at
/// CPL 3 so. `None` if it is not, or cannot be fetched.
pub fn emulate_interrupt(cpu: &mut GuestCpu, memory: &dyn VirtualMemory) -> Option<Emulated> {
    let instruction = fetch(cpu, memory, 0).ok()?;
    if instruction.mnemonic() != Mnemonic::Int {
        return None;
    }
    emulate(cpu, memory, 0).ok()
}

/// The vector that `int3` or `int 3` behind `rip` asked for, with the instruction's address. Prefixes
/// are no part of it: they cannot be told from the code before.
pub fn asked_behind(cpu: &GuestCpu, memory: &dyn VirtualMemory, vector: u8) -> Exception {
    const INT3: u8 = 0xcc;
    let mut last = [0];
    let before = cpu.rip.wrapping_sub(1);
    let is_short = vector == vector::BP
        && memory.read(&cpu.paging(), before, &mut last, Access::Execute).is_ok()
        && last == [INT3];
    Exception::asked(vector, if is_short { before } else { cpu.rip.wrapping_sub(2) })
}

/// `mov ss` holds a debug trap back until after the next instruction (Intel SDM Vol. 3, 7.8.3); `int n`
/// clears TF before one is due.
fn holds_traps_back(instruction: &Instruction) -> bool {
    instruction.mnemonic() == Mnemonic::Int || instruction.op0_register() == Register::SS
}

/// Fetches and decodes the instruction at `cpu.rip`. An instruction whose last bytes lie on a
/// page that cannot be fetched raises that page's fault only if it really extends there.
fn fetch(cpu: &GuestCpu, memory: &dyn VirtualMemory, error_code: u32) -> Result<Instruction, Stop> {
    let paging = cpu.paging();
    let mut bytes = [0u8; MAX_INSTRUCTION_BYTES];
    let to_page_end = PAGE_SIZE - Gva::new(cpu.rip).page_offset();
    let first = to_page_end.min(MAX_INSTRUCTION_BYTES);
    memory.read(&paging, cpu.rip, &mut bytes[..first], Access::Execute)?;
    let (fetched, missing) = if first == MAX_INSTRUCTION_BYTES {
        (first, None)
    } else {
        let next_page = cpu.rip.wrapping_add(first as u64);
        match memory.read(&paging, next_page, &mut bytes[first..], Access::Execute) {
            Ok(()) => (MAX_INSTRUCTION_BYTES, None),
            Err(error @ AccessError::Host(_)) => return Err(error.into()),
            Err(error) => (first, Some(error)),
        }
    };
    let mut decoder = Decoder::with_ip(64, &bytes[..fetched], cpu.rip, DecoderOptions::NONE);
    let instruction = decoder.decode();
    match (decoder.last_error(), missing) {
        (DecoderError::None, _) => Ok(instruction),
        (DecoderError::NoMoreBytes, Some(error)) => Err(error.into()),
        _ if absent::is_move_of_no_register(&bytes[..fetched], cpu.rip) => Err(absent::undefined()),
        // Not what the processor saw (another vCPU may have changed it), or not in the decoder's
        // tables: the #GP stands as it was raised.
        _ => Err(Stop::Inject(Exception::general_protection(error_code))),
    }
}

/// One instruction in flight: works on a copy of the state that the caller commits.
struct Step<'a> {
    cpu: GuestCpu,
    memory: &'a dyn VirtualMemory,
    instruction: Instruction,
}

impl Step<'_> {
    fn execute(&mut self, error_code: u32) -> Result<Effect, Stop> {
        match self.instruction.mnemonic() {
            Mnemonic::Mov => self.mov(error_code),
            Mnemonic::Clts => self.clts(),
            Mnemonic::Invlpg => self.invlpg(),
            Mnemonic::Hlt => Ok(Effect::Halt),
            // There are no interrupts, and the flag is always set.
            Mnemonic::Cli | Mnemonic::Sti => Ok(Effect::None),
            Mnemonic::Cpuid => Ok(Effect::Cpuid {
                leaf: low_u32(self.cpu.gpr[gpr::RAX]),
                subleaf: low_u32(self.cpu.gpr[gpr::RCX]),
            }),
            Mnemonic::Int => Ok(Effect::Interrupt {
                vector: self.instruction.immediate8(),
                rip: self.instruction.ip(),
            }),
            Mnemonic::Lmsw => self.lmsw(),
            Mnemonic::Lldt => self.lldt(),
            Mnemonic::Xsetbv if self.cpu.features.xsave => self.xsetbv(),
            Mnemonic::Lgdt => self.load_descriptor_table(),
            Mnemonic::Lidt => self.load_descriptor_table(),
            Mnemonic::Ltr => self.ltr(),
            Mnemonic::Rdmsr => self.rdmsr(),
            Mnemonic::Wrmsr => self.wrmsr(),
            Mnemonic::Swapgs => {
                std::mem::swap(&mut self.cpu.gs_base, &mut self.cpu.kernel_gs_base);
                Ok(Effect::None)
            }
            // Caches are the host's business.
            Mnemonic::Wbinvd | Mnemonic::Wbnoinvd | Mnemonic::Invd => Ok(Effect::None),
            Mnemonic::In => self.port_in(),
            Mnemonic::Out => self.port_out(),
            Mnemonic::Insb => self.port_in_string(PortWidth::Byte),
            Mnemonic::Insw => self.port_in_string(PortWidth::Word),
            Mnemonic::Insd => self.port_in_string(PortWidth::Dword),
            Mnemonic::Outsb => self.port_out_string(PortWidth::Byte),
            Mnemonic::Outsw => self.port_out_string(PortWidth::Word),
            Mnemonic::Outsd => self.port_out_string(PortWidth::Dword),
            Mnemonic::Iretq => self.iretq(),
            mnemonic if absent::is_absent(mnemonic) => Err(absent::undefined()),
            _ => self.other(error_code),
        }
    }

    /// Everything without an emulation.
    fn other(&self, error_code: u32) -> Result<Effect, Stop> {
        if self.instruction.is_privileged() {
            return Err(
                GuestError::UnsupportedInstruction { instruction: self.disassembly() }.into()
            );
        }
        Err(Stop::Inject(Exception::general_protection(error_code)))
    }

    fn mov(&mut self, error_code: u32) -> Result<Effect, Stop> {
        let target = self.instruction.op0_register();
        let source = self.instruction.op1_register();
        if target.is_cr() {
            self.mov_to_control(target, source)
        } else if source.is_cr() {
            self.mov_from_control(target, source)
        } else if target == Register::SS {
            self.mov_to_ss(error_code)
        } else {
            self.other(error_code)
        }
    }

    fn disassembly(&self) -> String {
        let mut text = String::new();
        NasmFormatter::new().format(&self.instruction, &mut text);
        text
    }
}

/// The low 16 bits.
pub(super) const fn low_u16(value: u64) -> u16 {
    // Truncation is the point.
    #[allow(clippy::cast_possible_truncation)]
    let low = value as u16;
    low
}

/// The low 32 bits.
pub(in crate::vmm) const fn low_u32(value: u64) -> u32 {
    // Truncation is the point.
    #[allow(clippy::cast_possible_truncation)]
    let low = value as u32;
    low
}

/// #GP(0).
fn general_protection() -> Stop {
    Stop::Inject(Exception::general_protection(0))
}

#[cfg(test)]
mod tests;
