//! Tells who builds a guest image (the build script of `gnomon-guest`) where this source is.

use std::env;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if let Some(root) = env::var_os("CARGO_MANIFEST_DIR") {
        println!("cargo::metadata=root={}", root.display());
    }
}
