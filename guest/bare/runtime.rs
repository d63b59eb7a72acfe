//! What freestanding Rust needs from its surroundings: the `mem*` functions and a panic handler.
//!
//! The memory functions are assembly, because a loop in Rust may be compiled into a call of the
//! very function that it stands in.

use core::arch::global_asm;
use core::panic::PanicInfo;

use gnomon_guest::{println, serial, x86};

global_asm!(
    r#"
    .section .text.runtime, "ax", @progbits

    .globl memcpy
    memcpy:
        mov rax, rdi
        mov rcx, rdx
        rep movsb
        ret

    .globl memmove
    memmove:
        mov rax, rdi
        mov rcx, rdx
        mov rdx, rdi
        sub rdx, rsi
        cmp rdx, rcx
        jb 2f
        rep movsb
        ret
    2:  lea rdi, [rdi + rcx - 1]
        lea rsi, [rsi + rcx - 1]
        std
        rep movsb
        cld
        ret

    .globl memset
    memset:
        mov r8, rdi
        mov eax, esi
        mov rcx, rdx
        rep stosb
        mov rax, r8
        ret

    .globl memcmp
    .globl bcmp
    memcmp:
    bcmp:
        xor eax, eax
        mov rcx, rdx
        cmp rcx, rcx
        repe cmpsb
        je 3f
        movzx eax, byte ptr [rdi - 1]
        movzx ecx, byte ptr [rsi - 1]
        sub eax, ecx
    3:  ret
    "#
);

/// Prebuilt `core` refers to it from its unwind tables, which the linker script drops.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    serial::force_unlock();
    println!("guest panic: {}", info.message());
    if let Some(place) = info.location() {
        println!("  at {}:{}", place.file(), place.line());
    }
    x86::exit(x86::EXIT_PANIC)
}
