//! Lets the targets that bring their own hooks (`src/untraced.rs`) be linked with libFuzzer's: the
//! first definition of a symbol, which is the binary's, is taken.

fn main() {
    for target in ["shadow_mmu", "virtio"] {
        println!("cargo:rustc-link-arg-bin={target}=-Wl,-z,muldefs");
    }
    println!("cargo:rerun-if-changed=build.rs");
}
