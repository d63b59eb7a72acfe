//! docs/tracing.md names every tracepoint, and no other.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// The names of the points in a source text.
fn points(source: &str, found: &mut BTreeSet<String>) {
    for (at, call) in source.match_indices("point!(") {
        let name = source[at + call.len()..].trim_start();
        if let Some((name, _)) = name.strip_prefix('"').and_then(|rest| rest.split_once('"')) {
            found.insert(name.to_owned());
        }
    }
}

fn walk(folder: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            walk(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs")
            && !path.ends_with("export_rmap/trace.rs")
        {
            points(&fs::read_to_string(path).unwrap(), found);
        }
    }
}

#[test]
fn every_point_is_described() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut there = BTreeSet::new();
    walk(&root.join("src"), &mut there);
    let page = fs::read_to_string(root.join("docs/tracing.md")).unwrap();
    let described: BTreeSet<_> = page
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split_once('`'))
        .map(|(name, _)| name.to_owned())
        .collect();
    assert_eq!(there, described);
    assert!(there.len() > 5, "{there:?}");
}

#[test]
fn points_are_found_over_lines_and_behind_paths() {
    let mut found = BTreeSet::new();
    points("a::point!(\n  \"one\", x = 1); entry_point!(\"two\", b); point!($name)", &mut found);
    assert_eq!(found, BTreeSet::from(["one".to_owned(), "two".to_owned()]));
}
