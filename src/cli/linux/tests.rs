use clap::Parser;

use super::*;
use crate::cli::args::{Cli, Command};
use crate::cli::kernel_file::read_kernel;
use crate::cli::limits::{Folder, HostLimits};
use crate::virtio::DiskMode;

/// Resolves a command line with a file that looks like a bzImage, another beside it, and one of 1 GiB.
fn resolved(options: &[&str]) -> Result<Option<LinuxConfig>, String> {
    resolved_on(&HostLimits::default(), options)
}

fn resolved_on(limits: &HostLimits, options: &[&str]) -> Result<Option<LinuxConfig>, String> {
    let folder = tempfile::tempdir().unwrap();
    let mut image = vec![0; 0x400];
    image[0x202..0x206].copy_from_slice(b"HdrS");
    let kernel = folder.path().join("vmlinuz");
    std::fs::write(&kernel, image).unwrap();
    let other = folder.path().join("other");
    std::fs::write(&other, b"something else").unwrap();
    let large = folder.path().join("large");
    std::fs::File::create(&large).unwrap().set_len(1 << 30).unwrap();
    let words = options.iter().map(|option| match *option {
        "LARGE" => large.display().to_string(),
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
    let kernel = args.kernel.as_deref().map(read_kernel).transpose();
    let limits = HostLimits { swap_folder: Some(Folder::on_disk()), ..limits.clone() };
    let resolved = kernel.and_then(|kernel| resolve(&args, kernel, &limits));
    let linux = resolved.map(|resolved| match resolved {
        Resolved::Linux(config) => Some(*config),
        Resolved::Other(kernel) => {
            assert_eq!(kernel.is_some(), args.kernel.is_some(), "it is handed on");
            None
        }
    });
    linux.map_err(|error| error.to_string().replace(&*other.display().to_string(), "OTHER"))
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
    assert_eq!(config.images.initrd.as_deref(), Some(&b"something else"[..]));
    assert_eq!((config.cmdline.as_str(), config.vcpus), ("quiet", 2));
    let disks: Vec<_> = config.disks.iter().map(|d| (d.path.to_str().unwrap(), d.mode)).collect();
    assert_eq!(disks, [("a,b", DiskMode::ReadOnly), ("c", DiskMode::ReadWrite)]);
    assert_eq!(config.storm.kinds.len(), 2);
    assert!(config.host.check_evictions);
    assert_eq!(config.storm.rate, 20_000);
    let told = storm_announcement(&config).unwrap();
    let seed =
        format!("reclaim, clean, 20,000 pages a second of each, with seed {}", config.storm.seed);
    assert!(told.ends_with(&seed), "{told}");
    assert_eq!(mm_bytes(&config), 512 << 20);
}

/// It is refused before it is read, and so before any of it is in memory.
#[test]
fn a_ram_disk_is_counted_in() {
    let limits = HostLimits { available_bytes: Some(512 << 20), ..HostLimits::default() };
    let options = ["--kernel", "KERNEL", "--memory", "2G", "--host-memory", "64M"];
    assert!(resolved_on(&limits, &options).unwrap().is_some());
    let large = [&options[..], &["--initrd", "LARGE"]].concat();
    let said = resolved_on(&limits, &large).err().expect("it is refused");
    assert!(said.contains("512 MiB of memory available"), "{said}");
    assert!(said.contains("the files to be loaded"), "{said}");
    let small = ["--kernel", "KERNEL", "--memory", "512M", "--initrd", "LARGE"];
    let said = resolved_on(&limits, &small).err().expect("it is refused");
    assert!(said.contains("--initrd") && said.contains("choose more --memory"), "{said}");
}

#[test]
fn without_a_storm_nothing_is_told_of_one() {
    for options in [&[][..], &["--storm=none"]] {
        let config = resolved(&[&["--kernel", "KERNEL"], options].concat()).unwrap().unwrap();
        assert!(!config.host.check_evictions);
        assert_eq!(storm_announcement(&config), None);
    }
    let own = ["--kernel", "KERNEL", "--storm=clean", "--storm-rate", "7/s", "--seed", "3"];
    let told = storm_announcement(&resolved(&own).unwrap().unwrap());
    assert_eq!(told.unwrap(), "storm on purpose: clean, 7 pages a second of each, with seed 3");
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
    let none = refused(&["--kernel", "KERNEL", "--storm=none,clean"]);
    assert_eq!(
        none,
        "--storm none stands alone: leave out either none or the others of reclaim, clean"
    );
    for storm in [&[][..], &["--storm=none"]] {
        let idle = [&["--kernel", "KERNEL", "--storm-rate", "9/s"], storm].concat();
        assert!(refused(&idle).contains("--storm-rate without a storm"), "{}", refused(&idle));
    }
    let other = refused(&["--kernel", "OTHER", "--storm-rate", "9/s"]);
    assert!(other.starts_with("--storm-rate is for a Linux kernel"), "{other}");
    for option in [&["--paranoid"][..], &["--assume-host", "tdp"]] {
        let shadow = refused(&[&["--kernel", "KERNEL"], option].concat());
        assert!(shadow.starts_with(option[0]) && shadow.ends_with(": leave it out"), "{shadow}");
    }
    let shadow = refused(&["--kernel", "KERNEL", "--paging", "shadow"]);
    assert!(shadow.contains("--paging shadow") && shadow.contains("Linux"), "{shadow}");
    let disks = [&["--kernel", "KERNEL"][..], &["--disk", "x"].repeat(11)].concat();
    assert!(refused(&disks).contains("11 devices"));
    assert!(refused(&["--kernel", "KERNEL", "--disk", ",ro"]).contains("name a file"));
}
