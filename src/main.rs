//! The command line of Gnomon; all of it is in [`gnomon::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    gnomon::cli::run(std::env::args_os())
}
