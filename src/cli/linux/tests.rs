use clap::Parser;

use super::*;
use crate::cli::args::{Cli, Command};
use crate::cli::limits::HostLimits;
use crate::cli::violations::Violation;
use crate::virtio::DiskMode;

/// Resolves a command line with a file that looks like a bzImage, and another beside it.
fn resolved(options: &[&str]) -> Result<Option<LinuxConfig>, String> {
    let folder = tempfile::tempdir().unwrap();
    let mut image = vec![0; 0x400];
    image[0x202..0x206].copy_from_slice(b"HdrS");
    let kernel = folder.path().join("vmlinuz");
    std::fs::write(&kernel, image).unwrap();
    let other = folder.path().join("other");
    std::fs::write(&other, b"something else").unwrap();
    let words = options.iter().map(|option| match *option {
        "KERNEL" => kernel.display().to_string(),
        "OTHER" => other.display().to_string(),
        other => other.to_owned(),
    });
    let words = ["gnomon", "boot"].map(str::to_owned).into_iter().chain(words);
    let Command::Boot(args) =
        Cli::try_parse_from(words).map_err(|error| error.to_string())?.command
    else {
        panic!("not boot");
    };
    resolve(&args, &HostLimits::default())
        .map_err(|error| error.to_string().replace(&*other.display().to_string(), "OTHER"))
}

fn refused(options: &[&str]) -> String {
    resolved(options).err().unwrap_or_else(|| panic!("{options:?} is taken"))
}

#[test]
fn a_bzimage_is_booted_with_all_that_belongs_to_it() {
    let config = resolved(&[
        "--kernel",
        "KERNEL",
        "--initrd",
        "OTHER",
        "--cmdline",
        "quiet",
        "--disk",
        "a,b,ro",
        "--disk",
        "c",
        "--storm",
        "--vcpus",
        "2",
        "--memory",
        "512M",
    ]);
    let config = config.unwrap().unwrap();
    assert_eq!(config.initrd.as_deref(), Some(&b"something else"[..]));
    assert_eq!((config.cmdline.as_str(), config.vcpus), ("quiet", 2));
    let disks: Vec<_> = config.disks.iter().map(|d| (d.path.to_str().unwrap(), d.mode)).collect();
    assert_eq!(disks, [("a,b", DiskMode::ReadOnly), ("c", DiskMode::ReadWrite)]);
    assert_eq!(config.storm.len(), 2);
    assert!(config.host.check_evictions);
    assert_eq!(mm_bytes(&config), 512 << 20);
}

#[test]
fn other_kernels_are_not_for_linux() {
    assert!(resolved(&[]).unwrap().is_none());
    assert!(resolved(&["--kernel", "OTHER"]).unwrap().is_none());
}

#[test]
fn what_cannot_be_is_refused_with_a_sentence() {
    let none = refused(&["--initrd", "OTHER"]);
    assert_eq!(
        none,
        "--initrd is for a Linux kernel, a bzImage or vmlinux: name one with --kernel"
    );
    let other = refused(&["--kernel", "OTHER", "--disk", "x"]);
    assert!(other.ends_with("--kernel OTHER is none"), "{other}");
    let large = refused(&["--kernel", "KERNEL", "--memory", "4G"]);
    assert!(large.contains("--memory 4G") && large.contains("at most 3G"), "{large}");
    let missing = refused(&["--kernel", "KERNEL", "--initrd", "/nowhere"]);
    assert!(missing.contains("--initrd /nowhere cannot be read"), "{missing}");
    let moved = refused(&["--kernel", "KERNEL", "--storm=migrate"]);
    assert!(moved.contains("--storm migrate") && moved.contains("reclaim, clean"), "{moved}");
    assert!(refused(&["--kernel", "KERNEL", "--paranoid"]).contains("leave it out"));
    let shadow = refused(&["--kernel", "KERNEL", "--paging", "shadow"]);
    assert!(shadow.contains("--paging shadow") && shadow.contains("Linux"), "{shadow}");
    let disks = [&["--kernel", "KERNEL"][..], &["--disk", "x"].repeat(11)].concat();
    assert!(refused(&disks).contains("11 devices"));
    assert!(refused(&["--kernel", "KERNEL", "--disk", ",ro"]).contains("name a file"));
}

#[test]
fn the_exit_code_says_how_it_ended() {
    let clean = Violations::default();
    let mut bad = Violations::default();
    bad.add_one(Violation::of_run("something"));
    assert_eq!(End::Outcome(Outcome::PoweredOff).exit_code(&clean), 0);
    assert_eq!(End::Outcome(Outcome::Rebooted).exit_code(&clean), 0);
    assert_eq!(End::Outcome(Outcome::PoweredOff).exit_code(&bad), 1);
    assert_eq!(End::Typed.exit_code(&clean), 0);
    assert_eq!(End::Typed.exit_code(&bad), 1);
    assert_eq!(End::Signal(15).exit_code(&bad), 143);
    assert_eq!(End::Stuck.exit_code(&clean), 1);
    let failed = Outcome::Failed(VmError::NotRunning);
    assert_eq!(End::Outcome(failed).exit_code(&clean), 1);
}
