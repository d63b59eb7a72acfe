//! The table of results in docs/mutants.md.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::check::Check;
use super::lane::Report;
use super::patch::Mutant;

const BEGIN: &str = "| mutant | rule | caught by | s |\n|---|---|---|---|\n";

/// The page, divided into what is before, in and after the table's rows.
fn divide(text: &str) -> Result<(&str, &str, &str)> {
    let at = text
        .find(BEGIN)
        .context("docs/mutants.md has no table `| mutant | rule | caught by | s |`")?;
    let rows = at + BEGIN.len();
    let length: usize = text[rows..]
        .split_inclusive('\n')
        .take_while(|line| line.starts_with('|'))
        .map(str::len)
        .sum();
    Ok((&text[..rows], &text[rows..rows + length], &text[rows + length..]))
}

/// Rows by the names of their mutants, each divided into its cells.
fn read(rows: &str) -> BTreeMap<&str, Vec<&str>> {
    let mut found = BTreeMap::new();
    for row in rows.lines() {
        let cells: Vec<_> = row.trim_matches('|').split(" | ").map(str::trim).collect();
        if let Some(name) = cells.first() {
            found.insert(name.trim_matches('`'), cells);
        }
    }
    found
}

fn checks(mutant: &Mutant) -> String {
    mutant.checks.iter().map(|check| format!("`{check}`")).collect::<Vec<_>>().join("<br>")
}

/// How each check of a mutant did, where that is known.
fn time(name: &str, check: &Check, reports: &[Report]) -> Option<String> {
    reports.iter().find_map(|report| match report {
        Report::Caught { name: caught, check: by, took, schedules }
            if caught == name && by == check =>
        {
            let seconds = match took.as_secs_f64() {
                seconds if seconds < 0.1 => "< 0.1".to_owned(),
                seconds => format!("{seconds:.1}"),
            };
            Some(match schedules {
                Some(schedules) => format!("{seconds} ({schedules} schedules)"),
                None => seconds,
            })
        }
        _ => None,
    })
}

/// Writes a row for each of `all`; of those that did not run, what was known stays.
pub fn record(page: &Path, all: &[Mutant], reports: &[Report]) -> Result<()> {
    let text =
        fs::read_to_string(page).with_context(|| format!("cannot read {}", page.display()))?;
    let (before, rows, after) = divide(&text)?;
    let rows = read(rows);
    let mut new = String::new();
    for mutant in all {
        let known: Vec<&str> = match rows.get(mutant.name.as_str()) {
            Some(cells) if cells.len() == 4 => cells[3].split("<br>").collect(),
            _ => Vec::new(),
        };
        let times: Vec<String> = mutant
            .checks
            .iter()
            .enumerate()
            .map(|(at, check)| {
                time(&mutant.name, check, reports)
                    .or_else(|| known.get(at).map(|time| (*time).to_owned()))
                    .unwrap_or_else(|| "-".to_owned())
            })
            .collect();
        let (name, rule, checks, times) =
            (&mutant.name, &mutant.rule, checks(mutant), times.join("<br>"));
        new += &format!("| `{name}` | {rule} | {checks} | {times} |\n");
    }
    fs::write(page, format!("{before}{new}{after}"))?;
    Ok(())
}

/// Where the table and the patches differ.
pub fn faults(page: &Path, all: &[Mutant]) -> Result<Vec<String>> {
    let text =
        fs::read_to_string(page).with_context(|| format!("cannot read {}", page.display()))?;
    let (_, rows, _) = divide(&text)?;
    let rows = read(rows);
    let mut faults: Vec<String> = rows
        .keys()
        .filter(|name| !all.iter().any(|mutant| mutant.name == **name))
        .map(|name| format!("docs/mutants.md has a row for {name}, and there is no such patch"))
        .collect();
    for mutant in all {
        let is_told = rows.get(mutant.name.as_str()).is_some_and(|cells| {
            cells.len() == 4
                && cells[1] == mutant.rule
                && cells[2] == checks(mutant)
                && !cells[3].contains('-')
        });
        if !is_told {
            faults.push(format!(
                "docs/mutants.md does not say what catches {0}: cargo xtask mutants --record {0}",
                mutant.name
            ));
        }
    }
    Ok(faults)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::PathBuf;
    use std::time::Duration;

    use super::*;

    fn mutant(name: &str) -> Mutant {
        Mutant {
            name: name.to_owned(),
            patch: PathBuf::new(),
            rule: "a rule".to_owned(),
            checks: vec!["unit x".parse().unwrap(), "loom y".parse().unwrap()],
            within: 60,
            files: BTreeSet::new(),
        }
    }

    #[test]
    fn a_row_is_recorded_and_the_others_keep_what_is_known() {
        let page = std::env::temp_dir().join(format!("gnomon-xtask-{}.md", std::process::id()));
        let old = "| `b` | a rule | `unit x`<br>`loom y` | 1.5<br>2.0 |\n| `gone` | r | `unit z` | 1.0 |\n";
        fs::write(&page, format!("Above\n\n{BEGIN}{old}\nBelow\n")).unwrap();
        let all = [mutant("a"), mutant("b")];
        assert_eq!(faults(&page, &all).unwrap().len(), 2, "a is missing, gone is too much");

        let caught = |line: &str, tenths: u64, schedules: Option<&str>| Report::Caught {
            name: "a".to_owned(),
            check: line.parse().unwrap(),
            took: Duration::from_millis(tenths * 100),
            schedules: schedules.map(str::to_owned),
        };
        record(&page, &all, &[caught("unit x", 0, None)]).unwrap();
        assert_eq!(faults(&page, &all).unwrap().len(), 1, "one check of a has not run");
        record(&page, &all, &[caught("loom y", 3, Some("16"))]).unwrap();
        let text = fs::read_to_string(&page).unwrap();
        fs::remove_file(&page).unwrap();
        assert_eq!(
            text,
            format!(
                "Above\n\n{BEGIN}| `a` | a rule | `unit x`<br>`loom y` | < 0.1<br>0.3 (16 schedules) |\n\
                 | `b` | a rule | `unit x`<br>`loom y` | 1.5<br>2.0 |\n\nBelow\n"
            )
        );
    }
}
