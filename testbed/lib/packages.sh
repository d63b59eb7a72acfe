# Brings QEMU, a kernel and busybox from Debian's packages into the cache folder. Nothing is
# installed: installing QEMU can remove other QEMU packages that a machine has. Sourced by bash.
# shellcheck shell=bash

QEMU_PACKAGE=qemu-system-x86
# What QEMU reads besides its libraries: firmware, and the module that holds TCG.
QEMU_DATA_PACKAGES=(qemu-system-common qemu-system-data seabios)
KERNEL_METAPACKAGE=linux-image-cloud-amd64

QEMU=$TOOLS_DIR/usr/bin/qemu-system-x86_64
TCG_MODULE=$TOOLS_DIR/usr/lib/x86_64-linux-gnu/qemu/accel-tcg-x86_64.so
QEMU_LIBRARIES=$TOOLS_DIR/usr/lib/x86_64-linux-gnu:$TOOLS_DIR/lib/x86_64-linux-gnu

ensure_tools() {
    if tools_complete; then return; fi
    require_debian
    say "fetching QEMU and a kernel from Debian's packages into $CACHE_DIR"
    rm -rf "$TOOLS_DIR" "$CACHE_DIR/packages"
    mkdir -p "$TOOLS_DIR" "$CACHE_DIR/packages"
    fetch_all || refresh_lists_and_fetch
    local package
    for package in "$CACHE_DIR"/packages/*.deb; do
        dpkg -x "$package" "$TOOLS_DIR" || die "cannot unpack $package."
    done
    rm -rf "$CACHE_DIR/packages"
    tools_complete || die "the packages are unpacked, but $(missing_tool)."
}

# Whether everything is there. Libraries are looked at each time: some may be the host's, and go.
tools_complete() {
    [ -z "$(missing_tool)" ]
}

# Says what is missing from the tools, as half a sentence; nothing if they are complete.
missing_tool() {
    local file libraries
    for file in "$QEMU" "$TOOLS_DIR/usr/share/qemu/linuxboot_dma.bin" "$TOOLS_DIR/usr/share/seabios/bios-256k.bin"; do
        [ -e "$file" ] || { echo "there is no $file"; return; }
    done
    [ -n "$(busybox_path)" ] || { echo "there is no busybox in $TOOLS_DIR"; return; }
    [ -n "$(kernel_release)" ] || { echo "there is no kernel with the module kvm-amd in $TOOLS_DIR"; return; }
    libraries=$(missing_libraries)
    [ -z "$libraries" ] || echo "QEMU lacks these libraries: $libraries"
}

missing_libraries() {
    local file
    for file in "$QEMU" "$TCG_MODULE"; do
        # TCG is part of the program, not a module, in some builds of QEMU.
        [ -e "$file" ] || continue
        LD_LIBRARY_PATH=$QEMU_LIBRARIES ldd "$file" | awk '/not found/ { print $1 }'
    done | sort -u | tr '\n' ' '
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

require_debian() {
    local tool
    for tool in apt-get apt-cache dpkg dpkg-query; do
        have "$tool" || die "the test bed runs a QEMU and a kernel from Debian's packages, and this host has no $tool to fetch them with.
Unpack these amd64 packages of Debian 12 or later into $TOOLS_DIR (for each: ar x FILE data.tar.xz, then tar -x):
  $QEMU_PACKAGE ${QEMU_DATA_PACKAGES[*]} busybox-static
  the newest linux-image-*-cloud-amd64
and the libraries that ldd $QEMU then misses. Run this again when they are there: $(missing_tool)."
    done
    [ "$(dpkg --print-architecture)" = amd64 ] || die "the test bed needs an amd64 host, and this one is $(dpkg --print-architecture)."
}

refresh_lists_and_fetch() {
    [ "$(id -u)" = 0 ] || die "apt-get could not download the packages. Its lists may be missing or old: run 'apt-get update' as root, then this again."
    say "apt-get could not download the packages; updating its lists"
    apt-get -q update || die "apt-get update failed."
    fetch_all || die "apt-get cannot download the packages, with fresh lists too. Look at what it said above."
}

fetch_all() {
    local kernel packages
    kernel=$(first_dependencies "$KERNEL_METAPACKAGE" | head -n 1)
    [ -n "$kernel" ] || { say "apt-cache does not know $KERNEL_METAPACKAGE"; return 1; }
    mapfile -t packages < <(library_packages)
    say "packages: $kernel busybox-static $QEMU_PACKAGE ${QEMU_DATA_PACKAGES[*]} ${packages[*]}"
    download "$kernel" busybox-static "$QEMU_PACKAGE" "${QEMU_DATA_PACKAGES[@]}" "${packages[@]}"
}

download() {
    local options=(-q)
    # Root's apt-get downloads as another user, who may not be able to write here.
    [ "$(id -u)" != 0 ] || options+=(-o APT::Sandbox::User=root)
    (cd "$CACHE_DIR/packages" && apt-get "${options[@]}" download "$@") >&2
}

# The packages with QEMU's libraries that are not installed on this host.
library_packages() {
    local -A seen=()
    local queue package
    mapfile -t queue < <(first_dependencies "$QEMU_PACKAGE")
    while [ "${#queue[@]}" -gt 0 ]; do
        package=${queue[0]}
        queue=("${queue[@]:1}")
        [[ $package == lib* || $package == zlib* ]] || continue
        if [ -n "${seen[$package]:-}" ] || installed "$package"; then continue; fi
        seen[$package]=1
        echo "$package"
        mapfile -t -O "${#queue[@]}" queue < <(first_dependencies "$package")
    done
}

installed() {
    [[ $(dpkg-query -W -f '${db:Status-Abbrev}' "$1" 2>/dev/null) == ii* ]]
}

# What a package depends on; of alternatives, which apt-cache marks by a bar, the first.
first_dependencies() {
    apt-cache depends --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces --no-enhances "$1" 2>/dev/null |
        awk '
            /^ *\|?(Pre)?Depends: / {
                if (!alternative && $2 !~ /^</) print $2
                alternative = ($1 ~ /^\|/)
            }'
}
