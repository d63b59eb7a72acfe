//! What is to notice a broken rule, and what counts as its having noticed.

use std::fmt;
use std::str::FromStr;

use anyhow::{Result, bail, ensure};
use clap::ValueEnum;

/// Exit status of `timeout` for a command that took too long.
const TIMED_OUT: i32 = 124;

/// The crates that are rooms of the library, by the first part of the names that their tests go by; those of
/// all others are the root's.
const CRATES: &[(&str, &str)] =
    &[("export_rmap", "gnomon-export-rmap"), ("host_mm", "gnomon-host-mm"), ("sys", "gnomon-sys")];

/// The kinds of checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Kind {
    /// The library's own tests: `unit FILTER`.
    Unit,
    /// A suite of tests/: `test NAME FILTER`.
    Test,
    /// A model under loom: `loom FILTER`.
    Loom,
    /// A model under shuttle: `shuttle FILTER`.
    Shuttle,
    /// The program itself: `stress OPTIONS`.
    Stress,
    /// The fuzzer, from an empty corpus: `fuzz TARGET`.
    Fuzz,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Unit => "unit",
            Self::Test => "test",
            Self::Loom => "loom",
            Self::Shuttle => "shuttle",
            Self::Stress => "stress",
            Self::Fuzz => "fuzz",
        }
    }
}

/// One line `# caught by:`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Check {
    pub kind: Kind,
    /// The filter, options or target; a suite's name is in front of its filter.
    pub what: String,
}

impl FromStr for Check {
    type Err = anyhow::Error;

    fn from_str(line: &str) -> Result<Self> {
        let (kind, what) = line.split_once(' ').unwrap_or((line, ""));
        let what = what.trim();
        ensure!(!what.is_empty(), "`# caught by: {line}` does not say what is to catch it");
        let kinds = Kind::value_variants();
        let Some(&kind) = kinds.iter().find(|known| known.name() == kind) else {
            let names: Vec<_> = kinds.iter().map(|known| known.name()).collect();
            bail!("there is no kind of check {kind:?}; there are {}", names.join(", "));
        };
        ensure!(
            kind != Kind::Test || what.contains(' '),
            "`# caught by: {line}` wants a suite and a filter"
        );
        Ok(Self { kind, what: what.to_owned() })
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind.name(), self.what)
    }
}

/// How a run ended.
pub struct Ended {
    /// The exit status, or 128 and the number of the signal.
    pub status: i32,
    pub log: String,
}

impl Check {
    pub fn is_fuzz(&self) -> bool {
        self.kind == Kind::Fuzz
    }

    /// The suite of a `test`.
    pub fn suite(&self) -> Option<&str> {
        (self.kind == Kind::Test).then(|| self.what.split(' ').next().unwrap_or_default())
    }

    /// The package whose tests or models these are, and the words without the part that says so.
    fn of_package(&self) -> (&'static str, &str) {
        let room = self.what.split_once("::").and_then(|(room, rest)| {
            CRATES.iter().find(|(name, _)| *name == room).map(|(_, package)| (*package, rest))
        });
        room.unwrap_or(("gnomon", &self.what))
    }

    /// What the names of the models contain that this is of.
    pub fn model(&self) -> Option<&str> {
        matches!(self.kind, Kind::Loom | Kind::Shuttle).then_some(&self.what)
    }

    /// The package whose tests or models these are.
    pub fn package(&self) -> &'static str {
        self.of_package().0
    }

    /// What the built program is given.
    pub fn arguments(&self, seconds: u64) -> Vec<String> {
        let words = self.what.split_whitespace().map(str::to_owned);
        match self.kind {
            Kind::Stress => std::iter::once("stress".to_owned()).chain(words).collect(),
            Kind::Test => words.skip(1).collect(),
            Kind::Unit | Kind::Loom | Kind::Shuttle => {
                let words = self.of_package().1.split_whitespace().map(str::to_owned);
                words.chain(std::iter::once("--nocapture".to_owned())).collect()
            }
            Kind::Fuzz => ["--from-nothing".to_owned(), seconds.to_string()]
                .into_iter()
                .chain(words)
                .collect(),
        }
    }

    /// Whether the run was one of the check at all: a filter may match no test.
    pub fn has_run(&self, ended: &Ended) -> bool {
        match self.kind {
            Kind::Stress | Kind::Fuzz => true,
            Kind::Unit | Kind::Test | Kind::Loom | Kind::Shuttle => ended.log.lines().any(|line| {
                line.strip_prefix("running ")
                    .and_then(|rest| rest.split(' ').next())
                    .is_some_and(|count| count.parse().is_ok_and(|count: u64| count > 0))
            }),
        }
    }

    /// Whether the check has seen the broken rule: by its own verdict, or by a crash.
    pub fn is_caught(&self, ended: &Ended) -> bool {
        let Ended { status, log } = ended;
        let has_failed = log.lines().any(|line| line.starts_with("test result: FAILED"));
        let has_ended = *status != 0 && *status != TIMED_OUT;
        self.has_run(ended)
            && match self.kind {
                // For the reason that it is there for, and not because the search was too large. What is
                // dropped after a deadlock may panic once more, which aborts.
                Kind::Loom | Kind::Shuttle => {
                    let has_aborted = *status > 128 && log.contains("panicked at");
                    (has_failed || has_aborted) && !log.contains("exceeded maximum")
                }
                Kind::Unit | Kind::Test => has_failed || *status > 128,
                Kind::Stress => {
                    has_ended && (log.contains("FAILED") || log.contains("panicked at"))
                }
                // A panic of the target, not of the fuzzer or the host.
                Kind::Fuzz => {
                    has_ended
                        && log.lines().any(|line| {
                            line.starts_with("thread ")
                                && line.contains("panicked at")
                                && line.contains("src/")
                        })
                }
            }
    }

    /// Whether the unbroken code passes.
    pub fn passes(&self, ended: &Ended) -> bool {
        // A run of stress is as long as it is told: that it finds nothing in all of it is for other stages.
        let is_cut = self.kind == Kind::Stress && ended.status == TIMED_OUT;
        self.has_run(ended) && (ended.status == 0 || is_cut)
    }

    /// How many schedules a model took to fail, as it prints it.
    pub fn schedules<'a>(&self, ended: &'a Ended) -> Option<&'a str> {
        let (_, rest) = ended.log.split_once(": failed after ")?;
        rest.split(' ').next()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(status: i32, log: &str) -> Ended {
        Ended { status, log: log.to_owned() }
    }

    fn check(line: &str) -> Check {
        line.parse().unwrap()
    }

    #[test]
    fn only_a_verdict_counts() {
        let failed = ended(101, "running 2 tests\ntest result: FAILED. 1 passed\n");
        let nothing_ran = ended(0, "running 0 tests\ntest result: ok. 0 passed\n");
        let hung = ended(TIMED_OUT, "running 1 test\n");
        let crashed = ended(139, "running 1 test\n");
        let aborted = ended(134, "running 1 test\nthread 'a' panicked at b\ndeadlock\n");
        let too_large = ended(
            101,
            "running 1 test\nModel exceeded maximum number of branches\ntest result: FAILED.\n",
        );
        for (line, caught, missed) in [
            ("unit a", vec![&failed, &crashed], vec![&nothing_ran, &hung]),
            ("loom a", vec![&failed, &aborted], vec![&nothing_ran, &hung, &crashed, &too_large]),
        ] {
            for ended in caught {
                assert!(check(line).is_caught(ended), "{line}: {}", ended.log);
            }
            for ended in missed {
                assert!(!check(line).is_caught(ended), "{line}: {}", ended.log);
            }
        }
        let stress = check("stress --duration 1s");
        assert!(stress.is_caught(&ended(1, "FAILED: 1 violation")));
        assert!(!stress.is_caught(&ended(2, "error: no such option")));
        assert!(!stress.is_caught(&ended(TIMED_OUT, "FAILED")));
        let fuzz = check("fuzz boot");
        assert!(fuzz.is_caught(&ended(77, "thread 'main' (1) panicked at src/vmm/elf.rs:1:2:")));
        assert!(!fuzz.is_caught(&ended(1, "error: could not compile")));
    }

    #[test]
    fn the_unbroken_code_has_to_run_and_pass() {
        assert!(check("unit a").passes(&ended(0, "running 1 test\n")));
        assert!(!check("unit a").passes(&ended(0, "running 0 tests\n")));
        assert!(!check("unit a").passes(&ended(101, "running 1 test\n")));
        assert!(check("stress --vms 2").passes(&ended(TIMED_OUT, "")));
        assert!(!check("stress --vms 2").passes(&ended(1, "FAILED")));
    }

    #[test]
    fn a_room_of_its_own_has_its_own_tests() {
        let unit = check("unit sys::memory::tests::a");
        assert_eq!(unit.package(), "gnomon-sys");
        assert_eq!(unit.arguments(1), ["memory::tests::a", "--nocapture"]);
        let unit = check("unit shadow_mmu::tests::a");
        assert_eq!(unit.package(), "gnomon");
        assert_eq!(unit.arguments(1), ["shadow_mmu::tests::a", "--nocapture"]);

        let loom = check("loom host_mm::models::a");
        assert_eq!(loom.package(), "gnomon-host-mm");
        assert_eq!(loom.arguments(1), ["models::a", "--nocapture"]);

        let src = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../src");
        let mut rooms: Vec<_> = std::fs::read_dir(src)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.join("Cargo.toml").exists())
            .map(|path| path.file_name().unwrap().to_str().unwrap().to_owned())
            .collect();
        rooms.sort();
        let known: Vec<_> = CRATES.iter().map(|(room, _)| *room).collect();
        assert_eq!(rooms, known);
    }

    #[test]
    fn models_say_after_how_many_schedules() {
        let log =
            "running 1 test\nexport_rmap::models::iotlb::a: failed after 167 schedules, 0.04 s\n";
        assert_eq!(check("loom a").schedules(&ended(101, log)), Some("167"));
    }
}
