//! Control groups: what they allow this process, of both versions, all ancestors included.
//!
//! Guarantee: nothing is changed. What cannot be read is no limit; whether ancestors are out of
//! sight, in a namespace of control groups, is told.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// The first namespace of control groups, `PROC_CGROUP_INIT_INO` of linux/proc_ns.h.
const FIRST_NAMESPACE: &str = "cgroup:[4026531835]";
/// From here on a number is version 1's "no limit".
const NO_LIMIT_BYTES: u64 = 1 << 60;

/// What one group allows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct GroupLimit {
    /// Where it is written.
    pub(crate) file: PathBuf,
    pub(crate) limit: u64,
    /// How much is taken that would not be given back for the asking.
    pub(crate) used: u64,
}

impl GroupLimit {
    pub(crate) fn room(&self) -> u64 {
        self.limit.saturating_sub(self.used)
    }
}

/// What all groups of this process allow, from its own upwards.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Groups {
    /// Bytes of memory.
    pub(crate) memory: Vec<GroupLimit>,
    /// Threads.
    pub(crate) pids: Vec<GroupLimit>,
    /// Whether there may be ancestors that cannot be seen from here.
    pub(crate) has_hidden_ancestors: bool,
}

impl Groups {
    pub(crate) fn probe() -> Self {
        let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let is_first = fs::read_link("/proc/self/ns/cgroup")
            .is_ok_and(|name| name == Path::new(FIRST_NAMESPACE));
        let mut groups = Self::of(&text("/proc/self/cgroup"), &text("/proc/self/mountinfo"));
        groups.has_hidden_ancestors |= !is_first;
        groups
    }

    /// From the contents of /proc/PID/cgroup and /proc/PID/mountinfo.
    fn of(memberships: &str, mounts: &str) -> Self {
        let mounts: Vec<Mount> = mounts.lines().filter_map(Mount::parse).collect();
        let mut groups = Self::default();
        for line in memberships.lines() {
            let mut fields = line.splitn(3, ':').skip(1);
            let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
            let unified = controllers.is_empty();
            let has = |name: &str| unified || controllers.split(',').any(|one| one == name);
            if has("memory") {
                let Some(chain) = Chain::find(&mounts, unified, "memory", path) else { continue };
                groups.has_hidden_ancestors |= chain.is_cut_off;
                groups.memory.extend(chain.memory(unified));
            }
            if has("pids") {
                let Some(chain) = Chain::find(&mounts, unified, "pids", path) else { continue };
                let limits = chain.folders.iter();
                groups
                    .pids
                    .extend(limits.filter_map(|at| limit(at, "pids.max", "pids.current", 0)));
            }
        }
        groups
    }
}

/// A mounted file system of control groups.
struct Mount {
    /// The group at its root.
    root: PathBuf,
    place: PathBuf,
    unified: bool,
    /// With the controllers of version 1.
    options: String,
}

impl Mount {
    /// From a line of mountinfo (proc_pid_mountinfo(5)).
    fn parse(line: &str) -> Option<Self> {
        let (mount, kind) = line.split_once(" - ")?;
        let mut kind = kind.split(' ');
        let unified = match kind.next()? {
            "cgroup2" => true,
            "cgroup" => false,
            _ => return None,
        };
        let mut fields = mount.split(' ').skip(3);
        let (root, place) = (unescaped(fields.next()?), unescaped(fields.next()?));
        Some(Self { root, place, unified, options: kind.nth(1).unwrap_or_default().to_owned() })
    }
}

/// A path in which blanks, tabs, newlines and backslashes are written as three octal digits.
fn unescaped(field: &str) -> PathBuf {
    let (mut bytes, mut rest) = (Vec::new(), field.as_bytes());
    while let Some((&first, after)) = rest.split_first() {
        let digits = (first == b'\\').then(|| after.get(..3)).flatten();
        let code = digits.and_then(|digits| std::str::from_utf8(digits).ok());
        match code.and_then(|code| u8::from_str_radix(code, 8).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[3..];
            }
            None => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    std::ffi::OsString::from_vec(bytes).into()
}

/// The folders of a group and of those ancestors that can be seen, upwards.
struct Chain {
    folders: Vec<PathBuf>,
    /// The file system's root is not the hierarchy's.
    is_cut_off: bool,
}

impl Chain {
    fn find(mounts: &[Mount], unified: bool, controller: &str, path: &str) -> Option<Self> {
        let fits = |mount: &&Mount| {
            mount.unified == unified
                && (unified || mount.options.split(',').any(|option| option == controller))
        };
        let below =
            |mount: &Mount| Path::new(path).strip_prefix(&mount.root).ok().map(PathBuf::from);
        let mut all = mounts.iter().filter(fits);
        // The mount that shows this group; or else what there is, as in containers that have their
        // own group at the root without a namespace to match.
        let (mount, inner) = all
            .clone()
            .find_map(|mount| below(mount).map(|inner| (mount, inner)))
            .or_else(|| all.next().map(|mount| (mount, PathBuf::new())))?;
        let own = mount.place.join(inner);
        let folders = own.ancestors().take_while(|at| at.starts_with(&mount.place));
        Some(Self {
            folders: folders.map(Path::to_owned).collect(),
            is_cut_off: mount.root != Path::new("/"),
        })
    }

    fn memory(&self, unified: bool) -> Vec<GroupLimit> {
        let (mut limits, mut least) = (Vec::new(), None);
        for (index, at) in self.folders.iter().enumerate() {
            // Before it was always so, a group of version 1 could keep its children to themselves.
            let counts_children = !text(at, "memory.use_hierarchy").is_ok_and(|flag| flag == "0");
            if index > 0 && !counts_children {
                break;
            }
            let stat = text(at, "memory.stat").unwrap_or_default();
            let of = |name: &str| {
                let mut lines = stat.lines().filter_map(|line| line.split_once(' '));
                lines.find(|(found, _)| *found == name).and_then(|(_, n)| n.parse::<u64>().ok())
            };
            // Pages of files go when memory is asked for.
            let files = |prefix: &str| -> u64 {
                let lists = ["inactive_file", "active_file"];
                lists.iter().filter_map(|list| of(&format!("{prefix}{list}"))).sum()
            };
            if unified {
                // And what the kernel remembers of files; version 1 does not tell of it.
                let given_back = files("") + of("slab_reclaimable").unwrap_or(0);
                let limit = |name| limit(at, name, "memory.current", given_back);
                limits.extend(["memory.max", "memory.high"].into_iter().filter_map(limit));
                continue;
            }
            let own = limit(at, "memory.limit_in_bytes", "memory.usage_in_bytes", files("total_"));
            limits.extend(own);
            if index == 0 {
                least =
                    of("hierarchical_memory_limit").map(|limit| (at.join("memory.stat"), limit));
            }
        }
        // Version 1 tells the least of all ancestors' limits, also of those out of sight.
        let least = least.filter(|&(_, limit)| limit < NO_LIMIT_BYTES);
        limits.extend(least.map(|(file, limit)| GroupLimit { file, limit, used: 0 }));
        limits
    }
}

fn text(folder: &Path, name: &str) -> io::Result<String> {
    Ok(fs::read_to_string(folder.join(name))?.trim().to_owned())
}

/// The limit in a file, unless there is none. Of what is used, `given_back` goes for the asking.
fn limit(folder: &Path, name: &str, used: &str, given_back: u64) -> Option<GroupLimit> {
    let limit: u64 = text(folder, name).ok()?.parse().ok()?;
    let used: u64 = text(folder, used).ok()?.parse().ok()?;
    let used = used.saturating_sub(given_back);
    (limit < NO_LIMIT_BYTES).then(|| GroupLimit { file: folder.join(name), limit, used })
}

#[cfg(test)]
#[path = "groups_tests.rs"]
mod tests;
