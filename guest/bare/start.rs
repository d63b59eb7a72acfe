//! The test guest's entry point, and what freestanding Rust needs from its surroundings. Everything else is
//! the crate in `src/`, which the host compiles, too.

#![no_std]
#![no_main]

mod runtime;

use core::arch::global_asm;

global_asm!(
    r#"
    .section .text.entry, "ax", @progbits
    .globl guest_entry
    guest_entry:
        or rax, rbx
        or rax, rcx
        or rax, rdx
        or rax, rdi
        or rax, rbp
        or rax, rsp
        or rax, r8
        or rax, r9
        or rax, r10
        or rax, r11
        or rax, r12
        or rax, r13
        or rax, r14
        or rax, r15
        mov rdi, rsi
        mov rsi, rax
        lea rsp, [rip + boot_stack_top]
        xor ebp, ebp
        mov eax, cs
        test al, 3
        jnz 1f
        call ring0_enter
    1:
        call {main}
        ud2

    .section .bss.boot_stack, "aw", @nobits
    .balign 4096
    boot_stack:
        .skip 65536
    boot_stack_top:
    "#,
    main = sym gnomon_guest::boot_main,
);
