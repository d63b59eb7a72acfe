//! The inputs that the fuzzer kept, and those that once found something, as ordinary tests.

use std::collections::BTreeSet;
use std::fs;
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};

use super::{TARGETS, run};

/// What the corpus may come to, so that replaying it stays cheap.
const MAX_FILES: usize = 200;
const MAX_BYTES: usize = 1 << 20;

fn fuzz() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz")
}

fn names(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{folder:?}: {error}"));
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// The inputs in a target's folder; there is none for a target that never found anything.
fn inputs(kind: &str, target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = fuzz().join(kind).join(target);
    if kind == "regressions" && !folder.exists() {
        return Vec::new();
    }
    names(&folder)
        .into_iter()
        .map(|name| folder.join(name))
        .map(|path| (path.clone(), fs::read(&path).unwrap()))
        .collect()
}

fn replay(target: &str) {
    let corpus = inputs("corpus", target);
    assert!(!corpus.is_empty(), "no corpus for {target}");
    for (path, data) in corpus.into_iter().chain(inputs("regressions", target)) {
        if catch_unwind(|| run(target, &data)).is_err() {
            panic!("{} finds the above", path.display());
        }
    }
}

#[test]
fn the_corpus_of_boot_finds_nothing() {
    replay("boot");
}

#[test]
fn the_corpus_of_compressed_finds_nothing() {
    replay("compressed");
}

#[test]
fn the_corpus_of_emulator_finds_nothing() {
    replay("emulator");
}

#[test]
fn the_corpus_of_linux_finds_nothing() {
    replay("linux");
}

#[test]
fn the_corpus_of_peer_protocol_finds_nothing() {
    replay("peer_protocol");
}

#[test]
#[cfg(feature = "export-notifier")]
fn the_corpus_of_shadow_mmu_finds_nothing() {
    replay("shadow_mmu");
}

#[test]
#[cfg(feature = "export-notifier")]
fn the_corpus_of_virtio_finds_nothing() {
    replay("virtio");
}

/// The fuzzer takes the calls that revoke a page for the kernel's having done it. Here they are made,
/// and the kernel is asked.
#[test]
#[cfg(feature = "export-notifier")]
fn the_corpus_of_shadow_mmu_finds_nothing_on_the_kernel_either() {
    use super::shadow_mmu::run_on_kernel;
    use crate::shadow_mmu::reference::machine::config;

    for (_, data) in inputs("corpus", "shadow_mmu") {
        run_on_kernel(config(), &data);
    }
}

#[test]
fn every_target_takes_any_bytes() {
    for target in TARGETS {
        for length in [0, 1, 7, 64, 4096] {
            for byte in [0, 1, 0x5a, 0xff] {
                (target.run)(&vec![byte; length]);
            }
        }
    }
}

/// What each sabotage of the host side does is found by at least one input of the corpus.
#[test]
#[cfg(feature = "export-notifier")]
fn the_corpus_of_shadow_mmu_catches_sabotage() {
    use std::panic::AssertUnwindSafe;

    use super::shadow_mmu::run_on_kernel;
    use crate::export_rmap::client::FORGET_RMAP;
    use crate::host_mm::HostMmConfig;
    use crate::host_mm::hooks::{DROP_DIRTY, SKIP_FLUSH, SWAP_CORRUPT};
    use crate::shadow_mmu::reference::machine::config;

    for sabotage in [FORGET_RMAP, DROP_DIRTY, SKIP_FLUSH, SWAP_CORRUPT] {
        let is_caught = inputs("corpus", "shadow_mmu").iter().any(|(_, data)| {
            let config = HostMmConfig { sabotage: Some(sabotage), ..config() };
            catch_unwind(AssertUnwindSafe(|| run_on_kernel(config, data))).is_err()
        });
        assert!(is_caught, "{sabotage:?}");
    }
}

#[test]
#[cfg(feature = "export-notifier")]
fn each_target_has_a_corpus_a_binary_and_a_line_in_the_documents() {
    let targets: BTreeSet<_> = TARGETS.iter().map(|target| target.name.to_owned()).collect();
    assert_eq!(names(&fuzz().join("corpus")), targets);
    let binaries = targets.iter().map(|target| format!("{target}.rs")).collect();
    assert_eq!(names(&fuzz().join("src/bin")), binaries);
    let page = fs::read_to_string(fuzz().join("../docs/fuzzing.md")).unwrap();
    let patches = fuzz().join("../mutants");
    let proofs: Vec<_> = names(&patches)
        .iter()
        .map(|name| fs::read_to_string(patches.join(name)).unwrap())
        .collect();
    for target in &targets {
        assert!(page.contains(&format!("| `{target}` |")), "{target} in docs/fuzzing.md");
        let proof = format!("# caught by: fuzz {target}\n");
        assert!(proofs.iter().any(|patch| patch.contains(&proof)), "no proof that {target} works");
    }
}

#[test]
fn the_corpus_is_small() {
    for target in TARGETS {
        let corpus = inputs("corpus", target.name);
        assert!(corpus.len() < MAX_FILES, "{}: {} files", target.name, corpus.len());
    }
    let bytes = |kind| -> usize {
        let of = |name| inputs(kind, name).iter().map(|(_, data)| data.len()).sum::<usize>();
        TARGETS.iter().map(|target| of(target.name)).sum()
    };
    assert!(bytes("corpus") + bytes("regressions") < MAX_BYTES);
}
