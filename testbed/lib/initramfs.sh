# Makes the initramfs of the inner machine: a base archive that stays in the cache (devices,
# busybox, KVM's modules) and a second one with what is under test. Sourced by bash.
# shellcheck shell=bash

# In the order in which they have to be loaded. Kernels for the cloud have no ccp.
KVM_MODULES=(virt/lib/irqbypass drivers/crypto/ccp/ccp arch/x86/kvm/kvm arch/x86/kvm/kvm-amd)

base_archive() {
    echo "$CACHE_DIR/base-$(kernel_release).cpio"
}

ensure_base_archive() {
    local archive stage
    archive=$(base_archive)
    if [ -e "$archive" ]; then return; fi
    stage=$(mktemp -d "$CACHE_DIR/stage.XXXXXX")
    mkdir -p "$stage"/{bin,modules,proc,sys,tmp,root,testbed}
    cp "$(busybox_path)" "$stage/bin/busybox"
    ln -s busybox "$stage/bin/sh"
    stage_modules "$stage/modules" "${KVM_MODULES[@]}"
    { device_archive; pack "$stage"; } >"$archive.partial"
    mv "$archive.partial" "$archive"
    rm -rf "$stage"
}

# stage_modules FOLDER MODULE...: modules of the kernel, less those that it lacks or has built in,
# named so that their order is that of the arguments.
stage_modules() {
    local folder=$1 release name file index=0
    shift
    release=$(kernel_release)
    for name in "$@"; do
        file=$(module_path "$release" "$name")
        [ -n "$file" ] || continue
        index=$((index + 1))
        case $file in
        *.xz) xz -dc "$file" >"$folder/$index-${name##*/}.ko" ;;
        *) cp "$file" "$folder/$index-${name##*/}.ko" ;;
        esac
    done
}

# Writes the files of a folder as a cpio archive. The kernel wants every folder before its files.
pack() {
    (cd "$1" && find . -mindepth 1 | LC_ALL=C sort | "$(busybox_path)" cpio -o -H newc 2>/dev/null)
}

# An archive with the devices that the first process needs, made by hand: mknod wants root.
device_archive() {
    cpio_header /dev 040755 0 0
    cpio_header /dev/console 020600 5 1
    cpio_header /dev/null 020666 1 3
    cpio_header 'TRAILER!!!' 0 0 0
}

# One entry without contents in the format "newc": name, octal mode, device numbers.
cpio_header() {
    local name=${1#/} mode=$((8#$2)) major=$3 minor=$4 inode=$((++CPIO_INODE))
    # Magic, then inode, mode, uid, gid, links, time, size, device (2), special device (2), length
    # of the name with its NUL, checksum.
    printf '070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s\0' \
        "$inode" "$mode" 0 0 1 0 0 0 0 "$major" "$minor" $((${#name} + 1)) 0 "$name"
    # Header and name are padded to a multiple of four bytes.
    local padding=$(((4 - (110 + ${#name} + 1) % 4) % 4))
    while [ "$padding" -gt 0 ]; do
        printf '\0'
        padding=$((padding - 1))
    done
}
CPIO_INODE=0
