# Makes what the suites with Linux as the guest of gnomon need: a kernel in both of its forms, an
# initramfs with testbed/l2/init as its first process, a disk. Sourced by bash.
# shellcheck shell=bash

# In the order in which they have to be loaded; Debian's kernels for the cloud have ext4 built in.
GUEST_MODULES=(
    drivers/virtio/virtio drivers/virtio/virtio_ring drivers/virtio/virtio_mmio
    drivers/block/virtio_blk drivers/virtio/virtio_balloon
    fs/mbcache lib/crc16 crypto/crc32c_generic fs/jbd2/jbd2 fs/ext4/ext4
)
DISK_SIZE=48M

vmlinux() {
    echo "$CACHE_DIR/vmlinux-$(kernel_release)"
}

# Unpacks the kernel proper from the bzImage: Documentation/arch/x86/boot.rst, payload_offset and
# payload_length.
ensure_vmlinux() {
    local image vmlinux setup_sectors offset length magic
    vmlinux=$(vmlinux)
    if [ -e "$vmlinux" ]; then return; fi
    image=$TOOLS_DIR/boot/vmlinuz-$(kernel_release)
    setup_sectors=$(number_at "$image" $((0x1f1)) 1)
    offset=$(((setup_sectors + 1) * 512 + $(number_at "$image" $((0x248)) 4)))
    length=$(number_at "$image" $((0x24c)) 4)
    magic=$(number_at "$image" "$offset" 4)
    [ "$magic" = $((0x184c2102)) ] || die "the kernel in $image is not compressed by LZ4, so that it cannot be unpacked here."
    # Its last four bytes are the size of what it unpacks to, and are not LZ4's.
    dd if="$image" bs=1M iflag=skip_bytes,count_bytes skip="$offset" count=$((length - 4)) status=none |
        tool bin/lz4 -q -f -d - "$vmlinux.partial" || die "cannot unpack the kernel in $image."
    mv "$vmlinux.partial" "$vmlinux"
}

# number_at FILE OFFSET BYTES
number_at() {
    od -An -v -t "u$3" -j "$2" -N "$3" "$1" | tr -d ' '
}

build_pages() {
    local source=$TESTBED_DIR/l2/pages.rs program=$TARGET_DIR/l2/pages
    if [ "$program" -nt "$source" ]; then return; fi
    mkdir -p "${program%/*}"
    rustc --edition 2024 -O -C target-feature=+crt-static -C panic=abort -C strip=symbols \
        "$source" -o "$program" || fail "$source does not build."
}

# stage_linux FOLDER: kernel, initramfs, disk and the disk's checker, for the inner machine.
stage_linux() {
    local folder=$1 guest=$WORK_DIR/guest
    say "making a Linux guest"
    ensure_vmlinux
    build_pages
    mkdir -p "$folder" "$guest"/{bin,modules,proc,sys,dev}
    cp "$TOOLS_DIR/boot/vmlinuz-$(kernel_release)" "$folder/vmlinuz"
    cp "$(vmlinux)" "$folder/vmlinux"
    cp "$E2FSCK" "$folder/e2fsck"

    cp "$(busybox_path)" "$guest/bin/busybox"
    ln -s busybox "$guest/bin/sh"
    cp "$TARGET_DIR/l2/pages" "$guest/bin/pages"
    cp "$TESTBED_DIR/l2/init" "$guest/init"
    chmod 755 "$guest/init"
    stage_modules "$guest/modules" "${GUEST_MODULES[@]}"
    { device_archive; pack "$guest"; } >"$folder/initrd"

    # With a fixed identity, so that each run has the same disk.
    MKE2FS_CONFIG=$TOOLS_DIR/etc/mke2fs.conf E2FSPROGS_FAKE_TIME=1600000000 \
        tool sbin/mke2fs -q -t ext4 -U 6e6f6d6f-6e00-4000-8000-000000000001 \
        -E hash_seed=6e6f6d6f-6e00-4000-8000-000000000002,lazy_itable_init=0,lazy_journal_init=0 \
        "$folder/disk" "$DISK_SIZE" >&2 || die "mke2fs cannot make a disk."
}
