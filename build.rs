//! Looks which unit tests can run on this host (`build/host.rs`).

#[path = "build/host.rs"]
mod host;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    host::tell();
}
