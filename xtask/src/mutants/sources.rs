//! A copy of the sources, in which rules are broken.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// Where builds in the copy may leave things, and what is not looked through for files to remove.
const BUILDS: &str = "target";

pub struct Sources {
    pub folder: PathBuf,
}

impl Sources {
    /// Makes `folder` a copy of the checkout's files as they are now, new ones included. Files that are the same already stay
    /// untouched: cargo goes by their times.
    pub fn copy(root: &Path, folder: &Path) -> Result<Self> {
        let listed = Command::new("git")
            .arg("-C")
            .arg(root)
            .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
            .output()?;
        if !listed.status.success() {
            bail!("git ls-files: {}", String::from_utf8_lossy(&listed.stderr));
        }
        let names = String::from_utf8(listed.stdout).context("a file name that is not UTF-8")?;
        let mut kept = BTreeSet::new();
        for name in names.split_terminator('\0') {
            let (from, to) = (root.join(name), folder.join(name));
            let Ok(content) = fs::read(&from) else { continue };
            kept.insert(to.clone());
            if fs::read(&to).is_ok_and(|there| there == content) {
                continue;
            }
            if let Some(parent) = to.parent() {
                fs::create_dir_all(parent)?;
            }
            fs::copy(&from, &to).with_context(|| format!("cannot write {}", to.display()))?;
        }
        remove_others(folder, &kept)?;
        Ok(Self { folder: folder.to_owned() })
    }

    /// Breaks a rule by the copy's own patch, which does not change while the checkout does.
    pub fn apply(&self, name: &str) -> Result<()> {
        git_apply(&self.folder, &[], &self.patch(name))
    }

    pub fn undo(&self, name: &str) -> Result<()> {
        git_apply(&self.folder, &["--reverse"], &self.patch(name))
    }

    fn patch(&self, name: &str) -> PathBuf {
        self.folder.join("mutants").join(format!("{name}.patch"))
    }
}

/// Whether the patch applies to the checkout as it is.
pub fn apply_check(root: &Path, patch: &Path) -> Result<()> {
    git_apply(root, &["--check"], patch)
}

fn git_apply(folder: &Path, options: &[&str], patch: &Path) -> Result<()> {
    let output = Command::new("git")
        .current_dir(folder)
        // Outside of any repository, or paths would be taken as those of the one around.
        .env("GIT_CEILING_DIRECTORIES", folder.parent().unwrap_or(folder))
        .arg("apply")
        .args(options)
        .arg(patch)
        .output()?;
    if !output.status.success() {
        bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

fn remove_others(folder: &Path, kept: &BTreeSet<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            if !path.ends_with(BUILDS) {
                remove_others(&path, kept)?;
            }
        } else if !kept.contains(&path) {
            fs::remove_file(&path)?;
        }
    }
    Ok(())
}
