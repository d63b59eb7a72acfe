//! Delivery of an exception through the guest's IDT, as the processor would do it.
//!
//! Guarantee: after [`deliver`] returned `Ok`, the guest's state is exactly what delivery of the
//! exception (or of the #DF that it turned into) leaves behind; on a triple fault the guest is
//! ended. The number of steps is bounded: at most one benign exception, one contributory or page
//! fault, one double fault. What was pushed before a push failed stays, as on hardware.
//!
//! Source: Intel SDM Vol. 3, 7.13 (error codes), 7.14 (64-bit mode handling) and table 7-5 (double
//! fault).

use crate::addr::{Gva, PAGE_SIZE_U64};
use crate::shadow_mmu::Access;
use crate::vmm::error::GuestError;

use super::exceptions::{Exception, Stop, vector};
use super::memory::{AccessError, VirtualMemory, is_usable};
use super::state::{GUEST_CS, GUEST_SS, GuestCpu, gpr, is_canonical, rflags};

/// Bytes of a 64-bit gate.
const GATE_BYTES: usize = 16;
/// Offset of IST1 in a 64-bit TSS.
const TSS_IST1: u64 = 0x24;
/// Error-code bit: the index is into the IDT.
const IDT: u32 = 2;

/// How exceptions combine (Intel SDM Vol. 3, tables 7-4 and 7-5).
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Benign,
    Contributory,
    PageFault,
    DoubleFault,
}

fn class(exception: &Exception) -> Class {
    if exception.asked_at.is_some() {
        return Class::Benign;
    }
    match exception.vector {
        vector::DE | vector::TS | vector::NP | vector::SS | vector::GP | vector::CP => {
            Class::Contributory
        }
        vector::PF | vector::VE => Class::PageFault,
        vector::DF => Class::DoubleFault,
        _ => Class::Benign,
    }
}

/// What comes of `second` having been raised while `first` was delivered.
fn combine(first: &Exception, second: Exception) -> Option<Exception> {
    match (class(first), class(&second)) {
        (Class::DoubleFault, _) => None,
        (Class::Contributory, Class::Contributory)
        | (Class::PageFault, Class::Contributory | Class::PageFault) => {
            Some(Exception::with_code(vector::DF, 0))
        }
        _ => Some(second),
    }
}

/// Delivers `exception` to the guest; returns the vector that was delivered in the end.
///
/// # Errors
/// [`Stop::Guest`] with [`GuestError::TripleFault`], or when the guest's tables lead outside its
/// memory; [`Stop::Host`] when the host failed. Never [`Stop::Inject`].
pub fn deliver(
    cpu: &mut GuestCpu,
    memory: &dyn VirtualMemory,
    exception: Exception,
) -> Result<u8, Stop> {
    let mut current = exception;
    loop {
        // A page fault's address is in CR2 even if its delivery then fails.
        if let Some(cr2) = current.cr2 {
            cpu.cr2 = cr2;
        }
        match deliver_once(cpu, memory, &current) {
            Ok(()) => return Ok(current.vector),
            Err(Stop::Inject(second)) => match combine(&current, second) {
                Some(next) => {
                    // What cannot be delivered has not been asked for yet.
                    cpu.rip = current.asked_at.unwrap_or(cpu.rip);
                    if let Some(cr2) = second.cr2 {
                        cpu.cr2 = cr2;
                    }
                    current = next;
                }
                None => {
                    return Err(Stop::Guest(GuestError::TripleFault {
                        first: exception.vector,
                        code: exception.error_code.unwrap_or(0),
                        cr2: cpu.cr2,
                    }));
                }
            },
            Err(stop) => return Err(stop),
        }
    }
}

/// A decoded 64-bit interrupt or trap gate.
struct Gate {
    target: u64,
    ist: u8,
}

fn fault(vector: u8, error_code: u32) -> Stop {
    Stop::Inject(Exception::with_code(vector, error_code))
}

fn read_gate(
    cpu: &GuestCpu,
    memory: &dyn VirtualMemory,
    exception: &Exception,
) -> Result<Gate, Stop> {
    let offset = u64::from(exception.vector) * GATE_BYTES as u64;
    let ext = exception.external();
    let code = u32::from(exception.vector) * 8 + IDT + ext;
    if offset + GATE_BYTES as u64 - 1 > u64::from(cpu.idtr.limit) {
        return Err(fault(vector::GP, code));
    }
    let address = cpu.idtr.base.wrapping_add(offset);
    let mut raw = [0u8; GATE_BYTES];
    memory.read(&cpu.paging(), address, &mut raw, Access::Read)?;
    let low =
        u64::from_le_bytes([raw[0], raw[1], raw[6], raw[7], raw[8], raw[9], raw[10], raw[11]]);
    let selector = u16::from_le_bytes([raw[2], raw[3]]);
    let kind = raw[5] & 0x1f;
    if kind != 0xe && kind != 0xf {
        return Err(fault(vector::GP, code));
    }
    if raw[5] & 0x80 == 0 {
        return Err(fault(vector::NP, code));
    }
    // The RPL of a gate's selector is ignored. Guest code has one code segment only.
    if selector & !3 != GUEST_CS & !3 {
        return Err(fault(vector::GP, u32::from(selector & !3) | ext));
    }
    if !is_canonical(low) {
        return Err(fault(vector::GP, ext));
    }
    // The gate's type would decide about IF, which is always set.
    Ok(Gate { target: low, ist: raw[4] & 7 })
}

/// The stack pointer that delivery starts from, before the frame is pushed.
fn new_stack(cpu: &GuestCpu, memory: &dyn VirtualMemory, ist: u8, ext: u32) -> Result<u64, Stop> {
    if ist == 0 {
        return Ok(cpu.gpr[gpr::RSP] & !0xf);
    }
    let offset = TSS_IST1 + u64::from(ist - 1) * 8;
    if offset + 7 > u64::from(cpu.task.limit) {
        return Err(fault(vector::TS, u32::from(cpu.task.selector & !3) | ext));
    }
    let mut raw = [0u8; 8];
    memory.read(&cpu.paging(), cpu.task.base.wrapping_add(offset), &mut raw, Access::Read)?;
    Ok(u64::from_le_bytes(raw) & !0xf)
}

fn deliver_once(
    cpu: &mut GuestCpu,
    memory: &dyn VirtualMemory,
    exception: &Exception,
) -> Result<(), Stop> {
    let gate = read_gate(cpu, memory, exception)?;
    let top = new_stack(cpu, memory, gate.ist, exception.external())?;

    let mut frame = Vec::with_capacity(48);
    if let Some(code) = exception.error_code {
        frame.extend_from_slice(&u64::from(code).to_le_bytes());
    }
    let flags = if exception.is_fault() { cpu.rflags | rflags::RF } else { cpu.rflags };
    let saved = [cpu.rip, u64::from(GUEST_CS), flags, cpu.gpr[gpr::RSP], u64::from(GUEST_SS)];
    for word in saved {
        frame.extend_from_slice(&word.to_le_bytes());
    }
    let rsp = top.wrapping_sub(frame.len() as u64);
    if !is_usable(rsp, frame.len()) {
        return Err(fault(vector::SS, exception.external()));
    }
    push(cpu, memory, rsp, &frame)?;

    cpu.gpr[gpr::RSP] = rsp;
    cpu.rip = gate.target;
    cpu.rflags &= !(rflags::TF | rflags::NT | rflags::RF | rflags::VM);
    Ok(())
}

/// Writes `frame` to `rsp` in the order in which its words are pushed, from the top down: a fault is
/// that of the first push that fails, with its address.
fn push(cpu: &GuestCpu, memory: &dyn VirtualMemory, rsp: u64, frame: &[u8]) -> Result<(), Stop> {
    let to_page_end = PAGE_SIZE_U64 - Gva::new(rsp).page_offset() as u64;
    let split = usize::try_from(to_page_end).unwrap_or(usize::MAX).min(frame.len());
    let (lower, upper) = frame.split_at(split);
    for (address, part) in [(rsp + lower.len() as u64, upper), (rsp, lower)] {
        if part.is_empty() {
            continue;
        }
        let first_push = Gva::new(address + part.len() as u64 - 8);
        memory.write(&cpu.paging(), address, part).map_err(|error| match error {
            AccessError::PageFault { error_code, .. } => {
                AccessError::PageFault { gva: first_push, error_code }
            }
            other => other,
        })?;
    }
    Ok(())
}

#[cfg(test)]
#[path = "deliver_tests.rs"]
mod tests;
