# Brings QEMU, a kernel, busybox and what makes and checks disks from Debian's packages into the
# cache folder. Nothing is installed, and nothing of the host's is used but apt: programs come with
# all their libraries down to the C library, from lists that are fetched for this alone. Sourced by
# bash.
# shellcheck shell=bash

MIRROR=${GNOMON_TESTBED_MIRROR:-http://deb.debian.org/debian}
KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg

# QEMU before 10.2 changes the word of a processor's pending interrupts without a lock when a guest
# is left, and so loses interrupts: see docs/testbed.md.
QEMU_SUITE=trixie-backports
QEMU_SUITES=(trixie trixie-backports)
QEMU_PACKAGE=qemu-system-x86
# For the disks and the kernel of guests, see lib/linux.sh. The static e2fsck runs in the inner machine.
DISK_PACKAGES=(e2fsprogs e2fsck-static lz4)
# Linux 6.1: old enough to lack process_madvise(MADV_DONTNEED), so that the way without it is tested.
KERNEL_SUITE=bookworm
KERNEL_METAPACKAGE=linux-image-cloud-amd64

QEMU=$TOOLS_DIR/usr/bin/qemu-system-x86_64
QEMU_LIBRARIES=$TOOLS_DIR/usr/lib/x86_64-linux-gnu
QEMU_LOADER=$TOOLS_DIR/usr/lib64/ld-linux-x86-64.so.2
E2FSCK=$TOOLS_DIR/usr/sbin/e2fsck.static

ensure_tools() {
    if tools_complete; then return; fi
    require_apt
    say "fetching QEMU, a kernel and some tools from Debian's packages into $CACHE_DIR"
    rm -rf "$TOOLS_DIR" "$CACHE_DIR/apt"
    mkdir -p "$TOOLS_DIR"
    fetch_qemu
    fetch_kernel
    local package
    for package in "$CACHE_DIR"/apt/*/cache/archives/*.deb; do
        dpkg-deb -x "$package" "$TOOLS_DIR" || die "cannot unpack $package."
    done
    rm -rf "$CACHE_DIR/apt"
    tools_complete || die "the packages are unpacked, but $(missing_tool)."
}

tools_complete() {
    [ -z "$(missing_tool)" ]
}

# Says what is missing from the tools, as half a sentence; nothing if they are complete.
missing_tool() {
    local file
    for file in "$QEMU" "$QEMU_LOADER" "$TOOLS_DIR/usr/share/qemu/linuxboot_dma.bin" \
        "$TOOLS_DIR/usr/share/seabios/bios-256k.bin" \
        "$TOOLS_DIR/usr/sbin/mke2fs" "$E2FSCK" "$TOOLS_DIR/usr/bin/lz4"; do
        [ -e "$file" ] || { echo "there is no $file"; return; }
    done
    [ -n "$(busybox_path)" ] || { echo "there is no busybox in $TOOLS_DIR"; return; }
    [ -n "$(kernel_release)" ] || { echo "there is no kernel with the module kvm-amd in $TOOLS_DIR"; return; }
}

# tool NAME ARGUMENT...: runs a program of the unpacked packages with their libraries.
tool() {
    local program=$TOOLS_DIR/usr/$1
    shift
    "$QEMU_LOADER" --library-path "$QEMU_LIBRARIES" "$program" "$@"
}

busybox_path() {
    local file
    for file in "$TOOLS_DIR/bin/busybox" "$TOOLS_DIR/usr/bin/busybox"; do
        if [ -x "$file" ]; then echo "$file"; return; fi
    done
}

# The release of the unpacked kernel, if both its image and its KVM are there.
kernel_release() {
    local image release
    for image in "$TOOLS_DIR"/boot/vmlinuz-*; do
        release=${image##*/vmlinuz-}
        if [ -n "$(module_path "$release" arch/x86/kvm/kvm-amd)" ]; then echo "$release"; return; fi
    done
}

# The file of a kernel module, compressed or not.
module_path() {
    local release=$1 name=$2 file
    for file in "$TOOLS_DIR"{,/usr}"/lib/modules/$release/kernel/$name.ko"{,.xz}; do
        if [ -e "$file" ]; then echo "$file"; return; fi
    done
}

require_apt() {
    local tool
    for tool in apt-get apt-cache dpkg-deb; do
        have "$tool" || die "the test bed runs a QEMU and a kernel from Debian's packages, and this host has no $tool to fetch them with. Install apt and dpkg; other distributions have them, too."
    done
    [ -e "$KEYRING" ] || die "there is no $KEYRING to verify Debian's packages with. Install the package debian-archive-keyring."
    [ "$(uname -m)" = x86_64 ] || die "the test bed needs an x86-64 host, and this one is $(uname -m)."
}

# apt_of NAME PROGRAM OPTION...: runs a program of apt on the lists called NAME, as if nothing were
# installed.
apt_of() {
    local folder=$CACHE_DIR/apt/$1 program=$2
    shift 2
    local options=(
        -o Dir::Etc::sourcelist="$folder/sources.list" -o Dir::Etc::sourceparts=/dev/null
        -o Dir::Etc::preferences=/dev/null -o Dir::Etc::preferencesparts=/dev/null
        -o Dir::State="$folder/state" -o Dir::State::status="$folder/status" -o Dir::Cache="$folder/cache"
        -o APT::Architecture=amd64 -o APT::Architectures=amd64 -o Debug::NoLocking=1
        -o Acquire::Languages=none -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false
    )
    # Root's apt-get downloads as another user, who may not be able to write here.
    [ "$(id -u)" != 0 ] || options+=(-o APT::Sandbox::User=root)
    "$program" "${options[@]}" "$@"
}

# fetch_lists NAME SUITE...: the lists of packages of these suites.
fetch_lists() {
    local name=$1 folder=$CACHE_DIR/apt/$1 suite
    shift
    mkdir -p "$folder"/state/lists/partial "$folder"/cache/archives/partial
    : >"$folder/status"
    for suite in "$@"; do
        echo "deb [signed-by=$KEYRING] $MIRROR $suite main"
    done >"$folder/sources.list"
    apt_of "$name" apt-get -q update >&2 ||
        die "apt-get cannot fetch the lists of $* from $MIRROR. Look at what it said above; GNOMON_TESTBED_MIRROR names another mirror."
}

fetch_qemu() {
    fetch_lists qemu "${QEMU_SUITES[@]}"
    apt_of qemu apt-get -q -y --no-install-recommends --download-only -t "$QEMU_SUITE" install \
        "$QEMU_PACKAGE" "${DISK_PACKAGES[@]}" >&2 ||
        die "apt-get cannot download $QEMU_PACKAGE and ${DISK_PACKAGES[*]} of $QEMU_SUITE. Look at what it said above."
}

fetch_kernel() {
    local kernel
    fetch_lists kernel "$KERNEL_SUITE"
    kernel=$(apt_of kernel apt-cache depends --important "$KERNEL_METAPACKAGE" | awk '$1 == "Depends:" { print $2; exit }')
    [ -n "$kernel" ] || die "apt-cache does not know which kernel $KERNEL_METAPACKAGE of $KERNEL_SUITE stands for."
    (cd "$CACHE_DIR/apt/kernel/cache/archives" && apt_of kernel apt-get -q download "$kernel" busybox-static) >&2 ||
        die "apt-get cannot download $kernel and busybox-static of $KERNEL_SUITE. Look at what it said above."
}
