//! Whether guests with direct paging can be run here.

use crate::process::run;
use crate::trial::Ignore;

/// Says why not: the process must be allowed to handle page faults of the kernel.
pub(crate) fn direct_is_possible() -> Result<(), Ignore> {
    let finished = run(&["boot", "--paging", "direct", "--memory", "16M", "--cmdline", "pages=16"]);
    match finished.stderr.lines().find(|line| line.contains("--paging direct:")) {
        Some(line) if !nix::unistd::geteuid().is_root() => Err(Ignore(line.to_owned())),
        _ => {
            finished.with_code(0);
            Ok(())
        }
    }
}
