//! Chores of the repository that are programs: `cargo xtask help`.

mod mutants;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Chores of Gnomon's repository")]
struct Arguments {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    /// Breaks the rules in mutants/ one at a time in a copy of the sources, and expects what each patch
    /// names to notice (docs/mutants.md)
    Mutants(mutants::Arguments),
}

fn main() -> ExitCode {
    // The manifest's folder is xtask/ of the checkout that this was built in.
    let mut root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    root.pop();
    let outcome = match Arguments::parse().chore {
        Chore::Mutants(arguments) => mutants::run(&root, &arguments),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}
