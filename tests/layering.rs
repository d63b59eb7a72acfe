//! The layers import downwards only: a file names nothing from a layer above its own. So do the rooms of
//! the VMM and those of host memory, which call nothing that stands above them either; and the crates.

use std::collections::{BTreeMap, BTreeSet};
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
    &["lab"],
    &["cli"],
    &["fuzzing"],
];

/// The crates of the workspace by folder, and which of them each may use. Cargo allows no circles; this
/// allows no more than these, in any of a manifest's sections but that of the tests.
const CRATES: &[(&str, &[&str])] = &[
    ("guest/abi", &[]),
    ("guest", &["gnomon-abi"]),
    ("src/export_rmap", &[]),
    ("src/host_mm", &["gnomon-export-rmap", "gnomon-sys"]),
    ("src/sys", &[]),
    (".", &["gnomon-abi", "gnomon-export-rmap", "gnomon-guest", "gnomon-host-mm", "gnomon-sys"]),
    ("xtask", &[]),
];

/// The crates of this workspace that a manifest names as what its crate is built with.
fn used_crates(manifest: &str) -> Vec<String> {
    let mut used = BTreeSet::new();
    let mut section = "";
    for line in manifest.lines() {
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            section = name;
        } else if section.ends_with("dependencies")
            && !section.ends_with("dev-dependencies")
            && section != "workspace.dependencies"
            && let Some((name, _)) = line.split_once(" = ")
            && name.starts_with("gnomon")
        {
            used.insert(name.to_owned());
        }
    }
    used.into_iter().collect()
}

#[test]
fn the_crates_use_those_below_them() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |path: &str| fs::read_to_string(root.join(path).join("Cargo.toml")).unwrap();
    for (folder, allowed) in CRATES {
        assert_eq!(used_crates(&read(folder)), *allowed, "{folder}/Cargo.toml");
    }
    let members = read(".").lines().find_map(|line| {
        let list = line.strip_prefix("members = [")?.strip_suffix(']')?;
        Some(
            list.split(", ").map(|name| name.trim_matches('"').to_owned()).collect::<BTreeSet<_>>(),
        )
    });
    let known = CRATES.iter().map(|(folder, _)| (*folder).to_owned()).collect();
    assert_eq!(members.as_ref(), Some(&known), "each member of the workspace is listed");
}

#[test]
fn a_manifests_crates_are_found() {
    let manifest = "[dependencies]\nlibc = 1\ngnomon-a = { x }\n[dev-dependencies]\ngnomon-b = 1\n\
                    [target.'cfg(x)'.dependencies]\ngnomon-c = 1\n[build-dependencies]\ngnomon-d = 1\n\
                    [workspace.dependencies]\ngnomon-e = 1\n";
    assert_eq!(used_crates(manifest), ["gnomon-a", "gnomon-c", "gnomon-d"]);
}

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
        // In a crate of its own `crate` is the layer itself, and Cargo says what else there is.
        let is_crate = src.join(layer).join("Cargo.toml").exists();
        let wrong = if is_crate { Vec::new() } else { upward(layer, &source) };
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
    assert_eq!(upward("lab", "let code = crate::cli::output::note(text);"), ["cli"]);
    assert_eq!(upward("vmm", "use crate::lab::Tail;"), ["lab"]);
    assert!(upward("vmm", "use crate::{sync, host_mm::HostMm}; use crate::addr::Gpa;").is_empty());
}

/// A layer that has rooms: each a folder, or a file, beside `mod.rs` or `lib.rs`, which is their common face for the
/// layers above.
struct House {
    layer: &'static str,
    /// It is a crate of its own: `crate` is the layer.
    is_crate: bool,
    /// Lowest first. A room imports from those below it only, and not from the other of its line.
    rooms: &'static [&'static [&'static str]],
}

const VMM: House = House {
    layer: "vmm",
    is_crate: false,
    rooms: &[
        &["kvm"],
        &["error"],
        &["run", "cpu"],
        &["contract"],
        &["shadow", "direct"],
        &["linux"],
    ],
};

const HOST_MM: House = House {
    layer: "host_mm",
    is_crate: true,
    rooms: &[
        &["hooks", "stats", "violations"],
        &["swap"],
        &["error"],
        &["frames"],
        &["object"],
        &["config"],
        &["books"],
        &["revoke"],
        &["reclaim"],
        &["fault"],
        &["memory"],
        &["sources"],
        &["audit"],
    ],
};

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

/// `path` as a path from the root of the sources, seen from `module`; `root` is where `crate` is.
fn absolute(path: &[String], module: &[String], root: &[String]) -> Vec<String> {
    let ups = path.iter().take_while(|word| *word == "super").count();
    match path[0].as_str() {
        "crate" => [root, &path[1..]].concat(),
        _ => {
            let kept = module.len().saturating_sub(ups);
            [&module[..kept], &path[ups.max(usize::from(path[0] == "self"))..]].concat()
        }
    }
}

/// The module of a file of `layer`, and every path from `crate`, `super` or `self` that its text has
/// outside of comments, from the root of the sources.
fn paths_of(
    layer: &str,
    is_crate: bool,
    file: &str,
    source: &str,
) -> (Vec<String>, Vec<Vec<String>>) {
    let root = if is_crate { vec![layer.to_owned()] } else { Vec::new() };
    let stem = file.strip_suffix("/mod.rs").or(file.strip_suffix(".rs")).unwrap();
    // Tests beside a file are a module of it.
    let stem = stem.strip_suffix("_tests").map_or(stem.to_owned(), |of| format!("{of}/tests"));
    let own: Vec<String> =
        std::iter::once(layer).chain(stem.split('/')).map(str::to_owned).collect();
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
                    found.extend(paths.iter().map(|path| absolute(path, &module, &root)));
                }
            }
        }
    }
    (own, found)
}

impl House {
    fn rank(&self, room: &str) -> Option<usize> {
        self.rooms.iter().position(|names| names.contains(&room))
    }

    /// The rooms that `file` names. What is neither in a room nor one is the face's.
    fn rooms_named(&self, file: &str, source: &str) -> Vec<String> {
        let (module, paths) = paths_of(self.layer, self.is_crate, file, source);
        let inside = paths.into_iter().filter(|path| path.len() > 1 && path[0] == self.layer);
        let named = inside.map(|mut path| path.swap_remove(1));
        named.filter(|name| *name != module[1]).collect()
    }

    /// Every room that `file` must not name and names, and everything else that it takes from the face.
    fn wrong_rooms(&self, file: &str, source: &str) -> Vec<String> {
        let own = self.rank(room_of(file));
        let is_wrong = |room: &String| self.rank(room).is_none() || self.rank(room) >= own;
        self.rooms_named(file, source).into_iter().filter(is_wrong).collect()
    }

    /// The sources in rooms: file inside the layer, and text. Tests and models of the whole layer stand
    /// beside.
    fn sources(&self) -> Vec<(String, String)> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(self.layer);
        let mut files = Vec::new();
        rust_files(&folder, &mut files);
        let inside = files.into_iter().map(|path| {
            let file = path.strip_prefix(&folder).unwrap().to_str().unwrap().to_owned();
            (file, fs::read_to_string(path).unwrap())
        });
        inside
            .filter(|(file, _)| {
                !["build", "lib", "mod", "models", "tests"].contains(&room_of(file))
            })
            .collect()
    }

    /// Calls in `file` of methods that stand in a room from which it may not import. Not if a function of
    /// that name is in a room from which it may, which is then the one that is called; nor if no such
    /// room so much as names the type, and so can have no value of it.
    fn wrong_calls(&self, file: &str, source: &str, methods: &Methods<'_>) -> Vec<String> {
        let own = self.rank(room_of(file));
        let is_allowed = |room: &&str| *room == room_of(file) || self.rank(room) < own;
        let any_allowed = |rooms: Option<&BTreeSet<&str>>| {
            rooms.is_some_and(|rooms| rooms.iter().any(is_allowed))
        };
        let wrong = calls(source).filter(|name| !any_allowed(methods.functions.get(name)));
        let wrong = wrong.filter_map(|name| Some((name, methods.spread.get(name)?)));
        let wrong = wrong.filter(|(_, (of, _))| any_allowed(methods.types.get(of)));
        wrong.map(|(name, (_, room))| format!("{name} of {room}")).collect()
    }

    /// No room of the layer imports from one that is not below it, nor calls what stands in one.
    fn check(&self) {
        let sources = self.sources();
        let methods = Methods::of(&sources);
        let (mut wrong, mut arrows) = (Vec::new(), BTreeSet::new());
        for (file, source) in &sources {
            assert!(self.rank(room_of(file)).is_some(), "{file} is in no room");
            let named = self.wrong_rooms(file, source).into_iter();
            wrong.extend(named.map(|room| format!("{file} names {room}")));
            let called = self.wrong_calls(file, source, &methods).into_iter();
            wrong.extend(called.map(|method| format!("{file} calls {method}")));
            arrows.extend(self.rooms_named(file, source).into_iter().map(|to| (room_of(file), to)));
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
        let above_the_lowest = self.rooms.iter().position(|names| names.len() == 1).unwrap() + 1;
        for room in self.rooms[above_the_lowest..].iter().flat_map(|names| *names) {
            assert!(arrows.iter().any(|(from, _)| from == room), "no import of {room} was seen");
        }
        println!(
            "{}: {} rooms, {} arrows, none up; {} methods of types that have some in several rooms",
            self.layer,
            self.rooms.concat().len(),
            arrows.len(),
            methods.spread.len()
        );
    }
}

/// What can be called without an import.
struct Methods<'a> {
    /// Methods of types that have some in several rooms: of which type, and where each stands.
    spread: BTreeMap<&'a str, (&'a str, &'a str)>,
    /// These types, and the rooms that name them.
    types: BTreeMap<&'a str, BTreeSet<&'a str>>,
    /// All functions, and the rooms that define one of that name.
    functions: BTreeMap<&'a str, BTreeSet<&'a str>>,
}

impl<'a> Methods<'a> {
    /// Of files inside a layer, with their texts.
    fn of(sources: &'a [(String, String)]) -> Self {
        let mut rooms_of_type: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        let mut functions: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        for (file, source) in sources {
            for name in functions_of(source) {
                functions.entry(name).or_default().insert(room_of(file));
            }
            for (name, _) in inherent_impls(source) {
                rooms_of_type.entry(name).or_default().insert(room_of(file));
            }
        }
        rooms_of_type.retain(|_, rooms| rooms.len() > 1);
        let mut spread = BTreeMap::new();
        for (file, source) in sources {
            for (of, body) in inherent_impls(source) {
                if rooms_of_type.contains_key(of) {
                    spread.extend(functions_of(body).map(|name| (name, (of, room_of(file)))));
                }
            }
            for word in code(source).flat_map(words) {
                if let Some(rooms) = rooms_of_type.get_mut(word) {
                    rooms.insert(room_of(file));
                }
            }
        }
        Self { spread, types: rooms_of_type, functions }
    }
}

/// The room of a file, inside the layer.
fn room_of(file: &str) -> &str {
    file.split(['/', '.']).next().unwrap()
}

/// Each `impl Type` that is no trait's, with its body.
fn inherent_impls(source: &str) -> impl Iterator<Item = (&str, &str)> {
    source.split("\nimpl").skip(1).filter_map(|text| {
        let (head, rest) = text.split_once(" {\n")?;
        let body = rest.split("\n}").next()?;
        let head = head
            .strip_prefix('<')
            .map_or(Some(head), |generics| generics.split_once("> ").map(|(_, after)| after))?;
        let name = head.trim_start().split('<').next()?;
        (!head.contains(" for ")).then_some((name, body))
    })
}

/// The names of the functions that a text defines.
fn functions_of(source: &str) -> impl Iterator<Item = &str> {
    source.split("fn ").skip(1).map(|rest| &rest[..end_of_word(rest)])
}

/// The lines of a text that are no comments.
fn code(source: &str) -> impl Iterator<Item = &str> {
    source.lines().filter(|line| !line.trim_start().starts_with("//"))
}

fn words(line: &str) -> impl Iterator<Item = &str> {
    line.split(|letter: char| !letter.is_alphanumeric() && letter != '_')
}

/// The names that a text calls as methods.
fn calls(source: &str) -> impl Iterator<Item = &str> {
    let after = |line| str::match_indices(line, ['.', ':']).map(|(at, _)| &line[at + 1..]);
    code(source).flat_map(after).filter_map(|text| {
        let (name, rest) = text.split_at(end_of_word(text));
        (rest.starts_with('(') || rest.starts_with("::<")).then_some(name)
    })
}

fn end_of_word(text: &str) -> usize {
    text.find(|letter: char| !letter.is_alphanumeric() && letter != '_').unwrap_or(text.len())
}

#[test]
fn no_room_of_the_vmm_imports_from_one_that_is_not_below_it() {
    VMM.check();
}

#[test]
fn no_room_of_host_memory_imports_from_one_that_is_not_below_it() {
    HOST_MM.check();
}

#[test]
fn an_import_from_a_room_that_is_not_below_is_noticed() {
    let named = |file, source| VMM.wrong_rooms(file, source);
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
        named("direct/vm.rs", "use super::super::{Outcome, linux::LinuxVm};"),
        ["Outcome", "linux"]
    );
    assert_eq!(named("error/mod.rs", "pub(in crate::vmm) use super::run::outcome;"), ["run"]);

    let below = "use crate::vmm::run::{gate, kick};\nuse super::{vcpu, super::kvm::device};\n// crate::vmm::linux";
    assert!(named("shadow/exits.rs", below).is_empty());
    assert_eq!(
        VMM.rooms_named("shadow/exits.rs", "use crate::vmm::run::{gate, kick};"),
        ["run", "run"]
    );
}

#[test]
fn an_import_from_a_room_of_host_memory_that_is_not_below_is_noticed() {
    let named = |file, source| HOST_MM.wrong_rooms(file, source);
    assert_eq!(named("object/pages.rs", "use crate::fault::Intent;"), ["fault"]);
    assert_eq!(named("swap/mod.rs", "use super::frames::host_view;"), ["frames"]);
    assert_eq!(named("stats.rs", "use super::hooks::EINTR;"), ["hooks"]);
    assert_eq!(named("revoke/batch.rs", "use crate::{HostMm, stats};"), ["HostMm"]);
    assert!(named("sources/clean.rs", "use crate::revoke::batch;").is_empty());
}

/// Methods of one type in several rooms are called without an import.
#[test]
fn a_call_of_what_stands_in_a_room_above_is_noticed() {
    let wrong = |caller: &str| {
        let sources = [
            ("fault/mod.rs", "\nimpl HostMm {\n    fn fault_in(&self) {}\n}\n"),
            ("books/find.rs", "\nimpl<'a> HostMm {\n    pub fn found(&'a self) {}\n}\n"),
            ("books/rules.rs", "\nimpl Drop for Other {\n    fn drop(&mut self) {}\n}\n"),
            ("revoke/batch.rs", caller),
        ];
        let sources = sources.map(|(file, text)| (file.to_owned(), text.to_owned()));
        HOST_MM.wrong_calls("revoke/batch.rs", caller, &Methods::of(&sources))
    };
    assert_eq!(wrong("mm.fault_in(page);"), ["fault_in of fault"]);
    assert_eq!(wrong("Self::fault_in(page)?; // none"), ["fault_in of fault"]);
    assert_eq!(wrong("let it = HostMm::fault_in::<X>(page);"), ["fault_in of fault"]);
    assert!(wrong("mm.found(); fault_in(); mm.drop(); // mm.fault_in()").len() == 1);
    assert!(wrong("// mm.fault_in()\nmm.found(); fault_in; mm.drop();").is_empty());
    assert!(wrong("fn fault_in() {} self.fault_in()").is_empty(), "its own");
}
