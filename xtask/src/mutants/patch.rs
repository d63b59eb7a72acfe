//! A patch and its head lines: `# rule:`, `# caught by:`, `# within:`.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use super::check::Check;

/// What a check may take at most, in seconds.
const MAX_SECONDS: u64 = 60;
/// What the fuzzer may take: it begins from nothing.
const MAX_FUZZ_SECONDS: u64 = 120;

/// One broken rule.
#[derive(Clone, Debug)]
pub struct Mutant {
    pub name: String,
    pub patch: PathBuf,
    pub rule: String,
    /// Each of these is to catch it.
    pub checks: Vec<Check>,
    /// How long each of them may take, in seconds.
    pub within: u64,
    /// The files that it changes.
    pub files: BTreeSet<String>,
}

/// All of `mutants/`, by name.
pub fn all(root: &Path) -> Result<Vec<Mutant>> {
    let folder = root.join("mutants");
    let mut mutants = Vec::new();
    for entry in
        fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?
    {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "patch") {
            mutants.push(read(&path).with_context(|| format!("in {}", path.display()))?);
        }
    }
    ensure!(!mutants.is_empty(), "there is no patch in {}", folder.display());
    mutants.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(mutants)
}

fn read(path: &Path) -> Result<Mutant> {
    let text = fs::read_to_string(path)?;
    let name =
        path.file_stem().and_then(|name| name.to_str()).context("a name that is not UTF-8")?;
    parse(name, path, &text)
}

fn parse(name: &str, path: &Path, text: &str) -> Result<Mutant> {
    let mut rule = None;
    let mut checks: Vec<Check> = Vec::new();
    let mut within = None;
    for line in text.lines().take_while(|line| line.starts_with("# ")) {
        let Some((key, value)) = line[2..].split_once(": ") else {
            bail!("a head line is `# KEY: VALUE`, not {line:?}");
        };
        match key {
            "rule" => rule = Some(value.to_owned()),
            "caught by" => checks.push(value.parse()?),
            "within" => within = Some(value.parse().context("`# within:` wants seconds")?),
            _ => bail!("there is no head line `# {key}:`; there are rule, caught by and within"),
        }
    }
    ensure!(!checks.is_empty(), "it wants a head line `# caught by: KIND WHAT`");
    let most =
        checks.iter().map(|check| if check.is_fuzz() { MAX_FUZZ_SECONDS } else { MAX_SECONDS });
    let most = most.min().unwrap_or(MAX_SECONDS);
    let within = within.unwrap_or(most);
    ensure!((1..=most).contains(&within), "`# within:` is from 1 to {most} seconds, not {within}");
    let files: BTreeSet<String> =
        text.lines().filter_map(|line| line.strip_prefix("+++ b/")).map(str::to_owned).collect();
    ensure!(!files.is_empty(), "it changes no file");
    Ok(Mutant {
        name: name.to_owned(),
        patch: path.to_owned(),
        rule: rule.context("it wants a head line `# rule: SENTENCE`")?,
        checks,
        within,
        files,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIFF: &str = "--- a/src/lib.rs\n+++ b/src/lib.rs\n@@ -1 +1 @@\n-1\n+2\n";

    fn parsed(head: &str) -> Result<Mutant> {
        parse("name", Path::new("name.patch"), &format!("{head}{DIFF}"))
    }

    #[test]
    fn head_lines_are_read() {
        let mutant =
            parsed("# rule: a\n# caught by: unit b\n# caught by: loom c\n# within: 7\n").unwrap();
        assert_eq!((mutant.rule.as_str(), mutant.within), ("a", 7));
        assert_eq!(mutant.checks.len(), 2);
        assert_eq!(mutant.files, BTreeSet::from(["src/lib.rs".to_owned()]));
    }

    #[test]
    fn a_patch_that_asks_for_nothing_is_refused() {
        for head in [
            "",
            "# rule: a\n",
            "# caught by: unit b\n",
            "# rule: a\n# caught by: unit\n",
            "# rule: a\n# caught by: luck b\n",
            "# rule: a\n# caught by: unit b\n# within: 0\n",
            "# rule: a\n# caught by: unit b\n# within: 61\n",
            "# rule: a\n# caught by: unit b\n# seen by: c\n",
        ] {
            assert!(parsed(head).is_err(), "{head:?}");
        }
        assert!(
            parse("name", Path::new("name.patch"), "# rule: a\n# caught by: unit b\n").is_err()
        );
        assert!(parsed("# rule: a\n# caught by: fuzz b\n# within: 120\n").is_ok());
    }
}
