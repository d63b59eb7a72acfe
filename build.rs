//! Builds the test guest, which the library embeds: `$OUT_DIR/guest.elf`; and looks which unit tests can
//! run on this host (`build/host.rs`).
//!
//! The guest is freestanding Rust for the same target as the library, so nothing is needed beyond
//! the `rustc` and the C linker that build the library itself. `RUSTFLAGS` do not apply to it: they
//! are meant for code that has an operating system below it.

#[path = "build/host.rs"]
mod host;

use std::env;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

fn main() -> ExitCode {
    host::tell();
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
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=guest/link.ld");
    println!("cargo::rerun-if-changed=guest/src");

    let os = variable("CARGO_CFG_TARGET_OS")?;
    let arch = variable("CARGO_CFG_TARGET_ARCH")?;
    if os != "linux" || arch != "x86_64" {
        return Err(format!(
            "gnomon runs on 64-bit x86 Linux only, not on {} {}",
            arch.display(),
            os.display()
        ));
    }
    let image = PathBuf::from(variable("OUT_DIR")?).join("guest.elf");

    let mut rustc = Command::new(variable("RUSTC")?);
    // Relative paths, so that panic messages in the image do not depend on where it was built.
    rustc
        .current_dir(variable("CARGO_MANIFEST_DIR")?)
        .arg("guest/src/main.rs")
        .arg("-o")
        .arg(&image)
        .args(["--edition", "2024"])
        .args(["--crate-type", "bin", "--crate-name", "gnomon_test_guest"])
        .args(["-C", "opt-level=3", "-C", "codegen-units=1"])
        .args(["-C", "panic=abort", "-C", "strip=debuginfo"])
        // An image at fixed addresses below 2 GiB.
        .args(["-C", "relocation-model=static", "-C", "code-model=small"])
        // Exceptions push on the stack in use, right below the stack pointer.
        .args(["-C", "no-redzone=yes"])
        .args(["-C", "linker=cc"])
        .args(["-C", "link-args=-nostdlib -static -no-pie"])
        .args(["-C", "link-args=-Wl,--build-id=none -Wl,-z,norelro"])
        .args(["-C", "link-args=-Wl,-T,guest/link.ld"]);
    // Cross-compiling from another host: `core` is there for the target, as the library needs it.
    let target = variable("TARGET")?;
    if target != variable("HOST")? {
        rustc.arg("--target").arg(target);
    }
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
