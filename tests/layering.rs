//! The layers import downwards only: a file names nothing from a layer above its own. So do the rooms of
//! the VMM.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Lowest first; layers of one line may use each other.
const LAYERS: &[&[&str]] = &[
    &["abi", "addr", "compressed", "counters", "page_format", "streams", "sync", "sys"],
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

/// The rooms of the VMM, lowest first. One imports from those below it only, and not from the other of
/// its line. `mod.rs` beside them is their common face, for the layers above.
const ROOMS: &[&[&str]] = &[
    &["kvm"],
    &["error"],
    &["run", "cpu"],
    &["contract"],
    &["shadow", "direct"],
    &["linux"],
    &["any"],
];

fn room_rank(room: &str) -> Option<usize> {
    ROOMS.iter().position(|names| names.contains(&room))
}

/// Splits a path, or a tree of them as in `use`, at the start of `text`, into single paths.
fn expand(text: &str, prefix: &[String], found: &mut Vec<Vec<String>>) {
    let mut path = prefix.to_vec();
    let mut rest = text;
    loop {
        let word = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
        if word == 0 {
            break;
        }
        path.push(rest[..word].to_owned());
        let Some(after) = rest[word..].strip_prefix("::") else { break };
        rest = after;
        if let Some(list) = rest.strip_prefix('{') {
            let (mut depth, mut start) = (0, 0);
            for (at, letter) in list.char_indices() {
                match letter {
                    '{' => depth += 1,
                    '}' | ',' if depth == 0 => {
                        expand(list[start..at].trim(), &path, found);
                        start = at + 1;
                        if letter == '}' {
                            return;
                        }
                    }
                    '}' => depth -= 1,
                    _ => {}
                }
            }
            return;
        }
    }
    if path.len() > prefix.len() {
        found.push(path);
    }
}

/// `path` as a path from the crate's root, seen from `module`.
fn absolute(path: &[String], module: &[String]) -> Vec<String> {
    let ups = path.iter().take_while(|word| *word == "super").count();
    match path[0].as_str() {
        "crate" => path[1..].to_vec(),
        _ => {
            let kept = module.len().saturating_sub(ups);
            [&module[..kept], &path[ups.max(usize::from(path[0] == "self"))..]].concat()
        }
    }
}

/// The module of a file of the VMM, and every path from `crate`, `super` or `self` that its text has
/// outside of comments, from the crate's root.
fn paths_of(file: &str, source: &str) -> (Vec<String>, Vec<Vec<String>>) {
    let stem = file.strip_suffix("/mod.rs").or(file.strip_suffix(".rs")).unwrap();
    // Tests beside a file are a module of it.
    let stem = stem.strip_suffix("_tests").map_or(stem.to_owned(), |of| format!("{of}/tests"));
    let own: Vec<String> =
        std::iter::once("vmm").chain(stem.split('/')).map(str::to_owned).collect();
    let mut module = own.clone();
    // Where the modules that are written out inside the file end.
    let mut ends: Vec<String> = Vec::new();
    let mut found = Vec::new();
    let lines: Vec<&str> =
        source.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
    for (number, line) in lines.iter().enumerate() {
        if ends.last().is_some_and(|end| end == line) {
            ends.pop();
            module.pop();
        }
        if let Some(head) = line.strip_suffix(" {")
            && let Some((before, name)) = head.split_once("mod ")
            && before.split_whitespace().all(|word| word.starts_with("pub") || word.ends_with(')'))
        {
            ends.push(format!("{}}}", &line[..line.len() - line.trim_start().len()]));
            module.push(name.to_owned());
        }
        for start in ["crate::", "super::", "self::"] {
            for (at, _) in line.match_indices(start) {
                let is_inside =
                    line[..at].ends_with(|c: char| c.is_alphanumeric() || "_:$".contains(c));
                if !is_inside {
                    let text = [&line[at..], &lines[number + 1..].join("\n")].join("\n");
                    let mut paths = Vec::new();
                    expand(&text, &[], &mut paths);
                    found.extend(paths.iter().map(|path| absolute(path, &module)));
                }
            }
        }
    }
    (own, found)
}

/// The rooms that `file` of the VMM names. What is neither in a room nor one is the face's.
fn rooms_named(file: &str, source: &str) -> Vec<String> {
    let (module, paths) = paths_of(file, source);
    let of_vmm = paths.into_iter().filter(|path| path.len() > 1 && path[0] == "vmm");
    of_vmm.map(|mut path| path.swap_remove(1)).filter(|room| *room != module[1]).collect()
}

/// Every room that `file` of the VMM must not name and names, and everything else that it takes from
/// the face.
fn wrong_rooms(file: &str, source: &str) -> Vec<String> {
    let own = room_rank(file.split(['/', '.']).next().unwrap());
    let is_wrong = |room: &String| room_rank(room).is_none() || room_rank(room) >= own;
    rooms_named(file, source).into_iter().filter(is_wrong).collect()
}

#[test]
fn no_room_of_the_vmm_imports_from_one_that_is_not_below_it() {
    let vmm = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/vmm");
    let mut files = Vec::new();
    rust_files(&vmm, &mut files);
    let mut arrows = BTreeMap::new();
    for path in &files {
        let file = path.strip_prefix(&vmm).unwrap().to_str().unwrap();
        if file == "mod.rs" {
            continue;
        }
        let room = file.split(['/', '.']).next().unwrap();
        assert!(room_rank(room).is_some(), "{file} is in no room");
        let source = fs::read_to_string(path).unwrap();
        let wrong = wrong_rooms(file, &source);
        assert!(wrong.is_empty(), "{file} names {wrong:?}");
        for to in rooms_named(file, &source) {
            *arrows.entry((room.to_owned(), to)).or_insert(0) += 1;
        }
    }
    for room in ROOMS[1..].iter().flat_map(|names| *names) {
        assert!(arrows.keys().any(|(from, _)| from == room), "no import of {room} was seen");
    }
    println!("{} rooms, {} arrows, none up", ROOMS.concat().len(), arrows.len());
}

#[test]
fn an_import_from_a_room_that_is_not_below_is_noticed() {
    let named = |file, source| wrong_rooms(file, source);
    assert_eq!(named("kvm/device.rs", "use crate::vmm::error::VmError;"), ["error"]);
    assert_eq!(named("run/gate.rs", "fn f() { crate::vmm::shadow::vm::g() }"), ["shadow"]);
    assert_eq!(named("run/roster/census.rs", "use super::super::super::cpu::gpr;"), ["cpu"]);
    assert_eq!(named("shadow/vm.rs", "use super::super::direct::Bus;"), ["direct"]);
    let list =
        "use crate::{addr::Gpa, vmm::{error::VmError, run::{gate::Gate, kick},\n linux::LinuxVm}};";
    assert_eq!(named("contract/services.rs", list), ["linux"]);
    let inside = "mod tests {\n    use super::super::super::shadow::Vm;\n}\nuse super::super::error::VmError;";
    assert_eq!(named("cpu/state.rs", inside), ["shadow"]);
    assert_eq!(
        named("run/gate_tests.rs", "use super::super::super::contract::boot;"),
        ["contract"]
    );
    assert_eq!(
        named("linux/vm.rs", "use super::super::{Outcome, any::AnyVm};"),
        ["Outcome", "any"]
    );
    assert_eq!(named("error/mod.rs", "pub(in crate::vmm) use super::run::outcome;"), ["run"]);

    let below = "use crate::vmm::run::{gate, kick};\nuse super::{vcpu, super::kvm::device};\n// crate::vmm::linux";
    assert!(named("shadow/exits.rs", below).is_empty());
    assert_eq!(
        rooms_named("shadow/exits.rs", "use crate::vmm::run::{gate, kick};"),
        ["run", "run"]
    );
}
