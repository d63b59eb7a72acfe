//! `ins` and `outs`.

use super::*;

const OUTSB: &[u8] = &[0x6e];
const REP_OUTSD: &[u8] = &[0xf3, 0x6f];
const REP_INSW: &[u8] = &[0xf3, 0x66, 0x6d];
const INSB: &[u8] = &[0x6c];

fn at(rsi: u64, rdi: u64, rcx: u64) -> GuestCpu {
    let mut cpu = cpu();
    (cpu.gpr[gpr::RSI], cpu.gpr[gpr::RDI], cpu.gpr[gpr::RCX]) = (rsi, rdi, rcx);
    cpu.gpr[gpr::RDX] = 0xffff_0080;
    cpu
}

fn element(cpu: &mut GuestCpu, memory: &FakeMemory) -> Effect {
    emulate(cpu, memory, 0).unwrap().effect
}

#[test]
fn a_string_goes_out_an_element_at_a_time() {
    let memory = memory(REP_OUTSD);
    memory.put(0x3000, &[1, 2, 3, 4, 5, 6, 7, 8]);
    let mut cpu = at(0x3000, 7, 2);
    let out = |value| Effect::PortWrite { port: 0x80, width: PortWidth::Dword, value };
    assert_eq!(element(&mut cpu, &memory), out(0x0403_0201));
    assert_eq!((cpu.rip, cpu.gpr[gpr::RSI], cpu.gpr[gpr::RCX]), (RIP, 0x3004, 1));
    assert_eq!(element(&mut cpu, &memory), out(0x0807_0605));
    assert_eq!((cpu.rip, cpu.gpr[gpr::RSI], cpu.gpr[gpr::RCX]), (RIP + 2, 0x3008, 0));
    assert_eq!(cpu.gpr[gpr::RDI], 7);
    // RCX is 0: nothing happens at all, wherever RSI points to.
    (cpu.rip, cpu.gpr[gpr::RSI]) = (RIP, 1 << 63);
    assert_eq!(element(&mut cpu, &memory), Effect::None);
    assert_eq!(cpu.rip, RIP + 2);
}

#[test]
fn a_string_comes_in_where_it_may_be_written() {
    let mut memory = memory(REP_INSW);
    memory.protect(0x4000);
    let mut cpu = at(7, 0x3ffc, 3);
    let into = |gva| Effect::PortRead {
        port: 0x80,
        width: PortWidth::Word,
        into: Destination::Memory(gva),
    };
    assert_eq!(element(&mut cpu, &memory), into(0x3ffc));
    assert_eq!(element(&mut cpu, &memory), into(0x3ffe));
    // The third is on the next page: a fault before the port is read, in the middle of the string.
    assert_eq!(raises(&cpu, &memory, 0), Exception::page_fault(0x4000, 3));
    assert_eq!((cpu.rip, cpu.gpr[gpr::RDI], cpu.gpr[gpr::RCX]), (RIP, 0x4000, 1));
    // Half of an element.
    cpu.gpr[gpr::RDI] = 0x3fff;
    assert_eq!(raises(&cpu, &memory, 0), Exception::page_fault(0x4000, 3));
}

#[test]
fn downward_without_a_count_and_by_other_segments() {
    let outsb = memory(OUTSB);
    outsb.put(0x3000, &[9]);
    let mut cpu = at(0x3000, 0, 0);
    cpu.rflags |= rflags::DF;
    let out = |value| Effect::PortWrite { port: 0x80, width: PortWidth::Byte, value };
    assert_eq!(element(&mut cpu, &outsb), out(9));
    assert_eq!((cpu.rip, cpu.gpr[gpr::RSI], cpu.gpr[gpr::RCX]), (RIP + 1, 0x2fff, 0));
    // gs outsb
    let by_gs = memory(&[0x65, 0x6e]);
    by_gs.put(0x3010, &[5]);
    let mut cpu = at(0x10, 0, 0);
    cpu.gs_base = 0x3000;
    assert_eq!(element(&mut cpu, &by_gs), out(5));
    // An element of `ins` and of `outs` beyond the limit.
    let mut cpu = at(crate::abi::GVA_LIMIT, u64::MAX, 1);
    assert_eq!(raises(&cpu, &outsb, 0), Exception::general_protection(0));
    assert_eq!(raises(&cpu, &memory(INSB), 0), Exception::general_protection(0));
    cpu.gpr[gpr::RSI] = 0x5000_0000;
    let stop = emulate(&mut cpu, &outsb, 0).unwrap_err();
    assert!(matches!(stop, Stop::Guest(GuestError::OutsideRam { .. })));
}

#[test]
fn with_32_bit_addresses_registers_wrap_at_32_bits() {
    // rep outsb with an address-size prefix
    let memory = memory(&[0x67, 0xf3, 0x6e]);
    memory.put(0, &[3]);
    let mut cpu = at(0xffff_ffff_0000_0000, 0, 0xdead_0000_0001);
    cpu.rflags |= rflags::DF;
    let out = Effect::PortWrite { port: 0x80, width: PortWidth::Byte, value: 3 };
    assert_eq!(element(&mut cpu, &memory), out);
    assert_eq!((cpu.gpr[gpr::RSI], cpu.gpr[gpr::RCX], cpu.rip), (0xffff_ffff, 0, RIP + 3));
}
