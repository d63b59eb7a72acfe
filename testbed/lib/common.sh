# Shared by the test bed's programs: where things are, and how they speak. Sourced by bash.
# shellcheck shell=bash

TESTBED_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PROJECT_DIR=$(cd "$TESTBED_DIR/.." && pwd)
CACHE_DIR=${GNOMON_TESTBED_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/gnomon-testbed}
# What the Debian packages unpack into: QEMU, a kernel with its modules, busybox.
TOOLS_DIR=$CACHE_DIR/tools
# Binaries for the test bed differ from the usual ones in being static; they have a folder of
# their own so that neither build throws the other away.
TARGET_DIR=${CARGO_TARGET_DIR:-$PROJECT_DIR/target}/testbed

# Processors that the suites may use; the inner machine has one more, see lib/qemu.sh.
# shellcheck disable=SC2034 # used by those who source this file
PROCESSORS=${GNOMON_TESTBED_SMP:-2}

# Exit codes, besides 0 for success.
readonly EXIT_SUITE_FAILED=1 EXIT_CANNOT_RUN=2 EXIT_NO_RESULT=3

say() {
    printf 'testbed: %s\n' "$*" >&2
}

die() {
    printf 'testbed: error: %s\n' "$*" >&2
    exit "$EXIT_CANNOT_RUN"
}

# For what is wrong with the project, not with the host.
fail() {
    printf 'testbed: error: %s\n' "$*" >&2
    exit "$EXIT_SUITE_FAILED"
}

have() {
    command -v "$1" >/dev/null 2>&1
}

# Runs "$@" as the only one among all users of the cache folder.
with_cache_lock() {
    mkdir -p "$CACHE_DIR" || die "cannot make the cache folder $CACHE_DIR. Set GNOMON_TESTBED_CACHE to a folder that can be written."
    have flock || die "flock is missing. It is in Debian's package util-linux."
    exec {CACHE_LOCK}>"$CACHE_DIR/lock"
    flock "$CACHE_LOCK"
    "$@"
    exec {CACHE_LOCK}>&-
}
