//! Builds the test guest, which the library embeds: `$OUT_DIR/guest.elf`.
//!
//! The guest is freestanding Rust for the same target as the library, so nothing is needed beyond
//! the `rustc` and the C linker that build the library itself. `RUSTFLAGS` do not apply to it: they
//! are meant for code that has an operating system below it.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

fn main() -> ExitCode {
    match build_guest() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("error: {message}");
            println!("cargo::error={message}");
            ExitCode::FAILURE
        }
    }
}

fn build_guest() -> Result<(), String> {
    for changed in ["build.rs", "bare", "src"] {
        println!("cargo::rerun-if-changed={changed}");
    }
    let os = variable("CARGO_CFG_TARGET_OS")?;
    let arch = variable("CARGO_CFG_TARGET_ARCH")?;
    if os != "linux" || arch != "x86_64" {
        return Err(format!(
            "gnomon runs on 64-bit x86 Linux only, not on {} {}",
            arch.display(),
            os.display()
        ));
    }
    let out = PathBuf::from(variable("OUT_DIR")?);
    let abi = PathBuf::from(variable("DEP_GNOMON_ABI_ROOT")?);
    println!("cargo::rerun-if-changed={}", abi.join("src").display());
    let guest = PathBuf::from(variable("CARGO_MANIFEST_DIR")?);

    let abi_library = library(&abi, "gnomon_abi", &out, &[])?;
    let guest_library = library(&guest, "gnomon_guest", &out, &[("gnomon_abi", &abi_library)])?;
    let mut start = rustc(&guest)?;
    start
        .args(["--crate-type", "bin", "--crate-name", "gnomon_test_guest", "bare/start.rs"])
        .arg("-o")
        .arg(out.join("guest.elf"))
        .arg("-L")
        .arg(&out)
        // One piece, as if it were one crate.
        .args(["-C", "lto=fat"])
        .args(["-C", "linker=cc"])
        .args(["-C", "link-args=-nostdlib -static -no-pie"])
        .args(["-C", "link-args=-Wl,--build-id=none -Wl,-z,norelro"])
        .args(["-C", "link-args=-Wl,-T,bare/link.ld"]);
    external(&mut start, &[("gnomon_guest", &guest_library)]);
    run(start)
}

/// Compiles the library crate in the folder `root` for a machine without an operating system.
fn library(root: &Path, name: &str, out: &Path, uses: &[(&str, &Path)]) -> Result<PathBuf, String> {
    let made = out.join(format!("lib{name}.rlib"));
    let mut rustc = rustc(root)?;
    rustc.args(["--crate-type", "rlib", "--crate-name", name, "src/lib.rs", "-o"]).arg(&made);
    external(&mut rustc, uses);
    run(rustc)?;
    Ok(made)
}

/// The compiler with what all parts of the guest have in common.
fn rustc(root: &Path) -> Result<Command, String> {
    let mut rustc = Command::new(variable("RUSTC")?);
    // Relative paths, so that panic messages in the image do not depend on where it was built.
    rustc
        .current_dir(root)
        .args(["--edition", "2024", "--cfg", "bare"])
        .args(["-C", "opt-level=3", "-C", "codegen-units=1"])
        .args(["-C", "panic=abort", "-C", "strip=debuginfo"])
        // An image at fixed addresses below 2 GiB.
        .args(["-C", "relocation-model=static", "-C", "code-model=small"])
        // Exceptions push on the stack in use, right below the stack pointer.
        .args(["-C", "no-redzone=yes"]);
    // Cross-compiling from another host: `core` is there for the target, as the library needs it.
    let target = variable("TARGET")?;
    if target != variable("HOST")? {
        rustc.arg("--target").arg(target);
    }
    Ok(rustc)
}

fn external(rustc: &mut Command, uses: &[(&str, &Path)]) {
    for (name, path) in uses {
        rustc.arg("--extern").arg(format!("{name}={}", path.display()));
    }
}

fn run(mut rustc: Command) -> Result<(), String> {
    let status = rustc.status().map_err(|error| {
        format!("cannot run {:?} for the test guest: {error}", rustc.get_program())
    })?;
    if !status.success() {
        return Err(format!("the test guest does not build: {status} from {rustc:?}"));
    }
    Ok(())
}

fn variable(name: &str) -> Result<OsString, String> {
    env::var_os(name).ok_or_else(|| format!("cargo has not set {name}"))
}
