# Starts the inner machine. Sourced by bash.
# shellcheck shell=bash

# qemu_command PROCESSORS INITRAMFS [OPTION...] fills the array QEMU_COMMAND.
#
# The options are the ones that proved reliable, see docs/testbed.md. thread=multi: with one thread
# for two processors the inner machine hangs.
#
# mitigations=off: what they do against speculation costs an emulated processor a quarter of its time,
# and it does not speculate.
#
# One processor more than asked for, and no guest may run on processor 0 (l1/main sees to it): when
# another processor restores its FPU, TCG clears a flag of processor 0 by a plain read, change and
# write of the word in which that one keeps whether it runs a guest, and with nested paging or not.
qemu_command() {
    local processors=$1 initramfs=$2
    shift 2
    # shellcheck disable=SC2034 # used by those who source this file
    QEMU_COMMAND=(
        env "QEMU_MODULE_DIR=$QEMU_LIBRARIES/qemu"
        "$QEMU_LOADER" --library-path "$QEMU_LIBRARIES" "$QEMU"
        -L "$TOOLS_DIR/usr/share/qemu" -L "$TOOLS_DIR/usr/share/seabios"
        -accel tcg,thread=multi -cpu EPYC,+svm,+npt -M q35 -m 3G
        -smp $((processors + 1))
        -nodefaults -nographic -monitor none -no-reboot
        -kernel "$TOOLS_DIR/boot/vmlinuz-$(kernel_release)" -initrd "$initramfs"
        -append 'console=ttyS0 panic=-1 quiet mitigations=off kvm.halt_poll_ns=0'
        "$@"
    )
}
