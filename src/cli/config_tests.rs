//! Every refusal of the second stage, by what its sentence says.

use std::fs::{self, File};
use std::time::Duration;

use clap::Parser;

use super::*;
use crate::cli::args::{Cli, Command};
use crate::cli::kernel_file::read_kernel;
use crate::host_mm::hooks::DROP_DIRTY;
use crate::vmm::boot::MAX_IMAGE_BYTES;

fn limits() -> HostLimits {
    let swap_folder = Some(Folder::on_disk());
    let available_bytes = Some(1 << 40);
    HostLimits { max_vcpus: Some(8), available_bytes, swap_folder, ..HostLimits::default() }
}

fn try_boot(words: &[&str]) -> Result<MachineConfig, String> {
    let words = ["gnomon", "boot"].iter().chain(words);
    match Cli::try_parse_from(words).unwrap().command {
        Command::Boot(args) => {
            let kernel = args.kernel.as_deref().map(read_kernel).transpose();
            let config = kernel.and_then(|kernel| boot(&args, kernel, &limits()));
            config.map_err(|error| error.to_string())
        }
        other => panic!("{other:?}"),
    }
}

fn try_stress(words: &[&str]) -> Result<StressConfig, String> {
    let words = ["gnomon", "stress"].iter().chain(words);
    match Cli::try_parse_from(words).unwrap().command {
        Command::Stress(args) => stress(&args, &limits()).map_err(|error| error.to_string()),
        other => panic!("{other:?}"),
    }
}

/// The sentence with which `gnomon boot` with these words is refused.
fn refusal(words: &[&str]) -> String {
    try_boot(words).map(|_| ()).unwrap_err()
}

#[track_caller]
fn assert_says(sentence: &str, parts: &[&str]) {
    assert!(!sentence.contains('\n'), "one sentence: {sentence}");
    for part in parts {
        assert!(sentence.contains(part), "no {part:?} in: {sentence}");
    }
}

#[test]
fn boot_without_options_runs_the_test_guest() {
    let config = try_boot(&[]).unwrap();
    assert_eq!(config.setup.vm.memory_bytes, 256 << 20);
    assert_eq!(config.setup.host.host_memory_bytes, 64 << 20);
    assert_eq!(config.setup.vm.vcpus, 1);
    assert_eq!(config.setup.vm.cmdline, "mode=boot");
    assert_eq!(config.setup.host.swap.bytes, 1 << 30);
    assert!(!config.setup.host.paranoid && config.setup.host.sabotage.is_none());
    assert!(config.setup.vm.kernel.starts_with(b"\x7fELF"));
}

#[test]
fn swap_grows_with_the_guest_unless_its_size_is_given() {
    assert_eq!(try_boot(&["--memory", "64G"]).unwrap().setup.host.swap.bytes, 64 << 30);
    let given = try_boot(&["--memory", "1G", "--swap-size", "64M"]).unwrap();
    assert_eq!(given.setup.host.swap.bytes, 64 << 20);
    assert_says(
        &given.notes.warnings.join("|"),
        &["--memory 1G", "--host-memory 64M", "--swap-size 64M"],
    );
    let enough = try_boot(&["--memory", "128M", "--swap-size", "64M"]).unwrap();
    assert!(!enough.notes.warnings.join("|").contains("--swap-size"));
}

#[test]
fn more_host_memory_than_there_is_brings_a_warning() {
    let config = try_boot(&["--host-memory", "2T"]).unwrap();
    assert_says(&config.notes.warnings.join("|"), &["--host-memory 2T", "1 TiB"]);
}

#[test]
fn sizes_out_of_range_are_refused_with_the_bound() {
    assert_says(&refusal(&["--memory", "8M"]), &["--memory 8M", "at least 16M"]);
    assert_says(&refusal(&["--memory", "1T"]), &["--memory 1T", "at most 512G"]);
    assert_says(&refusal(&["--host-memory", "1M"]), &["--host-memory 1M", "at least 4M"]);
    assert_says(&refusal(&["--vcpus", "9"]), &["--vcpus 9", "at most 8"]);
    assert_says(&refusal(&["--swap-size", "8192T"]), &["--swap-size 8P", "give less"]);
    assert!(try_boot(&["--memory", "16M", "--host-memory", "4M", "--vcpus", "8"]).is_ok());
    assert!(try_boot(&["--memory", "512G"]).is_ok());
}

#[test]
fn a_swap_file_must_be_new_and_have_a_directory() {
    let folder = tempfile::tempdir().unwrap();
    let existing = folder.path().join("swap");
    fs::write(&existing, b"").unwrap();
    let existing = existing.to_str().unwrap();
    assert_says(
        &refusal(&["--swap-file", existing]),
        &[existing, "exists already", "name another"],
    );
    let nowhere = folder.path().join("no/such/swap");
    let nowhere = nowhere.to_str().unwrap();
    assert_says(&refusal(&["--swap-file", nowhere]), &[nowhere, "not a directory"]);
    let fresh = folder.path().join("fresh");
    let config = try_boot(&["--swap-file", fresh.to_str().unwrap()]).unwrap();
    assert_eq!(config.setup.host.swap.path.as_deref(), Some(fresh.as_path()));
    assert!(!fresh.exists(), "validation makes nothing");
}

#[test]
fn kernels_that_cannot_be_read_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let missing = path("missing");
    assert_says(&refusal(&["--kernel", &missing]), &[&missing, "No such file", "check the path"]);
    assert_says(&refusal(&["--kernel", &path("")]), &["not a file", "name another one"]);
    assert_says(&refusal(&["--kernel", "/dev/zero"]), &["/dev/zero", "not a file"]);
    let big = path("big");
    File::create(&big).unwrap().set_len(MAX_IMAGE_BYTES + 1).unwrap();
    assert_says(&refusal(&["--kernel", &big]), &["268435457 bytes", "256M", "name a smaller one"]);
    let small = path("small");
    fs::write(&small, b"kernel").unwrap();
    let config = try_boot(&["--kernel", &small]).unwrap();
    assert_eq!(config.setup.vm.kernel.as_ref(), b"kernel");
    assert_eq!(config.setup.vm.cmdline, "", "another kernel gets no words of the test guest's");
}

#[test]
fn command_lines_must_fit() {
    let fits = "x".repeat(4095);
    assert!(try_boot(&["--cmdline", &fits]).is_ok());
    let long = "x".repeat(4096);
    assert_says(&refusal(&["--cmdline", &long]), &["4096 bytes", "4095"]);
    assert_says(&refusal(&["--cmdline", "a\0b"]), &["NUL at byte 1"]);
    assert_eq!(try_boot(&["--cmdline", "--x=1"]).unwrap().setup.vm.cmdline, "--x=1");
}

#[test]
fn stress_tells_the_guest_what_to_do() {
    let words = ["--workload", "zipf,seq,zipf", "--seed", "7"];
    let config = try_stress(&words).unwrap();
    assert_eq!(config.plan.setup.vm.cmdline, "mode=stress workload=zipf,seq seed=7 dma=5");
    assert_eq!(config.plan.setup.vm.memory_bytes, 512 << 20);
    assert!(config.plan.setup.host.check_evictions);
    assert_eq!(config.plan.setup.host.policy, ReclaimPolicy::Clock);
    assert_eq!(config.plan.storm.kinds, [Invalidation::Reclaim, Invalidation::Clean]);
    assert!(!config.plan.fail_fast);
    let config = try_stress(&["--workload", "seq", "--seed", "7", "--dma", "0"]).unwrap();
    assert_eq!(config.plan.setup.vm.cmdline, "mode=stress workload=seq seed=7");
}

#[test]
fn sabotage_implies_fail_fast() {
    let config = try_stress(&["--sabotage", "drop-dirty", "--policy", "fifo"]).unwrap();
    assert_eq!(config.plan.setup.host.sabotage, Some(DROP_DIRTY));
    assert_eq!(config.plan.setup.host.policy, ReclaimPolicy::Fifo);
    assert!(config.plan.fail_fast);
    assert!(try_stress(&["--fail-fast"]).unwrap().plan.fail_fast);
}

#[test]
fn none_is_no_invalidation_among_others() {
    assert!(try_stress(&["--invalidate", "none"]).unwrap().plan.storm.kinds.is_empty());
    let refused = try_stress(&["--invalidate", "none,clean"]).map(|_| ()).unwrap_err();
    assert_says(&refused, &["--invalidate none", "reclaim, clean"]);
}

#[test]
fn a_report_that_cannot_be_written_is_refused_before_the_run() {
    let refused = try_stress(&["--json", "/no/such/folder/report.json"]).map(|_| ()).unwrap_err();
    assert_says(&refused, &["--json", "/no/such/folder"]);
}

#[test]
fn several_vms_have_swap_for_all_of_them() {
    let one = try_stress(&["--memory", "4G"]).unwrap();
    assert_eq!((one.plan.vms, one.plan.churn, one.plan.setup.host.swap.bytes), (1, None, 4 << 30));
    let three = try_stress(&["--memory", "4G", "--vms", "3"]).unwrap();
    assert_eq!((three.plan.vms, three.plan.setup.host.swap.bytes), (3, 12 << 30));
    // One that is asked to finish is there in addition.
    let churned = try_stress(&["--memory", "4G", "--vms", "3", "--churn", "2s"]).unwrap();
    assert_eq!(churned.plan.churn, Some(Duration::from_secs(2)));
    assert_eq!(churned.plan.setup.host.swap.bytes, 16 << 30);
    let little = try_stress(&["--memory", "1G", "--vms", "2", "--swap-size", "64M"]).unwrap();
    assert_says(&little.notes.warnings.join("|"), &["--memory 1G for each of up to 2 VMs"]);
}

#[test]
fn churn_wants_another_vm() {
    let refused = |words: &[&str]| try_stress(words).map(|_| ()).unwrap_err();
    assert_says(&refused(&["--churn", "1s"]), &["add --vms 2"]);
    let sabotage = ["--vms", "2", "--sabotage", "skip-clone-protect"];
    assert_says(&refused(&sabotage), &["add --vms 2 --churn 1s"]);
    assert!(try_stress(&[&sabotage[..], &["--churn", "1s"]].concat()).is_ok());
}

#[test]
#[cfg(feature = "export-notifier")]
fn a_socket_for_peers_must_be_free_and_faults_of_peers_need_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let refusal = |words: &[&str]| try_stress(words).map(drop).unwrap_err();
    let free = try_stress(&["--export-socket", &path("free"), "--peer-limit", "50"]).unwrap();
    assert_eq!(free.plan.peers.unwrap().limit, Duration::from_millis(50));
    assert!(!folder.path().join("free").exists(), "nothing is made before the run");
    std::fs::write(path("file"), "").unwrap();
    assert_says(&refusal(&["--export-socket", &path("file")]), &["not a socket", "another place"]);
    let socket = std::os::unix::net::UnixListener::bind(path("taken")).unwrap();
    assert_says(&refusal(&["--export-socket", &path("taken")]), &["another process serves this"]);
    drop(socket);
    try_stress(&["--export-socket", &path("taken")]).expect("a stale socket is no hindrance");
    assert!(folder.path().join("taken").exists(), "and stays until the run");
    assert_says(&refusal(&["--inject", "peer-hang@5"]), &["peer-hang@5+", "--export-socket"]);
    assert_says(&try_boot(&["--inject", "peer-kill"]).map(drop).unwrap_err(), &["boot serves no"]);
}

fn stress_refusal(words: &[&str]) -> String {
    try_stress(words).map(|_| ()).unwrap_err()
}

#[test]
fn direct_paging_ties_frames_to_pages_and_has_its_own_default_sources() {
    use Invalidation::{Clean, Free, Reclaim, Remove};
    let direct = try_stress(&["--paging", "direct", "--memory", "96M"]).unwrap();
    assert_eq!(direct.plan.setup.paging, Paging::Direct(crate::vmm::Removal::Both));
    assert_eq!(
        direct.plan.setup.host.placement,
        crate::host_mm::Placement::Identity { guest_bytes: 96 << 20 }
    );
    assert_eq!(direct.plan.storm.kinds, [Reclaim, Clean, Free, Remove]);
    assert!(direct.plan.setup.vm.cmdline.contains(" free=2"), "{}", direct.plan.setup.vm.cmdline);
    let removed = try_stress(&["--paging", "direct", "--invalidate", "remove"]).unwrap();
    assert_eq!(removed.plan.setup.paging, Paging::Direct(crate::vmm::Removal::Window));
    for words in [&[][..], &["--paging", "auto"], &["--paging", "shadow"]] {
        let shadow = try_stress(words).unwrap();
        assert_eq!(
            shadow.plan.setup.paging,
            Paging::Shadow,
            "the test guest keeps to its contract"
        );
        assert_eq!(shadow.plan.setup.host.placement, crate::host_mm::Placement::Anywhere);
        assert_eq!(shadow.plan.storm.kinds, [Reclaim, Clean]);
    }
}

#[test]
fn direct_paging_refuses_what_wants_other_frames() {
    for kind in ["migrate", "merge", "cow", "zero", "remap"] {
        let said = stress_refusal(&["--paging", "direct", "--invalidate", kind]);
        assert_says(&said, &["--invalidate", kind, "its own", "--paging shadow"]);
    }
    for (words, part) in [
        (&["--vms", "2"][..], "--vms"),
        (&["--vms", "2", "--churn", "1s"], "--vms"),
        (&["--export-socket", "/tmp/gnomon-none"], "--export-socket"),
        (&["--paranoid"], "--paranoid"),
        (&["--sabotage", "early-reuse"], "early-reuse"),
        (&["--sabotage", "skip-clone-protect", "--churn", "1s"], "--churn"),
    ] {
        let said = stress_refusal(&[&["--paging", "direct"], words].concat());
        assert_says(&said, &[part, "--paging shadow"]);
    }
    let said =
        stress_refusal(&["--paging", "direct", "--invalidate", "free", "--sabotage", "drop-event"]);
    assert_says(&said, &["drop-event", "add remove"]);
}

#[test]
fn what_is_about_the_window_wants_direct_paging() {
    for words in [
        &["--invalidate", "remove"][..],
        &["--sabotage", "skip-wp"],
        &["--sabotage", "drop-event", "--paging", "shadow"],
    ] {
        assert_says(&stress_refusal(words), &["--paging direct"]);
    }
}

#[test]
fn the_test_guest_has_memory_for_each_of_its_processors() {
    let refused = |vcpus, memory_mib: u64| {
        let sizes =
            Sizes { memory: size(memory_mib << 20), host_memory: size(4 << 20), vcpus, vms: 1 };
        check_test_guest(&sizes).map_err(|error| error.to_string())
    };
    assert_says(
        &refused(255, 32).unwrap_err(),
        &["--memory 32M", "255 vCPUs", "give at least 110M, or fewer --vcpus"],
    );
    assert_eq!((refused(255, 110), refused(33, 16)), (Ok(()), Ok(())));
    assert_says(&refused(34, 16).unwrap_err(), &["give at least 17M"]);
    // Guests that are not built in know what they need.
    try_boot(&["--vcpus", "8", "--memory", "16M"]).unwrap();
}
