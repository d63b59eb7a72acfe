//! The part of the guest that runs at CPL 0, where the guest was entered there (direct paging).
//!
//! Everything else runs at CPL 3 in any case: with shadow paging because nothing else is to be had,
//! here because some hosts emulate CPL 0, slowly and in part. So this part is small and in assembly:
//! - it enters CPL 3, with a bitmap in the TSS that lets the ports be used there (some hosts heed no
//!   I/O privilege level);
//! - it sends exceptions back to CPL 3, to the handlers and stacks that the guest has for them, in
//!   the form in which the contract (`docs/guest-abi.md`) has them delivered with shadow paging;
//! - it carries out the privileged instructions that the rest asks for. The gate is a `hlt` at an
//!   address of its own, which traps: `syscall` would want `swapgs` and `sysret`.

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicU32, Ordering};

use crate::descriptors::{IO_BITMAP, TSS_BYTES, TSS_SELECTOR};
use crate::exceptions::stubs;

/// What CPL 3 can ask for.
#[derive(Clone, Copy)]
#[repr(u64)]
pub enum Service {
    Invlpg = 0,
    WriteCr3 = 1,
    ReadCr3 = 2,
    ReadCr2 = 3,
    ReadMsr = 4,
    WriteMsr = 5,
    ReadCr0 = 6,
    ReadCr4 = 7,
    WriteCr0 = 8,
    WriteCr2 = 9,
    WriteCr4 = 10,
    LoadGdt = 11,
    LoadTask = 12,
    Halt = 13,
}

global_asm!(
    r#"
    .section .text.ring0, "ax", @progbits

    # At CPL 0, on the boot stack: sets up descriptors and returns at CPL 3. Keeps RDI and RSI.
    .globl ring0_enter
    ring0_enter:
        mov dword ptr [rip + {present}], 1
        lea rax, [rip + ring0_stubs]
        lea rbx, [rip + ring0_idt]
        mov ecx, 32
    2:
        mov rdx, rax
        mov [rbx], dx
        mov word ptr [rbx + 2], 0x10
        mov word ptr [rbx + 4], 0xee01
        shr rdx, 16
        mov [rbx + 6], dx
        shr rdx, 16
        mov [rbx + 8], edx
        mov dword ptr [rbx + 12], 0
        add rax, 16
        add rbx, 16
        sub ecx, 1
        jnz 2b

        lea rax, [rip + ring0_boot_tss]
        lea rdx, [rip + ring0_boot_stack + 4096]
        mov [rax + 36], rdx
        mov word ptr [rax + 102], {io_bitmap}
        mov byte ptr [rax + {tss_bytes} - 1], 0xff
        mov rdx, rax
        and edx, 0xffffff
        shl rdx, 16
        or rdx, {tss_bytes} - 1
        shr rax, 24
        and eax, 0xff
        shl rax, 56
        or rdx, rax
        mov rax, 0x890000000000
        or rdx, rax
        mov [rip + ring0_boot_gdt + {tss_selector}], rdx
        mov qword ptr [rip + ring0_boot_gdt + {tss_selector} + 8], 0
        lgdt [rip + ring0_boot_gdtr]
        lidt [rip + ring0_idtr]
        mov eax, {tss_selector}
        ltr ax
        pop rdx
        jmp ring0_leave

    # At CPL 0 on a vCPU that another one has started: RDI points to its data, which has the operand
    # of `lgdt` at RCX; goes on at RDX.
    .globl ring0_enter_secondary
    ring0_enter_secondary:
        lgdt [rcx]
        lidt [rip + ring0_idtr]
        mov eax, {tss_selector}
        ltr ax
    # To RDX, on this stack.
    ring0_leave:
        mov rax, rsp
        push 0x2b
        push rax
        push 2
        push 0x33
        push rdx
        iretq

    "#,
    stubs!("ring0_stubs", "ring0_common"),
    r#"
    # From the stack pointer up: RDX, RCX, RBX, RAX, vector, error code, RIP, CS, RFLAGS, RSP, SS.
    .balign 16
    ring0_common:
        push rax
        push rbx
        push rcx
        push rdx
        mov rcx, [rsp + 32]
        cmp rcx, 13
        jne 1f
        lea rax, [rip + ring0_trap]
        cmp [rsp + 48], rax
        je ring0_service
    1:
        test dword ptr [rsp + 56], 3
        jz ring0_dead
        # The stack's page begins with the address of the tops of the exception stacks.
        mov rbx, rsp
        and rbx, -4096
        mov rbx, [rbx]
        test rbx, rbx
        jz ring0_dead
        mov edx, 16
        cmp rcx, 8
        jne 1f
        mov edx, 8
    1:
        cmp rcx, 14
        jne 1f
        mov edx, 0
        # Not the user's fault: there is one level, the kernel's.
        and dword ptr [rsp + 40], -5
    1:
        add rbx, rdx
        mov rbx, [rbx]
        sub rbx, 48
        mov rax, [rsp + 80]
        mov [rbx + 40], rax
        mov rax, [rsp + 72]
        mov [rbx + 32], rax
        mov rax, [rsp + 64]
        mov [rbx + 24], rax
        mov rax, [rsp + 56]
        mov [rbx + 16], rax
        mov rax, [rsp + 48]
        mov [rbx + 8], rax
        mov rax, [rsp + 40]
        mov [rbx], rax
        mov eax, 0x60227d00
        shr eax, cl
        test eax, 1
        jnz 1f
        add rbx, 8
    1:
        mov [rsp + 72], rbx
        # Without TF, NT and RF.
        and dword ptr [rsp + 64], ~0x14100
        shl rcx, 4
        lea rax, [rip + exception_stubs]
        add rax, rcx
        mov [rsp + 48], rax
    ring0_return:
        pop rdx
        pop rcx
        pop rbx
        pop rax
        add rsp, 16
        iretq

    # An exception at CPL 0, or before there is a place for it: vector, error code, RIP and CS in
    # hexadecimal, CR2, and the end.
    ring0_dead:
        mov rax, cr2
        mov [rsp + 64], rax
        mov dx, {port_serial}
        mov rbx, rsp
        add rbx, 32
    2:
        mov rsi, [rbx]
        mov edi, 16
    3:
        mov rax, rsi
        shr rax, 60
        add eax, 0x30
        cmp eax, 0x3a
        jb 4f
        add eax, 0x27
    4:
        out dx, al
        shl rsi, 4
        sub edi, 1
        jnz 3b
        mov eax, 0x20
        out dx, al
        add rbx, 8
        mov rax, rbx
        sub rax, rsp
        cmp rax, 72
        jne 2b
        mov eax, 10
        out dx, al
        mov eax, {exit_exception}
        mov edx, {port_exit}
        out dx, eax
    1:
        hlt
        jmp 1b

    # Service RDI with RSI and RDX; the result goes to RAX.
    ring0_service:
        add qword ptr [rsp + 48], 1
        cmp edi, 0
        jne 1f
        invlpg [rsi]
        jmp ring0_return
    1:  cmp edi, 1
        jne 1f
        mov cr3, rsi
        jmp ring0_return
    1:  cmp edi, 2
        jne 1f
        mov rax, cr3
        jmp ring0_result
    1:  cmp edi, 3
        jne 1f
        mov rax, cr2
        jmp ring0_result
    1:  cmp edi, 4
        jne 1f
        mov ecx, esi
        rdmsr
        shl rdx, 32
        or rax, rdx
        jmp ring0_result
    1:  cmp edi, 5
        jne 1f
        mov ecx, esi
        mov rax, rdx
        shr rdx, 32
        wrmsr
        jmp ring0_return
    1:  cmp edi, 6
        jne 1f
        mov rax, cr0
        jmp ring0_result
    1:  cmp edi, 7
        jne 1f
        mov rax, cr4
        jmp ring0_result
    1:  cmp edi, 8
        jne 1f
        mov cr0, rsi
        jmp ring0_return
    1:  cmp edi, 9
        jne 1f
        mov cr2, rsi
        jmp ring0_return
    1:  cmp edi, 10
        jne 1f
        mov cr4, rsi
        jmp ring0_return
    1:  cmp edi, 11
        jne 1f
        lgdt [rsi]
        jmp ring0_return
    1:  cmp edi, 12
        jne 1f
        ltr si
        jmp ring0_return
    1:  cmp edi, 13
        jne ring0_dead
        hlt
        jmp ring0_return
    ring0_result:
        mov [rsp + 24], rax
        jmp ring0_return

    # At CPL 3: the gate.
    .globl ring0_call
    ring0_call:
    ring0_trap:
        hlt
        ret

    .section .data.ring0, "aw", @progbits
    .balign 16
    ring0_boot_gdt:
        .quad 0, 0
        .quad {kernel_code}, {kernel_data}
        .quad 0
        .quad {data}, {code}
        .quad 0, 0
    ring0_boot_gdtr:
        .word ring0_boot_gdtr - ring0_boot_gdt - 1
        .quad ring0_boot_gdt
    ring0_idtr:
        .word 32 * 16 - 1
        .quad ring0_idt

    .section .bss.ring0, "aw", @nobits
    .balign 4096
    ring0_boot_stack:
        .skip 4096
    ring0_idt:
        .skip 32 * 16
    ring0_boot_tss:
        .skip {tss_bytes}
    "#,
    present = sym PRESENT,
    tss_bytes = const TSS_BYTES,
    io_bitmap = const IO_BITMAP,
    tss_selector = const TSS_SELECTOR,
    kernel_code = const crate::descriptors::KERNEL_CODE,
    kernel_data = const crate::descriptors::KERNEL_DATA,
    code = const crate::descriptors::CODE,
    data = const crate::descriptors::DATA,
    exit_exception = const crate::x86::EXIT_EXCEPTION,
    port_exit = const gnomon_abi::PORT_EXIT,
    port_serial = const gnomon_abi::PORT_SERIAL,
);

static PRESENT: AtomicU32 = AtomicU32::new(0);

/// Whether there is such a part: the guest was entered at CPL 0.
#[inline]
pub fn is_present() -> bool {
    // Set by the first instructions of the boot vCPU, before any other code.
    PRESENT.load(Ordering::Relaxed) != 0
}

/// Has CPL 0 carry out a service.
///
/// # Safety
/// As for the instruction that the service stands for. Only where [`is_present`].
#[inline]
pub unsafe fn call(service: Service, first: u64, second: u64) -> u64 {
    let result;
    // SAFETY: the gate changes RAX alone; what the service does the caller vouches for. Memory counts
    // as changed, as translations may be.
    unsafe {
        asm!(
            "call ring0_call",
            in("rdi") service as u64,
            in("rsi") first,
            in("rdx") second,
            inout("rax") 0_u64 => result,
        );
    }
    result
}
