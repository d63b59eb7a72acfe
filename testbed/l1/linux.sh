# Runs gnomon with Debian's kernel as its guest. Sourced by the suites, which say "# needs: linux".
# shellcheck shell=sh

LINUX=/testbed/linux
# Where the guest's console and gnomon's own words go, besides the console here.
LOG=/testbed/linux.log
STATUS=/testbed/linux.status
# Seconds for one guest, from its start to its end.
GUEST_LIMIT=450
# More for the guest's command line.
GUEST_OPTIONS=
# Pages are evicted and cleaned without need, and those that are dropped as clean compared with their
# copies. Each page that is taken costs the guest a fault, which takes long here: at full rate a storm
# would leave it no time of its own.
STORM="--storm --storm-rate 1000/s"

# A suite that ends early takes its guest with it.
pulse=
trap 'kill -KILL $(pidof gnomon) $pulse 2>/dev/null || true' EXIT

# start_linux KERNEL TASKS OPTION...: gnomon with a guest that does the tasks of testbed/l2/init, in
# the background; its input is the descriptor 3. The kernel is vmlinuz, a bzImage, or vmlinux, which
# was in it and need not be unpacked by the guest.
start_linux() {
    echo "testbed: guest: $*"
    kernel=$1 tasks=$2
    shift 2
    begun=$(uptime_seconds)
    rm -f "$STATUS"
    : >"$LOG"
    {
        code=0
        # First by SIGTERM: how far the guest got stands in gnomon's report.
        timeout -k 20 "$GUEST_LIMIT" gnomon boot --kernel "$LINUX/$kernel" --initrd "$LINUX/initrd" \
            --cmdline "console=ttyS0 quiet panic=-1 mitigations=off ${GUEST_OPTIONS:-} tasks=$tasks" "$@" <&3 2>&1 || code=$?
        echo "$code" >"$STATUS"
    } | tee "$LOG" &
    guest=$!
    # The bed ends a machine that says nothing; whether the guest hangs is GUEST_LIMIT's to tell.
    while sleep 20 >/dev/null 2>&1; do
        echo "testbed: the guest runs since $(($(uptime_seconds) - begun)) s"
    done &
    pulse=$!
}

# Waits for gnomon's end.
wait_linux() {
    wait "$guest"
    kill "$pulse" 2>/dev/null || true
}

# end_linux: waits for gnomon's end, which has to be a good one, with all tasks done.
end_linux() {
    wait_linux
    status=$(cat "$STATUS")
    [ "$status" != 143 ] || broken "the guest was ended by the limit of $GUEST_LIMIT s"
    [ "$status" = 0 ] || broken "gnomon ended with status $status"
    for task in $(echo "$tasks" | sed 's/:[^,]*//g; s/,/ /g'); do
        grep -q "guest: $task: ok" "$LOG" || broken "the guest did not end the task $task"
    done
    echo "testbed: the guest ended well after $(($(uptime_seconds) - begun)) s"
}

run_linux() {
    start_linux "$@" 3</dev/null
    end_linux
}

# whole NAME OPTION...: a guest with a quarter of its memory does all its tasks; its files are called
# so. A shell of its own, so that several can run at a time.
whole() (
    LOG=/testbed/$1.log STATUS=/testbed/$1.status disk=/tmp/$1.disk
    shift
    trap 'kill $pulse 2>/dev/null || true' EXIT
    new_disk "$disk"
    run_linux vmlinux memory,disk --memory 512M --host-memory 128M --disk "$disk" "$@"
    check_disk "$disk"
    rm "$disk"
)

# A disk of the guest's own, as made on the host.
new_disk() {
    cp "$LINUX/disk" "$1"
}

# await SECONDS WHAT COMMAND...: until the command succeeds.
await() {
    left=$(($1 * 10)) what=$2
    shift 2
    until "$@"; do
        [ $((left -= 1)) -gt 0 ] || broken "waited in vain: $what"
        usleep 100000
    done
}

# Whether the guest, or gnomon, has said this.
said() {
    grep -q "$1" "$LOG"
}

# check_disk FILE: what a crash left behind is a file system whose journal can be replayed and
# which then has no error. The disk is changed.
check_disk() {
    "$LINUX/e2fsck" -E journal_only -y "$1" || [ $? = 1 ] || broken "the journal of $1 cannot be replayed"
    "$LINUX/e2fsck" -f -n "$1" || broken "e2fsck finds errors on $1"
}

# All files but the bed's own.
all_files() {
    find / /tmp /dev/shm -xdev | grep -v '^/testbed/' | LC_ALL=C sort -u
}

uptime_seconds() {
    cut -d . -f 1 /proc/uptime
}

broken() {
    echo "testbed: $*"
    exit 1
}
