//! What is packaged for a registry is enough for somebody else, and no more than that: a program outside of
//! this workspace, with nothing of it but the packages, runs an export client, and has nothing of the laboratory in
//! it; and who takes the hypervisor as a library does not get the command line's crates with it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What a client depends on, and what these depend on.
const CRATES: [&str; 3] = ["gnomon-sys", "gnomon-export-rmap", "gnomon-host-mm"];

/// Where the tests may keep files: what was built is not built again by the next run.
const FOLDER: &str = concat!(env!("CARGO_TARGET_TMPDIR"), "/packaged");

fn cargo(folder: &Path) -> Command {
    let mut cargo = Command::new(env!("CARGO"));
    // As anybody would run it, and not as this test was run.
    let inherited = std::env::vars_os().map(|(name, _)| name);
    for name in
        inherited.filter(|name| name.to_str().is_some_and(|name| name.starts_with("CARGO_")))
    {
        if !["CARGO_HOME", "CARGO_REGISTRIES_CRATES_IO_PROTOCOL"].iter().any(|kept| name == *kept) {
            cargo.env_remove(name);
        }
    }
    cargo.current_dir(folder);
    cargo
}

/// Runs a command that must succeed; its standard output.
fn output(command: &mut Command) -> String {
    let output = command.output().expect("it can be run");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {error}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Makes the packages, and unpacks them: the folder of each.
fn packages(root: &Path, folder: &Path) -> Vec<PathBuf> {
    let mut package = cargo(root);
    package.args(["package", "--quiet", "--offline", "--no-verify", "--allow-dirty"]);
    package.arg("--target-dir").arg(folder);
    output(package.args(CRATES.iter().flat_map(|name| ["--package", name])));
    let version = env!("CARGO_PKG_VERSION");
    let unpack = |name: &&str| {
        let name = format!("{name}-{version}");
        let packed = folder.join("package").join(format!("{name}.crate"));
        output(Command::new("tar").arg("-xzf").arg(packed).arg("-C").arg(folder));
        folder.join(name)
    };
    CRATES.iter().map(unpack).collect()
}

/// What the sources in a folder write between `start` and the next quotation mark, where it could be taken for
/// nothing else: names of a program's own have no hyphens.
fn written(folder: &Path, start: &str, found: &mut Vec<String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            written(&path, start, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            let names = text.split(start).skip(1).filter_map(|rest| rest.split('"').next());
            found.extend(names.filter(|name| name.contains('-')).map(str::to_owned));
        }
    }
}

/// Those of these names that are somewhere in a program.
fn found_in<'a>(program: &Path, names: &'a [String]) -> Vec<&'a str> {
    let program = fs::read(program).unwrap();
    let is_there = |name: &&str| program.windows(name.len()).any(|part| part == name.as_bytes());
    names.iter().map(String::as_str).filter(is_there).collect()
}

/// The names of all that can be broken on purpose, which the program that can do so has.
fn has_nothing_of_the_laboratory(program: &Path, packages: &[PathBuf]) {
    let names_after = |start: &str| {
        let mut names = Vec::new();
        packages.iter().for_each(|package| written(package, start, &mut names));
        assert!(!names.is_empty(), "no {start}");
        names
    };
    for start in ["Rule::new(\"", "Point::new(\"", "Fault::new(\"", "Fault::by_chance(\""] {
        assert_eq!(found_in(program, &names_after(start)), [""; 0], "{}", program.display());
    }
    if cfg!(feature = "lab") {
        let points = names_after("Point::new(\"");
        let gnomon = Path::new(env!("CARGO_BIN_EXE_gnomon"));
        assert_eq!(found_in(gnomon, &points), points, "names that are there are found");
    }
}

/// Crates that a library has no use for: they read arguments, draw, or write reports and traces.
const OF_THE_COMMAND_LINE: [&str; 10] = [
    "anyhow",
    "clap",
    "comfy-table",
    "flate2",
    "indicatif",
    "ruzstd",
    "serde",
    "serde_json",
    "tracing",
    "tracing-subscriber",
];

/// The crates that the hypervisor is built of with some features.
fn crates_with(features: &[&str]) -> BTreeSet<String> {
    let mut tree = cargo(Path::new(env!("CARGO_MANIFEST_DIR")));
    tree.args(["tree", "--quiet", "--offline", "--locked", "--package", env!("CARGO_PKG_NAME")]);
    tree.args(["--edges", "normal", "--prefix", "none", "--format", "{p}"]).args(features);
    let listed = output(&mut tree);
    listed.lines().filter_map(|line| Some(line.split(' ').next()?.to_owned())).collect()
}

#[test]
fn whoever_takes_the_library_gets_nothing_of_the_command_line() {
    let program = crates_with(&[]);
    let bare = ["--no-default-features", "--features"];
    for features in ["export-notifier", "lab"] {
        let library = crates_with(&[&bare[..], &[features]].concat());
        assert!(library.contains("gnomon-host-mm"), "{features}: {library:?}");
        let surplus: Vec<_> =
            OF_THE_COMMAND_LINE.into_iter().filter(|&name| library.contains(name)).collect();
        assert!(surplus.is_empty(), "{features} takes {surplus:?}");
    }
    for name in OF_THE_COMMAND_LINE {
        assert!(
            program.contains(name),
            "the program is not built with {name}: take it off the list"
        );
    }
}

#[test]
fn a_program_outside_runs_an_export_client_of_the_packages() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = Path::new(FOLDER);
    let outside = folder.join("outside");
    fs::create_dir_all(outside.join("src")).unwrap();
    let paths = packages(root, folder);
    let path_of = |name: &&str| {
        let at = CRATES.iter().position(|known| known == name).unwrap();
        format!("{name} = {{ path = {:?} }}\n", paths[at])
    };
    // The packages name each other as a registry has them, which it does not yet.
    let manifest = format!(
        "[package]\nname = \"outside\"\nversion = \"0.0.0\"\nedition = \"2024\"\n\n[workspace]\n\n\
         [dependencies]\nanyhow = \"1\"\nvm-memory = \"0.18\"\n{}{}\n[patch.crates-io]\n{}",
        path_of(&CRATES[1]),
        path_of(&CRATES[2]),
        CRATES.iter().map(path_of).collect::<String>()
    );
    fs::write(outside.join("Cargo.toml"), manifest).unwrap();
    fs::copy(root.join("examples/tiny_client.rs"), outside.join("src/main.rs")).unwrap();
    // The versions that are there.
    fs::copy(root.join("Cargo.lock"), outside.join("Cargo.lock")).unwrap();
    let mut run = cargo(&outside);
    run.args(["run", "--quiet", "--offline"]).env("CARGO_PROFILE_DEV_DEBUG", "0");
    let said = output(&mut run);
    assert!(said.starts_with("8192 pages in 2048 frames, each right three times\n"), "{said}");
    has_nothing_of_the_laboratory(&outside.join("target/debug/outside"), &paths[1..]);
}
