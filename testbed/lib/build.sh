# Builds what is under test, statically linked, since the inner machine has no libraries. Sourced
# by bash.
# shellcheck shell=bash

# With a named target, RUSTFLAGS do not reach build scripts and procedural macros, which could not
# be linked statically.
BUILD_TARGET=x86_64-unknown-linux-gnu

static_cargo() {
    local command=$1
    shift
    (
        cd "$PROJECT_DIR"
        RUSTFLAGS="${RUSTFLAGS:-} -C target-feature=+crt-static" CARGO_PROFILE_RELEASE_DEBUG=false \
            cargo "$command" --release --locked --target "$BUILD_TARGET" --target-dir "$TARGET_DIR" "$@"
    )
}

build_gnomon() {
    have cargo || die "cargo is missing. Install a Rust toolchain."
    say "building a static gnomon"
    static_cargo build --bin gnomon || fail "gnomon does not build. With a C library that cannot be linked statically, install libc6-dev."
}

gnomon_path() {
    echo "$TARGET_DIR/$BUILD_TARGET/release/gnomon"
}

# stage_tests FOLDER CARGO_OPTION...: builds the test programs that the options name and copies them
# into the folder, each under the name of its target.
stage_tests() {
    local folder=$1 program
    shift
    say "building the tests: $*"
    mkdir -p "$folder"
    static_cargo test --no-run "$@" 2>&1 | tee "$TARGET_DIR/tests.log" >&2 || fail "the tests do not build."
    # Cargo says:   Executable tests/kvm.rs (target/.../deps/kvm-0123456789abcdef)
    while IFS= read -r program; do
        case $program in
        /*) ;;
        *) program=$PROJECT_DIR/$program ;;
        esac
        cp "$program" "$folder/$(basename "${program%-*}")"
    done < <(sed -n 's/^ *Executable .*(\(.*\))$/\1/p' "$TARGET_DIR/tests.log")
    compgen -G "$folder/*" >/dev/null || fail "cargo named no test program in $TARGET_DIR/tests.log."
}
