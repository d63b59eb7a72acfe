//! The layers import downwards only: a file names nothing from a layer above its own.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Lowest first; layers of one line may use each other.
const LAYERS: &[&[&str]] = &[
    &["abi", "addr", "compressed", "counters", "page_format", "sync", "sys"],
    &["export_rmap"],
    &["host_mm"],
    &["direct_mmu", "peer", "shadow_mmu"],
    &["iotlb"],
    &["virtio"],
    &["vmm"],
    &["cli"],
    &["fuzzing"],
];

fn rank(module: &str) -> Option<usize> {
    LAYERS.iter().position(|names| names.contains(&module))
}

fn rust_files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// The first path segment after each `crate::` of a source text, those of a `crate::{…}` list too.
fn imports(source: &str) -> Vec<String> {
    let mut names = Vec::new();
    for (at, _) in source.match_indices("crate::") {
        let rest = &source[at + "crate::".len()..];
        if let Some(list) = rest.strip_prefix('{') {
            let mut depth = 0;
            let mut name = String::new();
            for letter in list.chars() {
                match letter {
                    '{' => depth += 1,
                    '}' if depth == 0 => break,
                    '}' => depth -= 1,
                    ',' if depth == 0 => names.push(std::mem::take(&mut name)),
                    _ if depth == 0 => name.push(letter),
                    _ => {}
                }
            }
            names.push(name);
        } else {
            names.push(rest.to_owned());
        }
    }
    names
        .iter()
        .map(|name| {
            let word = |letter: &char| letter.is_alphanumeric() || *letter == '_';
            name.trim_start().chars().take_while(word).collect()
        })
        .collect()
}

/// Every import of `source`, a file of `layer`, that points upwards.
fn upward(layer: &str, source: &str) -> Vec<String> {
    let own = rank(layer);
    imports(source).into_iter().filter(|name| rank(name) > own && rank(name).is_some()).collect()
}

#[test]
fn no_file_imports_from_a_layer_above_its_own() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    rust_files(&src, &mut files);
    let mut checked = BTreeMap::new();
    for file in &files {
        let inside = file.strip_prefix(&src).unwrap();
        let first = inside.components().next().unwrap().as_os_str().to_str().unwrap();
        let layer = first.trim_end_matches(".rs");
        if layer == "lib" || layer == "main" {
            continue;
        }
        assert!(rank(layer).is_some(), "{} belongs to no layer", inside.display());
        let source = fs::read_to_string(file).unwrap();
        let wrong = upward(layer, &source);
        assert!(wrong.is_empty(), "{} imports {wrong:?} from above {layer}", inside.display());
        *checked.entry(layer.to_owned()).or_insert(0) += 1;
    }
    for names in &LAYERS[1..] {
        for name in *names {
            assert!(checked.contains_key(*name), "no file of layer {name} was looked at");
        }
    }
}

#[test]
fn an_upward_import_is_noticed() {
    assert_eq!(upward("host_mm", "use crate::vmm::Vm;"), ["vmm"]);
    assert_eq!(upward("sys", "fn f() { crate::export_rmap::g() }"), ["export_rmap"]);
    assert_eq!(upward("addr", "use crate::{sync::{lock, Mutex}, cli::run};"), ["cli"]);
    assert!(upward("vmm", "use crate::{sync, host_mm::HostMm}; use crate::addr::Gpa;").is_empty());
}
