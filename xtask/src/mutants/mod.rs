//! Rules that are broken on purpose, and what notices.
//!
//! A rule counts as seen if each line `# caught by:` of its patch fails, within the seconds that the
//! patch gives it, by a test's own verdict: what does not compile, does not apply, matches no test or
//! merely takes too long is no catch. The unbroken code must pass the same commands.

mod check;
mod lane;
mod models;
mod patch;
mod sources;
mod table;

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Mutex;
use std::sync::mpsc;
use std::thread;
use std::time::Instant;

use anyhow::{Result, bail};

use self::check::Kind;
use self::lane::{Lane, Report};
use self::patch::Mutant;

#[derive(clap::Args)]
pub struct Arguments {
    /// Names of patches in mutants/, without .patch; all if there is none
    names: Vec<String>,
    /// Only what this kind of check is to catch; may be repeated
    #[arg(long, value_enum)]
    by: Vec<Kind>,
    /// Only looks whether each patch has its head lines, applies, and has its row in the table
    #[arg(long)]
    check: bool,
    /// Writes the results into the table of docs/mutants.md
    #[arg(long, conflicts_with = "check")]
    record: bool,
    /// Builds at a time [default: one a processor]
    #[arg(long)]
    jobs: Option<usize>,
}

/// Whether nothing was left unseen.
pub fn run(root: &Path, arguments: &Arguments) -> Result<bool> {
    let all = patch::all(root)?;
    let page = root.join("docs/mutants.md");
    if arguments.check {
        return check(root, &all, &page);
    }
    let mut chosen = all.clone();
    if !arguments.names.is_empty() {
        chosen.retain(|mutant| arguments.names.contains(&mutant.name));
        if let Some(name) =
            arguments.names.iter().find(|name| !all.iter().any(|mutant| mutant.name == **name))
        {
            bail!("no such mutant: mutants/{name}.patch");
        }
    }
    if !arguments.by.is_empty() {
        for mutant in &mut chosen {
            mutant.checks.retain(|check| arguments.by.contains(&check.kind));
        }
        chosen.retain(|mutant| !mutant.checks.is_empty());
    }

    let begin = Instant::now();
    let reports = run_lanes(root, &chosen, arguments.jobs)?;
    let caught = reports.iter().filter(|report| matches!(report, Report::Caught { .. })).count();
    let skipped = reports.iter().filter(|report| matches!(report, Report::Skipped { .. })).count();
    let failed = reports.len() - caught - skipped;
    if arguments.record {
        table::record(&page, &all, &reports)?;
    }
    println!(
        "{} rules: {caught} checks caught theirs, {skipped} skipped, {failed} failed; {} s",
        chosen.len(),
        begin.elapsed().as_secs()
    );
    Ok(failed == 0)
}

/// Runs the lanes that the chosen ones need, so many at a time, and tells what comes of each as it does.
fn run_lanes(root: &Path, chosen: &[Mutant], jobs: Option<usize>) -> Result<Vec<Report>> {
    let jobs = match jobs {
        Some(jobs) => jobs.max(1),
        None => thread::available_parallelism().map_or(1, usize::from),
    };
    let lanes: VecDeque<Lane> = Lane::all(root, chosen).into();
    let (reports, results) = mpsc::channel();
    let queue = Mutex::new(lanes);
    let mut all = Vec::new();
    thread::scope(|scope| {
        let workers: Vec<_> = (0..jobs)
            .map(|_| {
                let (queue, reports) = (&queue, reports.clone());
                scope.spawn(move || -> Result<()> {
                    loop {
                        // A panic in another worker is told by its join.
                        let next =
                            queue.lock().unwrap_or_else(|poison| poison.into_inner()).pop_front();
                        let Some(lane) = next else { return Ok(()) };
                        lane.run(&reports)?;
                    }
                })
            })
            .collect();
        drop(reports);
        for report in results {
            println!("{report}");
            all.push(report);
        }
        for worker in workers {
            match worker.join() {
                Ok(outcome) => outcome?,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        Ok(all)
    })
}

fn check(root: &Path, all: &[Mutant], page: &Path) -> Result<bool> {
    let mut faults = table::faults(page, all)?;
    let models = models::names(root)?;
    faults.extend(all.iter().flat_map(|mutant| models::faults(mutant, &models)));
    for mutant in all {
        if let Err(error) = sources::apply_check(root, &mutant.patch) {
            faults.push(format!(
                "mutants/{}.patch does not apply, make it anew: {error}",
                mutant.name
            ));
        }
    }
    for fault in &faults {
        eprintln!("{fault}");
    }
    println!("{} patches, {} faults", all.len(), faults.len());
    Ok(faults.is_empty())
}
