//! Stock kernels and their disks, as far as this host can run or have them.

use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::trial::Ignore;
use crate::{bzimage, end_of, gnomon, piped};

fn kernel(folder: &Path) -> String {
    let path = folder.join("kernel");
    fs::write(&path, bzimage::image()).unwrap();
    path.to_str().unwrap().to_owned()
}

/// What `doctor` says of stock kernels: the status, and why.
fn stock_kernels() -> (String, String) {
    let output = gnomon(&[&["doctor", "--json"]]).output().unwrap();
    let found: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let findings = found["findings"].as_array().unwrap();
    let line = findings.iter().find(|line| line["what"] == "stock Linux kernels").unwrap();
    let text = |key: &str| line[key].as_str().unwrap().to_owned();
    (text("status"), text("detail"))
}

pub(crate) fn stock_kernels_are_refused_where_ring_0_is_emulated() -> Result<(), Ignore> {
    let (status, detail) = stock_kernels();
    if status == "ok" {
        return Err(Ignore("this host runs stock kernels".to_owned()));
    }
    assert_eq!(status, "limited");
    let folder = tempfile::tempdir().unwrap();
    let output = end_of(piped(&[&["boot", "--kernel", &kernel(folder.path())]]));
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(output.stdout.is_empty(), "the guest did not start");
    assert!(said.starts_with("gnomon: this host cannot run stock Linux kernels: "), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    let is_pvm = Path::new("/sys/module/kvm_pvm").exists();
    for said in [said, detail] {
        assert!(said.contains("use a host with VMX or SVM"), "{said}");
        assert!(!is_pvm || said.contains("its KVM is PVM"), "{said}");
    }
    Ok(())
}

/// A file as a block device.
struct Loop(PathBuf);

impl Loop {
    fn of(file: &Path, options: &[&str]) -> Result<Self, Ignore> {
        let made =
            Command::new("losetup").args(["--find", "--show"]).args(options).arg(file).output();
        let why = |why: String| Ignore(format!("no loop device can be made: {why}"));
        let made = made.map_err(|error| why(error.to_string()))?;
        if !made.status.success() {
            return Err(why(String::from_utf8_lossy(&made.stderr).trim().to_owned()));
        }
        Ok(Self(String::from_utf8(made.stdout).unwrap().trim().into()))
    }

    fn name(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.0).status();
    }
}

/// How a start with this disk, and one that cannot be opened after it, ends: the disk's own sentence is
/// the first, if it has one.
fn with_disk(kernel: &str, disk: &str) -> (bool, String) {
    let output =
        end_of(piped(&[&["boot", "--kernel", kernel, "--disk", disk, "--disk", "/nowhere"]]));
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{said}");
    (said.contains("there is no disk image /nowhere"), said)
}

pub(crate) fn block_devices_are_disks() -> Result<(), Ignore> {
    let folder = tempfile::tempdir().unwrap();
    let kernel = kernel(folder.path());
    let file = folder.path().join("file");
    fs::write(&file, vec![0; 4 << 20]).unwrap();
    let taken = |disk: &str| {
        let (is_taken, said) = with_disk(&kernel, disk);
        assert!(is_taken, "{said}");
    };
    let refused = |disk: &str, parts: &[&str]| {
        let (is_taken, said) = with_disk(&kernel, disk);
        assert!(!is_taken, "{disk} is taken");
        for part in parts {
            assert!(said.contains(part), "no {part:?} in: {said}");
        }
    };
    {
        let device = Loop::of(&file, &[])?;
        taken(device.name());
        taken(&format!("{},ro", device.name()));
        // Claimed by somebody on this host, as by a mount.
        let claim = fs::File::options().read(true).custom_flags(nix::libc::O_EXCL).open(&device.0);
        let user = claim.unwrap();
        refused(device.name(), &[device.name(), "in use on this host", "add ,ro"]);
        taken(&format!("{},ro", device.name()));
        drop(user);
        taken(device.name());
    }
    {
        let device = Loop::of(&file, &["--read-only"])?;
        refused(device.name(), &["cannot be written", "add ,ro"]);
        taken(&format!("{},ro", device.name()));
    }
    let make = ["create", "-q", "-f", "qcow2", file.to_str().unwrap(), "1M"];
    let made = Command::new("qemu-img").args(make).stderr(Stdio::null()).status();
    if !made.is_ok_and(|status| status.success()) {
        let mut image = vec![0; 1 << 20];
        image[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        fs::write(&file, image).unwrap();
    }
    let device = Loop::of(&file, &[])?;
    refused(device.name(), &["is a qcow2 image", "add ,raw"]);
    taken(&format!("{},raw", device.name()));
    Ok(())
}
