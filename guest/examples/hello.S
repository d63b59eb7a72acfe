/* The least that a guest of Gnomon can be, written from docs/guest-abi.md alone: it prints one
 * line on the serial port and powers off. No stack, no page tables of its own, no IDT.
 *
 *   cc -nostdlib -static -no-pie -Wl,-Ttext-segment=0x200000 -Wl,--build-id=none -o hello hello.S
 */

#define PORT_SERIAL       0x3f8
#define PORT_LINE_STATUS  0x3fd
#define LINE_READY        0x20
#define PORT_HYPERCALL    0x600
#define HC_POWER_OFF      4

    .globl _start
    .text
_start:
    leaq    message(%rip), %rbx
next_byte:
    movb    (%rbx), %cl
    testb   %cl, %cl
    jz      done
wait_ready:
    movw    $PORT_LINE_STATUS, %dx
    inb     %dx, %al
    testb   $LINE_READY, %al
    jz      wait_ready
    movw    $PORT_SERIAL, %dx
    movb    %cl, %al
    outb    %al, %dx
    incq    %rbx
    jmp     next_byte

done:
    movw    $PORT_HYPERCALL, %dx
    movl    $HC_POWER_OFF, %eax
    outl    %eax, %dx
    hlt

    .section .rodata
message:
    .asciz  "Hello from a guest of Gnomon\r\n"

    .section .note.GNU-stack, "", @progbits
