//! The documents point to things that exist: files behind links, and tests named as
//! `path/to/file.rs::test_name`.

use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn documents() -> Vec<PathBuf> {
    let folders = [root(), root().join("docs")];
    let entries = folders.iter().flat_map(|folder| fs::read_dir(folder).unwrap());
    let mut found: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    found.retain(|path| path.extension().is_some_and(|extension| extension == "md"));
    found
}

/// Targets of `[text](target)` that are files of the project.
fn links(text: &str) -> impl Iterator<Item = &str> {
    text.split("](").skip(1).filter_map(|rest| {
        let target = rest.split(')').next()?;
        let file = target.split('#').next()?;
        (!file.is_empty() && !file.contains("://")).then_some(file)
    })
}

/// Pairs of file and test in `file.rs::test`, between backticks.
fn named_tests(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.split('`').skip(1).step_by(2).filter_map(|code| {
        let (file, test) = code.split_once("::")?;
        file.ends_with(".rs").then_some((file, test))
    })
}

fn missing(document: &Path, text: &str) -> Vec<String> {
    let folder = document.parent().unwrap();
    let mut missing: Vec<String> = links(text)
        .filter(|link| !folder.join(link).exists())
        .map(|link| format!("link to {link}"))
        .collect();
    missing.extend(named_tests(text).filter_map(|(file, test)| {
        let source = fs::read_to_string(root().join(file)).unwrap_or_default();
        let is_there =
            source.contains(&format!("fn {test}(")) || source.contains(&format!("\"{test}\""));
        (!is_there).then(|| format!("test {file}::{test}"))
    }));
    missing
}

#[test]
fn every_link_and_every_named_test_exists() {
    let mut tests = 0;
    for document in documents() {
        let text = fs::read_to_string(&document).unwrap();
        let missing = missing(&document, &text);
        assert!(missing.is_empty(), "{}: {missing:?}", document.display());
        tests += named_tests(&text).count();
    }
    assert!(
        tests >= 9,
        "docs/invariants.md names a test for each invariant, but {tests} were found"
    );
}

#[test]
fn a_dead_link_and_a_missing_test_are_noticed() {
    let text = "[a](../README.md#x) [b](gone.md) [c](https://example.org) `tests/docs.rs::no_such_test` \
                `tests/docs.rs::every_link_and_every_named_test_exists`";
    let found = missing(&root().join("docs/x.md"), text);
    assert_eq!(found, ["link to gone.md", "test tests/docs.rs::no_such_test"]);
}
