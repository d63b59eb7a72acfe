//! The names of the models, from their sources: a head line that names none of them is found without a build.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::patch::Mutant;

/// Every `#[test]` below a folder `models` of a crate in `src/`, as `CRATE::models::…::NAME`.
pub fn names(root: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    let src = root.join("src");
    for entry in fs::read_dir(&src).with_context(|| format!("cannot read {}", src.display()))? {
        let room = entry?.path();
        if room.join("models").is_dir() {
            let module = format!("{}::models", stem(&room));
            collect(&room.join("models"), &module, &mut names)?;
        }
    }
    Ok(names)
}

fn stem(path: &Path) -> &str {
    path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default()
}

fn collect(folder: &Path, module: &str, names: &mut Vec<String>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let inner = match stem(&path) {
            "mod" => module.to_owned(),
            stem => format!("{module}::{stem}"),
        };
        if path.is_dir() {
            collect(&path, &inner, names)?;
        } else {
            let source = fs::read_to_string(&path)?;
            names.extend(tests_of(&source).map(|name| format!("{inner}::{name}")));
        }
    }
    Ok(())
}

fn tests_of(source: &str) -> impl Iterator<Item = &str> {
    source.split("#[test]\nfn ").skip(1).filter_map(|rest| rest.split('(').next())
}

/// A sentence for each head line of a mutant that names no model.
pub fn faults<'a>(mutant: &'a Mutant, models: &'a [String]) -> impl Iterator<Item = String> {
    let named = mutant.checks.iter().filter_map(|check| Some((check, check.model()?)));
    let wrong = named.filter(|(_, what)| !models.iter().any(|model| model.contains(what)));
    wrong.map(|(check, _)| {
        format!("mutants/{}.patch is caught by `{check}`, and no model is named so", mutant.name)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_head_line_that_names_no_model_is_noticed() {
        let checks = ["loom a::models::b::two", "shuttle a::models::two", "unit a::models::two"];
        let mutant = Mutant {
            name: "m".to_owned(),
            patch: "mutants/m.patch".into(),
            rule: "a rule".to_owned(),
            checks: checks.iter().map(|check| check.parse().unwrap()).collect(),
            within: 60,
            files: BTreeSet::new(),
        };
        let source = "fn one() {}\n#[test]\nfn two_threads() {\n}\n";
        let models: Vec<_> = tests_of(source).map(|name| format!("a::models::b::{name}")).collect();
        let found: Vec<_> = faults(&mutant, &models).collect();
        assert_eq!(
            found,
            ["mutants/m.patch is caught by `shuttle a::models::two`, and no model is named so"]
        );
    }

    #[test]
    fn the_models_of_this_repository_are_found() {
        let names = names(&Path::new(env!("CARGO_MANIFEST_DIR")).join("..")).unwrap();
        for room in ["export_rmap", "host_mm"] {
            assert!(names.iter().any(|name| name.starts_with(room)), "{names:?}");
        }
    }
}
