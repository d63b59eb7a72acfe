//! Which unit tests can run on this host: what the build script of `gnomon-sys` has found (it says why there).

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    for name in ["kernel_faults", "protecting_faults", "huge_tmpfs"] {
        println!("cargo::rustc-check-cfg=cfg({name})");
        if std::env::var_os(format!("DEP_GNOMON_SYS_{}", name.to_uppercase())).is_some() {
            println!("cargo::rustc-cfg={name}");
        }
    }
}
