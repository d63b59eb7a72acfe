//! The probe of the host's KVM, against what the kernel itself says of it.
//!
//! `GNOMON_EXPECT_HOST`, set to `shadow` or `tdp`, says what the probe has to find: the test bed
//! sets it. Without it, nested paging is expected where kvm_amd or kvm_intel says that it uses it.

use std::path::Path;

use gnomon::vmm::{HostKind, HostTraits, KVM_DEVICE};

/// What the kernel says of nested paging; `None` if it says nothing.
fn nested_paging() -> Option<bool> {
    let parameters = ["kvm_amd/parameters/npt", "kvm_intel/parameters/ept"];
    parameters.iter().find_map(|parameter| {
        let value = std::fs::read_to_string(Path::new("/sys/module").join(parameter)).ok()?;
        Some(matches!(value.trim(), "Y" | "1"))
    })
}

#[test]
fn the_probe_finds_what_the_kernel_says() {
    let required = std::env::var_os("GNOMON_REQUIRE_KVM").is_some();
    if !required && std::fs::File::options().read(true).write(true).open(KVM_DEVICE).is_err() {
        eprintln!("skipped: {KVM_DEVICE} is not usable");
        return;
    }
    let traits = HostTraits::probe().unwrap();
    eprintln!("{traits:?}");
    assert!(traits.zap_revokes, "no guest can be run on {traits:?}");
    let again = HostTraits::probe().unwrap();
    assert_eq!(traits, again, "the probe has to find the same each time");

    let expected = match std::env::var("GNOMON_EXPECT_HOST").as_deref() {
        Ok("shadow") => Some(HostKind::Shadow),
        Ok("tdp") => Some(HostKind::Tdp),
        Ok(other) => panic!("GNOMON_EXPECT_HOST={other}: neither shadow nor tdp"),
        Err(_) => nested_paging().map(|nested| match nested {
            true => HostKind::Tdp,
            false => HostKind::Shadow,
        }),
    };
    if let Some(expected) = expected {
        assert_eq!(traits.kind(), expected, "{traits:?}");
    }
    if traits.kind() == HostKind::Tdp {
        assert!(traits.ring0_native, "{traits:?}");
    }
}
