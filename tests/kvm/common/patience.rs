//! Runs of a fixed duration that must have come to something: how long that takes is a matter of the
//! machine's speed and of what else it does.

use std::time::{Duration, Instant};

use serde_json::Value;

/// Longest time to go on trying.
const GIVE_UP: Duration = Duration::from_secs(60);

/// Runs with `--duration` of so many seconds, then with twice as many, and so on, until `run` says
/// that it came to what it is for; the last run begins within a minute. `run` gets the option's
/// value and checks by itself what must hold for any run; it returns what it lacks, if anything.
pub(crate) fn until_enough<T>(seconds: u32, mut run: impl FnMut(&str) -> Result<T, String>) -> T {
    let begin = Instant::now();
    let mut duration = seconds;
    loop {
        match run(&format!("{duration}s")) {
            Ok(result) => return result,
            Err(lack) => {
                assert!(begin.elapsed() < GIVE_UP, "nor in {duration} s: {lack}");
                duration *= 2;
            }
        }
    }
}

/// Whether the figures of a report, by their JSON pointers, are at least so much each.
pub(crate) fn at_least(report: &Value, floors: &[(&str, u64)]) -> Result<(), String> {
    for &(pointer, floor) in floors {
        let figure = report.pointer(pointer).and_then(Value::as_u64);
        let figure = figure.unwrap_or_else(|| panic!("no number at {pointer}: {report:#}"));
        if figure < floor {
            return Err(format!("{pointer} is {figure}, below {floor}: {report:#}"));
        }
    }
    Ok(())
}
