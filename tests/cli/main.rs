//! The built program and bad input: each is refused with exit code 2 and one sentence on standard
//! error that says what is wrong and what to do, and nothing else happens.

#[path = "../common/bzimage.rs"]
mod bzimage;
mod linux;

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Output};

fn gnomon(words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_gnomon")).args(words).output().unwrap()
}

/// Runs it with `words`, which must be refused; returns the sentence.
#[track_caller]
fn refusal(words: &[&str]) -> String {
    let output = gnomon(words);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{words:?}: {said}");
    assert!(output.stdout.is_empty(), "{words:?} printed {:?}", output.stdout);
    assert!(said.starts_with("gnomon: ") && said.ends_with('\n'), "{said:?}");
    assert_eq!(said.lines().count(), 1, "one sentence: {said}");
    assert!(!said.contains("panicked"), "{said}");
    said
}

#[track_caller]
fn assert_refused(words: &[&str], parts: &[&str]) {
    let said = refusal(words);
    for part in parts {
        assert!(said.contains(part), "{words:?}: no {part:?} in: {said}");
    }
}

#[test]
fn sizes() {
    for command in ["boot", "stress"] {
        assert_refused(&[command, "--memory", "lots"], &["--memory \"lots\"", "such as 256M"]);
        assert_refused(&[command, "--memory", "0"], &["--memory \"0\"", "at least 4K"]);
        assert_refused(&[command, "--memory", "100000001"], &["not a multiple of 4096"]);
        assert_refused(&[command, "--memory", "99999999999999999999G"], &["64 bits"]);
        assert_refused(&[command, "--memory", "4M"], &["--memory 4M", "at least 16M"]);
        assert_refused(&[command, "--memory", "513G"], &["--memory 513G", "at most 512G"]);
        assert_refused(&[command, "--host-memory", "1M"], &["--host-memory 1M", "at least 4M"]);
        assert_refused(&[command, "--host-memory", "5T"], &["--host-memory 5T", "at most 4T"]);
        assert_refused(&[command, "--host-memory", "-1M"], &["--host-memory \"-1M\""]);
        assert_refused(&[command, "--host-memory", "99999999999999999999G"], &["give less"]);
        assert_refused(&[command, "--swap-size", "-1"], &["--swap-size \"-1\"", "such as 256M"]);
        assert_refused(&[command, "--swap-size", "16384T"], &["--swap-size 16P", "give less"]);
    }
}

#[test]
fn processors() {
    for count in ["0", "1024", "-1", "many"] {
        assert_refused(&["boot", "--vcpus", count], &[count, "1 to 1023"]);
    }
}

#[test]
fn kernels() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (missing, text, big) = (path("missing"), path("text"), path("big"));
    fs::write(&text, "no kernel at all").unwrap();
    File::create(&big).unwrap().set_len((256 << 20) + 1).unwrap();
    assert_refused(&["boot", "--kernel", &missing], &[&missing, "No such file", "check the path"]);
    assert_refused(
        &["boot", "--kernel", &text],
        &["neither a bzImage nor an ELF file", "begins with \"no kerne\"", "vmlinuz"],
    );
    // In our words, and not in those of what reads them.
    for (name, contents, parts) in [
        ("empty", &b""[..], ["is empty", "copy it again"]),
        ("tiny", b"\x7fELF", ["damaged header: the file ends before", "copy it again"]),
        (
            "cut.zst",
            &[0x28, 0xb5, 0x2f, 0xfd, 0],
            ["by zstd, and it is truncated", "copy it again"],
        ),
        ("cut.gz", &[0x1f, 0x8b, 8, 0], ["by gzip, and it is truncated", "copy it again"]),
    ] {
        let path = path(name);
        fs::write(&path, contents).unwrap();
        assert_refused(&["boot", "--kernel", &path], &parts);
    }
    assert_refused(&["boot", "--kernel", &big], &[&big, "268435457 bytes", "256M"]);
    assert_refused(&["boot", "--kernel", folder.path().to_str().unwrap()], &["not a file"]);
    assert_refused(&["boot", "--kernel", "/dev/zero"], &["/dev/zero", "not a file"]);
}

#[test]
fn command_lines() {
    let long = "x".repeat(5000);
    assert_refused(&["boot", "--cmdline", &long], &["5000 bytes", "4095"]);
}

#[test]
fn swap_files() {
    let folder = tempfile::tempdir().unwrap();
    let existing = folder.path().join("swap");
    fs::write(&existing, "precious").unwrap();
    let existing = existing.to_str().unwrap();
    assert_refused(&["boot", "--swap-file", existing], &[existing, "exists already"]);
    assert_eq!(fs::read(existing).unwrap(), b"precious");
    let nowhere = folder.path().join("no/swap");
    assert_refused(&["boot", "--swap-file", nowhere.to_str().unwrap()], &["not a directory"]);
    assert_refused(&["boot", "--swap-file", "/proc/gnomon-swap"], &["/proc/gnomon-swap"]);
}

#[test]
fn stress_options() {
    assert_refused(&["stress", "--duration", "30"], &["--duration \"30\"", "such as 30s"]);
    assert_refused(&["stress", "--duration", "0s"], &["at least 1ms"]);
    assert_refused(&["stress", "--rate", "fast"], &["such as 20000/s"]);
    assert_refused(&["stress", "--rate", "0/s"], &["--invalidate none"]);
    assert_refused(&["stress", "--seed", "-5"], &["--seed \"-5\""]);
    assert_refused(&["stress", "--workload", "walk"], &["\"walk\"", "seq, random"]);
    assert_refused(&["stress", "--workload", ""], &["--workload"]);
    assert_refused(&["stress", "--invalidate", "clean,none"], &["none", "reclaim"]);
    assert_refused(&["stress", "--invalidate", "all"], &["\"all\"", "reclaim, clean, migrate"]);
    assert_refused(&["stress", "--sabotage", "luck"], &["\"luck\"", "skip-flush"]);
    assert_refused(&["stress", "--policy", "lru"], &["\"lru\"", "clock, fifo"]);
}

#[test]
fn injected_faults() {
    for command in ["boot", "stress"] {
        let refused = |item: &str, parts: &[&str]| {
            assert_refused(
                &[command, "--inject", item],
                &[&[&*format!("{item:?}")], parts].concat(),
            );
        };
        refused("gremlin", &["--inject", "no such fault", "swap-write=ERRNO@WHEN", "eintr[=P]"]);
        refused("peer-hang@0", &["such as peer-hang@100"]);
        assert_refused(&[command, "--inject", "peer-kill"], &["peer-kill@1", "--export-socket"]);
        refused("swap-write=EPERM@1", &["EIO, ENOSPC, ENOMEM"]);
        refused("swap-read=EIO", &["@N the N-th", "@N/M"]);
        refused("swap-full@0", &["swap-full@100"]);
        refused("frame-enomem=2", &["probability above 0 and up to 0.9"]);
        refused("slow-notifier=0", &["1 to 10000 milliseconds"]);
        assert_refused(
            &[command, "--inject", "eintr,luck"],
            &["--inject \"luck\"", "no such fault"],
        );
        assert_refused(&[command, "--inject"], &["--inject <LIST> needs a value"]);
    }
    assert_refused(&["boot", "--seed", "x"], &["--seed \"x\"", "whole number"]);
}

#[test]
fn reports_that_cannot_be_written() {
    let folder = tempfile::tempdir().unwrap();
    let nowhere = folder.path().join("no/report.json");
    let nowhere = nowhere.to_str().unwrap();
    assert_refused(&["stress", "--json", nowhere], &["--json", nowhere, "another place"]);
    let here = folder.path().to_str().unwrap();
    assert_refused(&["stress", "--json", here], &[here, "not a file"]);
    assert_refused(&["stress", "--json", "/proc/report.json"], &["/proc"]);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn options_and_commands_that_do_not_exist() {
    assert_refused(&[], &["boot, stress, peer, doctor"]);
    assert_refused(&["dance"], &["dance"]);
    assert_refused(&["boot", "--memroy", "1G"], &["--memroy", "--memory"]);
    assert_refused(&["boot", "--memory"], &["--memory <SIZE> needs a value"]);
    assert_refused(&["boot", "--memory", "--vcpus", "2"], &["--memory <SIZE> needs a value"]);
    assert_refused(&["doctor", "now"], &["now"]);
}

#[test]
fn help_and_version_are_no_errors() {
    for (words, part) in [
        (&["--help"][..], "Usage: gnomon <COMMAND>"),
        (&["boot", "--help"], "--host-memory <SIZE>"),
        (&["stress", "--help"], "skip-flush"),
        (&["--version"], env!("CARGO_PKG_VERSION")),
    ] {
        let output = gnomon(words);
        let said = String::from_utf8(output.stdout).unwrap();
        assert_eq!(output.status.code(), Some(0));
        assert!(said.contains(part), "no {part:?} in {said}");
    }
}

#[test]
fn times_below_zero() {
    assert_refused(&["stress", "--duration", "-1s"], &["--duration \"-1s\"", "such as 30s"]);
    assert_refused(&["peer", "socket", "--duration", "-5m"], &["--duration \"-5m\"", "below 0"]);
}

/// What is asked for and cannot be written is told, and is a failure.
#[test]
fn output_that_cannot_be_written() {
    let (reader, without_reader) = std::io::pipe().unwrap();
    drop(reader);
    let without_reader: std::process::Stdio = without_reader.into();
    let full =
        || -> std::process::Stdio { File::options().write(true).open("/dev/full").unwrap().into() };
    let cases: [(&[&str], std::process::Stdio, &str); 4] = [
        (&["--help"], full(), "No space left"),
        (&["--version"], full(), "No space left"),
        (&["doctor", "--json"], full(), "No space left"),
        (&["boot", "--help"], without_reader, "Broken pipe"),
    ];
    for (words, stdout, why) in cases {
        let output =
            Command::new(env!("CARGO_BIN_EXE_gnomon")).args(words).stdout(stdout).output().unwrap();
        assert_output_is_lacking(words, &output, why);
    }
    let closed = Command::new("sh")
        .args(["-c", r#""$0" --version >&-"#, env!("CARGO_BIN_EXE_gnomon")])
        .output()
        .unwrap();
    assert_output_is_lacking(&["--version"], &closed, "Bad file descriptor");
    // To nobody, and on purpose.
    let nobody = Command::new(env!("CARGO_BIN_EXE_gnomon"))
        .arg("--version")
        .stdout(std::process::Stdio::null())
        .status();
    assert_eq!(nobody.unwrap().code(), Some(0));
}

#[track_caller]
fn assert_output_is_lacking(words: &[&str], output: &Output, why: &str) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{words:?}: {said}");
    assert_eq!(said.lines().count(), 1, "{words:?}: {said}");
    for part in ["cannot write all of its output", why, "redirect it"] {
        assert!(said.contains(part), "{words:?}: no {part:?} in {said}");
    }
}

/// Arguments are bytes, not text.
#[test]
fn words_that_are_no_utf8() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    let word = OsStr::from_bytes(b"\xff\xfe");
    let output = Command::new(env!("CARGO_BIN_EXE_gnomon"))
        .args([OsStr::new("boot"), OsStr::new("--cmdline"), word])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    // A file may well be called so.
    let output = Command::new(env!("CARGO_BIN_EXE_gnomon"))
        .args([OsStr::new("boot"), OsStr::new("--kernel"), word])
        .output()
        .unwrap();
    assert!(!Path::new(word).exists());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("No such file"), "{said}");
}
