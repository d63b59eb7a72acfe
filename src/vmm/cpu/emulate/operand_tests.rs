//! Operands that are at no address.

use super::*;

const STACK_FAULT: Exception = Exception::with_code(vector::SS, 0);
const GENERAL: Exception = Exception::general_protection(0);
const NOT_CANONICAL: u64 = 1 << 63;

/// R13, whose number in an encoding is RBP's but for a prefix.
const R13: usize = 13;

/// What comes of `code` with `address` in RBX, RSP, RBP and R13.
fn at(address: u64, code: &[u8]) -> Exception {
    let mut cpu = cpu();
    for register in [gpr::RBX, gpr::RSP, gpr::RBP, R13] {
        cpu.gpr[register] = address;
    }
    raises(&cpu, &memory(code), 0)
}

#[test]
fn what_is_not_canonical_by_way_of_the_stack_pointers_is_a_stack_fault() {
    for code in [
        // lgdt [rsp], lidt [rbp+0], lgdt [rbp+rsi], lmsw [rsp], lldt [rbp+0], ltr [rbp+0]
        &[0x0f, 0x01, 0x14, 0x24][..],
        &[0x0f, 0x01, 0x5d, 0],
        &[0x0f, 0x01, 0x54, 0x35, 0],
        &[0x0f, 0x01, 0x34, 0x24],
        &[0x0f, 0x00, 0x55, 0],
        &[0x0f, 0x00, 0x5d, 0],
        // mov ss, [rbp+0]; lgdt ds:[rbp+0], whose override means nothing; iretq
        &[0x8e, 0x55, 0],
        &[0x3e, 0x0f, 0x01, 0x55, 0],
        &[0x48, 0xcf],
    ] {
        for address in [NOT_CANONICAL, 1 << 47, (1 << 47) + 0x1000] {
            assert_eq!(at(address, code), STACK_FAULT, "{code:x?} at {address:#x}");
        }
        // All canonical, but no guest's.
        for address in [crate::abi::GVA_LIMIT, 0xffff_8000_0000_0000] {
            assert_eq!(at(address, code), GENERAL, "{code:x?} at {address:#x}");
        }
    }
    // The first byte is canonical, and the last is not.
    assert_eq!(at((1 << 47) - 4, &[0x0f, 0x01, 0x55, 0]), STACK_FAULT);
}

#[test]
fn any_other_operand_that_is_not_canonical_is_a_general_protection_fault() {
    for code in [
        // lgdt [rbx], lgdt [r13+0], lgdt ss:[rbx], lgdt fs:[rbp+0], lgdt gs:[rsp]
        &[0x0f, 0x01, 0x13][..],
        &[0x41, 0x0f, 0x01, 0x55, 0],
        &[0x36, 0x0f, 0x01, 0x13],
        &[0x64, 0x0f, 0x01, 0x55, 0],
        &[0x65, 0x0f, 0x01, 0x14, 0x24],
    ] {
        assert_eq!(at(NOT_CANONICAL, code), GENERAL, "{code:x?}");
    }
}

#[test]
fn a_page_fault_is_one_by_way_of_the_stack_pointers_too() {
    let mut memory = memory(&[0x0f, 0x01, 0x55, 0]);
    memory.unmap(0x3000);
    let mut cpu = cpu();
    cpu.gpr[gpr::RBP] = 0x2ffc;
    assert_eq!(raises(&cpu, &memory, 0), Exception::page_fault(0x3000, 0));
}
