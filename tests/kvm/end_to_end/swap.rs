//! Swap that is too small, not to be had, or breaks in mid-run: a sentence and an exit code, no
//! panic, no wrong data, and no file left behind.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use libtest_mimic::Trial;

use crate::process::{Finished, Stream, find_program, run, start};
use crate::trial::{Ignore, kvm_trial, kvm_trial_or_ignore};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        kvm_trial("swap_runs_full", swap_runs_full),
        kvm_trial("swap_runs_full_under_stress", swap_runs_full_under_stress),
        kvm_trial("swap_file_exists", swap_file_exists),
        kvm_trial("swap_file_cannot_be_made", swap_file_cannot_be_made),
        kvm_trial_or_ignore("disk_full_in_mid_run", || disk_full_in_mid_run("shadow")),
        kvm_trial_or_ignore("disk_full_in_mid_run_direct", || disk_full_in_mid_run("direct")),
    ]
}

const SMALL: [&str; 4] = ["--memory", "48M", "--host-memory", "16M"];

fn boot(arguments: &[&str]) -> Finished {
    run(&[&["boot"], &SMALL[..], arguments].concat())
}

fn plain(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}

fn swap_runs_full() {
    let finished = boot(&["--swap-size", "8M"]).with_code(1);
    let finished = finished.says(&["the guest was ended: ", "swap is full", "2048 slots"]);
    assert!(!finished.stdout.contains("FAIL"), "the guest saw no wrong data: {finished:#?}");
    assert!(!finished.stderr.contains("violations"), "{finished:#?}");
}

fn swap_runs_full_under_stress() {
    // It ends as soon as swap is full.
    let arguments = ["stress", "--duration", "100s", "--swap-size", "8M"];
    let finished = run(&[&arguments, &SMALL[..]].concat()).with_code(1);
    assert!(finished.stdout.contains("swap is full"), "{finished:#?}");
    assert!(!finished.stdout.contains("I1/I2"), "no data was lost: {finished:#?}");
}

fn swap_file_exists() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let swap = folder.path().join("precious");
    fs::write(&swap, "data").expect("it can be written");
    let finished = boot(&["--swap-file", plain(&swap)]).with_code(2).says(&["precious", "exists"]);
    assert_eq!(finished.stdout, "");
    assert_eq!(fs::read(&swap).expect("it is still there"), b"data");
    // Neither is a symbolic link followed, wherever it leads.
    let link = folder.path().join("link");
    let target = folder.path().join("target");
    std::os::unix::fs::symlink(&target, &link).expect("a link");
    boot(&["--swap-file", plain(&link)]).with_code(2);
    assert!(!target.exists());
}

fn swap_file_cannot_be_made() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("file");
    fs::write(&file, "").expect("it can be written");
    for path in [file.join("swap"), "/no/such/folder/swap".into(), "/proc/swap".into()] {
        let finished = boot(&["--swap-file", plain(&path)]).with_code(2);
        let finished = finished.says(&[plain(&path), "--swap-file"]);
        assert_eq!(finished.stderr.lines().count(), 1, "{finished:#?}");
    }
}

/// A tmpfs of a few MiB, unmounted when dropped.
struct SmallDisk {
    folder: tempfile::TempDir,
}

impl SmallDisk {
    fn mount(size: &str) -> Result<Self, Ignore> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        if !nix::unistd::geteuid().is_root() {
            return Err(Ignore("only root can mount a small disk".to_owned()));
        }
        let Some(mount) = find_program("mount") else {
            return Err(Ignore("there is no mount in PATH".to_owned()));
        };
        let options = format!("size={size}");
        let output = Command::new(mount)
            .args(["-t", "tmpfs", "-o", &options, "tmpfs"])
            .arg(folder.path())
            .output()
            .expect("mount runs");
        if !output.status.success() {
            let reason = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(Ignore(format!("a small disk cannot be mounted: {reason}")));
        }
        Ok(Self { folder })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // What cannot be unmounted stays behind, empty.
        let _ = Command::new("umount").arg(self.folder.path()).status();
    }
}

/// Somebody else takes what is left of the disk once the guest runs: before that, it would be refused.
fn disk_full_in_mid_run(paging: &str) -> Result<(), Ignore> {
    let disk = SmallDisk::mount("64m")?;
    let swap = disk.path("swap");
    let on_it = ["--swap-file", plain(&swap), "--swap-size", "64M"];
    let endless = ["--cmdline", "mode=stress", "--paging", paging];
    let mut running = start(&[&["boot"], &SMALL[..], &on_it, &endless].concat());
    running.wait_for(Stream::Stdout, "Gnomon test guest");
    let filler = disk.path("filler");
    let mut others = fs::File::create(&filler).expect("it can be made");
    let full = std::io::copy(&mut std::io::repeat(1), &mut others).expect_err("the disk is full");
    assert_eq!(full.kind(), std::io::ErrorKind::StorageFull, "{full}");
    let finished = running.finish().with_code(1);
    let finished = finished.says(&["the guest was ended: ", "No space left on device"]);
    assert!(!finished.stdout.contains("FAIL"), "the guest saw no wrong data: {finished:#?}");
    assert!(!swap.exists(), "the swap file is gone");
    drop(others);
    fs::remove_file(&filler).expect("it is ours");
    // What was given back is enough for the next.
    let arguments = ["boot", "--memory", "16M", "--host-memory", "14M"];
    run(&[&arguments[..], &on_it].concat()).with_code(0);
    Ok(())
}
