//! Checks that share a build: one copy of the sources and one target folder, in which one rule after the
//! other is broken.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::check::{Check, Ended, Kind};
use super::patch::Mutant;
use super::sources::Sources;

/// What the unbroken code may take, which runs to its end.
const CONTROL_SECONDS: u64 = 300;
/// How long a run of stress or of the fuzzer on the unbroken code is.
const SHORT_CONTROL_SECONDS: u64 = 10;

/// What a check needs to be built.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Build {
    /// The library's tests, without optimisation: a filter runs few of them.
    Unit,
    /// The program and the suites that run it.
    Program,
    Loom,
    Shuttle,
    Fuzz,
}

impl Build {
    /// Longest first.
    const ALL: [Self; 5] = [Self::Unit, Self::Program, Self::Loom, Self::Fuzz, Self::Shuttle];

    fn of(kind: Kind) -> Self {
        match kind {
            Kind::Unit => Self::Unit,
            Kind::Test | Kind::Stress => Self::Program,
            Kind::Loom => Self::Loom,
            Kind::Shuttle => Self::Shuttle,
            Kind::Fuzz => Self::Fuzz,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Unit => "unit",
            Self::Program => "program",
            Self::Loom => "loom",
            Self::Shuttle => "shuttle",
            Self::Fuzz => "fuzz",
        }
    }
}

/// What came of one check of one mutant, or of the unbroken code.
pub enum Report {
    Caught { name: String, check: Check, took: Duration, schedules: Option<String> },
    Skipped { check: Check, why: String },
    Failed { name: String, why: String },
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Caught { name, check, took, .. } => {
                write!(f, "{name:<44} {:<76} {:>5.1} s", check.to_string(), took.as_secs_f64())
            }
            Self::Skipped { check, why } => write!(f, "skipped, {why}: {check}"),
            Self::Failed { name, why } => write!(f, "{name}: {why}"),
        }
    }
}

/// The checks of one kind of build.
pub struct Lane {
    build: Build,
    root: PathBuf,
    /// Each with the checks of this lane alone.
    mutants: Vec<Mutant>,
}

/// A lane at work.
struct Work<'a> {
    build: Build,
    sources: Sources,
    target: PathBuf,
    logs: PathBuf,
    reports: &'a Sender<Report>,
}

impl Lane {
    /// The lanes that have something to do.
    pub fn all(root: &Path, mutants: &[Mutant]) -> Vec<Self> {
        let lane = |build| {
            let mut mutants = mutants.to_vec();
            for mutant in &mut mutants {
                mutant.checks.retain(|check| Build::of(check.kind) == build);
            }
            mutants.retain(|mutant| !mutant.checks.is_empty());
            Self { build, root: root.to_owned(), mutants }
        };
        Build::ALL.into_iter().map(lane).filter(|lane| !lane.mutants.is_empty()).collect()
    }

    /// Fails only if the work itself cannot be done.
    pub fn run(mut self, reports: &Sender<Report>) -> Result<()> {
        let folder = self.root.join("target/mutants").join(self.build.name());
        let logs = folder.join("logs");
        fs::create_dir_all(folder.join("sources"))?;
        if logs.exists() {
            fs::remove_dir_all(&logs)?;
        }
        fs::create_dir_all(&logs)?;
        let work = Work {
            build: self.build,
            sources: Sources::copy(&self.root, &folder.join("sources"))?,
            target: folder.join("target"),
            logs,
            reports,
        };
        self.leave_out_what_cannot_run(reports);
        let skipped = work.controls(&self.mutants)?;
        for mutant in &mut self.mutants {
            mutant.checks.retain(|check| !skipped.contains(check));
        }
        for batch in batches(self.build, &self.mutants) {
            work.batch(&batch)?;
        }
        Ok(())
    }

    fn leave_out_what_cannot_run(&mut self, reports: &Sender<Report>) {
        let has_kvm = File::options().read(true).write(true).open("/dev/kvm").is_ok();
        for mutant in &mut self.mutants {
            mutant.checks.retain(|check| {
                let needs_kvm = check.kind == Kind::Stress
                    || check.suite().is_some_and(|suite| suite.starts_with("kvm_"));
                let runs = has_kvm || !needs_kvm;
                if !runs {
                    let why = "there is no usable /dev/kvm".to_owned();
                    tell(reports, Report::Skipped { check: check.clone(), why });
                }
                runs
            });
        }
    }
}

/// What is broken and built at the same time. The fuzzer's builds are slow, and each of its targets runs
/// other code; elsewhere a rule is broken alone.
fn batches(build: Build, mutants: &[Mutant]) -> Vec<Vec<&Mutant>> {
    let mut batches: Vec<Vec<&Mutant>> = Vec::new();
    for mutant in mutants.iter().filter(|mutant| !mutant.checks.is_empty()) {
        let fits = |batch: &&mut Vec<&Mutant>| {
            build == Build::Fuzz
                && batch.iter().all(|other| {
                    other.files.is_disjoint(&mutant.files)
                        && !other.checks.iter().any(|check| mutant.checks.contains(check))
                })
        };
        match batches.iter_mut().find(fits) {
            Some(batch) => batch.push(mutant),
            None => batches.push(vec![mutant]),
        }
    }
    batches
}

fn tell(reports: &Sender<Report>, report: Report) {
    // Nobody listens any more if the other end has failed, and that is told.
    let _ = reports.send(report);
}

impl Work<'_> {
    fn tell(&self, report: Report) {
        tell(self.reports, report);
    }

    fn fail(&self, name: &str, why: String) {
        self.tell(Report::Failed { name: name.to_owned(), why });
    }

    /// Runs each check once on the unbroken code; returns those that this host cannot run.
    fn controls(&self, mutants: &[Mutant]) -> Result<BTreeSet<Check>> {
        let checks: BTreeSet<_> = mutants.iter().flat_map(|mutant| mutant.checks.clone()).collect();
        let mut skipped = BTreeSet::new();
        for check in checks {
            let log = self.logs.join("control-build.log");
            let Some(program) = self.build(&check, &log)? else {
                bail!("the unbroken code does not build, see {}", log.display());
            };
            let (seconds, most) = match check.kind {
                Kind::Stress => (SHORT_CONTROL_SECONDS, SHORT_CONTROL_SECONDS),
                Kind::Fuzz => (SHORT_CONTROL_SECONDS, CONTROL_SECONDS),
                _ => (CONTROL_SECONDS, CONTROL_SECONDS),
            };
            let (ended, _) = self.run(&program, &check, seconds, most, "control")?;
            if let Some(why) = ended.log.strip_prefix("skipped: ") {
                let why = why.lines().next().unwrap_or_default().to_owned();
                self.tell(Report::Skipped { check: check.clone(), why });
                skipped.insert(check);
            } else if !check.passes(&ended) {
                let log = self.logs.join(format!("unbroken-{}.log", self.build.name()));
                fs::write(&log, &ended.log)?;
                let why =
                    format!("fails (status {}, see {}): {check}", ended.status, log.display());
                self.fail("the unbroken code", why);
            }
        }
        Ok(skipped)
    }

    fn batch(&self, batch: &[&Mutant]) -> Result<()> {
        let mut applied = Vec::new();
        for mutant in batch {
            match self.sources.apply(&mutant.name) {
                Ok(()) => applied.push(*mutant),
                Err(error) => self.fail(&mutant.name, format!("it does not apply: {error}")),
            }
        }
        for mutant in &applied {
            for check in &mutant.checks {
                self.mutant(mutant, check)?;
            }
        }
        for mutant in applied.iter().rev() {
            self.sources
                .undo(&mutant.name)
                .with_context(|| format!("cannot undo {}", mutant.name))?;
        }
        Ok(())
    }

    fn mutant(&self, mutant: &Mutant, check: &Check) -> Result<()> {
        let log = self.logs.join(format!("{}-build.log", mutant.name));
        let Some(program) = self.build(check, &log)? else {
            self.fail(&mutant.name, format!("it does not compile, see {}", log.display()));
            return Ok(());
        };
        // The fuzzer counts its own time, after it was built.
        let most = if check.is_fuzz() { CONTROL_SECONDS + mutant.within } else { mutant.within };
        let (ended, took) = self.run(&program, check, mutant.within, most, &mutant.name)?;
        self.tell(if check.is_caught(&ended) {
            let schedules = check.schedules(&ended).map(str::to_owned);
            Report::Caught { name: mutant.name.clone(), check: check.clone(), took, schedules }
        } else {
            let log = self.logs.join(format!("{}-{}.log", mutant.name, self.build.name()));
            fs::write(&log, &ended.log)?;
            let why = format!(
                "not caught within {} s by: {check} (status {}, see {})",
                mutant.within,
                ended.status,
                log.display()
            );
            Report::Failed { name: mutant.name.clone(), why }
        });
        Ok(())
    }

    /// Builds what a check runs: the program, or nothing if it does not compile.
    fn build(&self, check: &Check, log: &Path) -> Result<Option<PathBuf>> {
        let mut cargo = Command::new("cargo");
        match self.build {
            Build::Unit => {
                cargo.args(["test", "--lib", "--no-run", "--package", check.package()]);
                cargo.env("CARGO_PROFILE_DEV_OPT_LEVEL", "0");
            }
            Build::Program => match check.suite() {
                Some(suite) => _ = cargo.args(["test", "--no-run", "--test", suite]),
                None => _ = cargo.args(["build", "--bin", "gnomon"]),
            },
            Build::Loom | Build::Shuttle => {
                cargo.args([
                    "test",
                    "--lib",
                    "--no-run",
                    "--release",
                    "--package",
                    check.package(),
                ]);
                cargo.args(["--config", "profile.release.opt-level=1"]);
                cargo.env("RUSTFLAGS", format!("--cfg {}", self.build.name()));
            }
            Build::Fuzz => {
                let built = self.program(".ci/fuzz").arg("--build").output()?;
                fs::write(log, [built.stdout, built.stderr].concat())?;
                return Ok(built.status.success().then(|| self.sources.folder.join(".ci/fuzz")));
            }
        }
        let built = cargo
            .current_dir(&self.sources.folder)
            .args(["--locked", "--message-format=json-render-diagnostics"])
            .env("CARGO_TARGET_DIR", &self.target)
            .env("CARGO_INCREMENTAL", "1")
            .env("CARGO_PROFILE_DEV_DEBUG", "0")
            .env("CARGO_PROFILE_RELEASE_DEBUG", "0")
            .output()
            .context("cannot run cargo")?;
        fs::write(log, built.stderr)?;
        if !built.status.success() {
            return Ok(None);
        }
        let program = executable(&String::from_utf8_lossy(&built.stdout))
            .with_context(|| format!("cargo names no program for {check}"))?;
        Ok(Some(program))
    }

    fn program(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new(self.sources.folder.join(program));
        command
            .current_dir(&self.sources.folder)
            .env("RUST_BACKTRACE", "0")
            // What one mutant's input broke must not be tried on the next.
            .env("PROPTEST_DISABLE_FAILURE_PERSISTENCE", "1")
            .env("PROPTEST_MAX_SHRINK_ITERS", "100")
            // Rather quick to build than quick to run.
            .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1")
            .env_remove("CARGO_TARGET_DIR");
        command
    }

    fn run(
        &self,
        program: &Path,
        check: &Check,
        seconds: u64,
        most: u64,
        name: &str,
    ) -> Result<(Ended, Duration)> {
        let path = self.logs.join(format!("{name}-run.log"));
        let output = File::create(&path)?;
        let begin = Instant::now();
        let status = self
            .program("/usr/bin/env")
            .args(["timeout", "-k", "5", &most.to_string()])
            .arg(program)
            .args(check.arguments(seconds))
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .status()
            .context("cannot run timeout")?;
        let took = begin.elapsed();
        let status = status.code().or(status.signal().map(|signal| 128 + signal)).unwrap_or(1);
        let log = String::from_utf8_lossy(&fs::read(&path)?).into_owned();
        Ok((Ended { status, log }, took))
    }
}

/// The last program that cargo's messages name.
fn executable(messages: &str) -> Option<PathBuf> {
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter_map(|message| message["executable"].as_str().map(PathBuf::from))
        .next_back()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mutant(name: &str, check: &str, file: &str) -> Mutant {
        Mutant {
            name: name.to_owned(),
            patch: PathBuf::new(),
            rule: String::new(),
            checks: vec![check.parse().unwrap()],
            within: 60,
            files: BTreeSet::from([file.to_owned()]),
        }
    }

    #[test]
    fn only_the_fuzzers_targets_are_broken_together() {
        let fuzz =
            [mutant("a", "fuzz x", "1"), mutant("b", "fuzz y", "2"), mutant("c", "fuzz x", "3")];
        let sizes = |build, mutants: &[Mutant]| -> Vec<usize> {
            batches(build, mutants).iter().map(Vec::len).collect()
        };
        assert_eq!(sizes(Build::Fuzz, &fuzz), [2, 1]);
        let same_file = [mutant("a", "fuzz x", "1"), mutant("b", "fuzz y", "1")];
        assert_eq!(sizes(Build::Fuzz, &same_file), [1, 1]);
        let unit = [mutant("a", "unit x", "1"), mutant("b", "unit y", "2")];
        assert_eq!(sizes(Build::Unit, &unit), [1, 1]);
    }

    #[test]
    fn the_program_is_the_last_that_is_named() {
        let messages = "{\"executable\":null}\nnot json\n{\"executable\":\"/a/b\"}\n{\"reason\":\"build-finished\"}\n";
        assert_eq!(executable(messages), Some(PathBuf::from("/a/b")));
        assert_eq!(executable("{}"), None);
    }
}
