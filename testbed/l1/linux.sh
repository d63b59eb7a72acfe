# Runs gnomon with Debian's kernel as its guest. Sourced by the suites, which say "# needs: linux".
# shellcheck shell=sh

LINUX=/testbed/linux
# Where the guest's console and gnomon's own words go, besides the console here.
LOG=/tmp/linux.log
# Seconds for one guest, from its start to its end.
GUEST_LIMIT=240

# start_linux KERNEL TASKS OPTION...: gnomon with a guest that does the tasks of testbed/l2/init; ends
# when gnomon does, with its status. The kernel is vmlinuz, a bzImage, or vmlinux, which was in it
# and need not be unpacked by the guest.
start_linux() {
    kernel=$1 tasks=$2
    shift 2
    timeout -s KILL "$GUEST_LIMIT" gnomon boot --kernel "$LINUX/$kernel" --initrd "$LINUX/initrd" \
        --cmdline "console=ttyS0 quiet panic=-1 tasks=$tasks" "$@"
}

# run_linux KERNEL TASKS OPTION...: the same; everything has to go well, to the status and the last
# task.
run_linux() {
    echo "testbed: guest: $*"
    begun=$(uptime_seconds)
    rm -f /tmp/linux.status
    { start_linux "$@" </dev/null 2>&1; echo $? >/tmp/linux.status; } | tee "$LOG"
    status=$(cat /tmp/linux.status)
    [ "$status" = 0 ] || broken "gnomon ended with status $status"
    for task in $(echo "$2" | sed 's/:[^,]*//g; s/,/ /g'); do
        grep -q "guest: $task: ok" "$LOG" || broken "the guest did not end the task $task"
    done
    echo "testbed: guest ended well after $(($(uptime_seconds) - begun)) s"
}

# A disk of the guest's own, as made on the host.
new_disk() {
    cp "$LINUX/disk" "$1"
}

# await SECONDS PATTERN: until the log says it.
await() {
    tenths=$(($1 * 10))
    until grep -q "$2" "$LOG"; do
        [ $((tenths -= 1)) -gt 0 ] || broken "waited $1 s for: $2"
        usleep 100000
    done
}

# check_disk FILE: what a crash left behind is a file system whose journal can be replayed and
# which then has no error. The disk is changed.
check_disk() {
    "$LINUX/e2fsck" -E journal_only -y "$1" || [ $? = 1 ] || broken "the journal of $1 cannot be replayed"
    "$LINUX/e2fsck" -f -n "$1" || broken "e2fsck finds errors on $1"
}

# Everything that lies in folders where programs put temporary files.
temporary_files() {
    find /tmp /dev/shm /root /var 2>/dev/null | LC_ALL=C sort
}

uptime_seconds() {
    cut -d . -f 1 /proc/uptime
}

broken() {
    echo "testbed: $*"
    exit 1
}
