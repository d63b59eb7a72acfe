//! Limits for a child: the test program starts itself, takes the limits upon itself, and becomes
//! gnomon.

use std::env;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::{Gid, Uid, setgid, setgroups, setuid};

use crate::process::gnomon;

/// Says what to do in the child: words as `fsize=4096`, one a line.
const VARIABLE: &str = "GNOMON_TEST_LIMITS";
/// A user that has nothing to do with anybody.
const NOBODY: u32 = 65_534;

/// See the module's documentation.
#[derive(Default)]
pub(crate) struct Limits(String);

impl Limits {
    fn with(mut self, name: &str, value: impl std::fmt::Display) -> Self {
        self.0 += &format!("{name}={value}\n");
        self
    }

    pub(crate) fn file_size(self, bytes: u64) -> Self {
        self.with("fsize", bytes)
    }

    pub(crate) fn address_space(self, bytes: u64) -> Self {
        self.with("as", bytes)
    }

    pub(crate) fn private_memory(self, bytes: u64) -> Self {
        self.with("data", bytes)
    }

    pub(crate) fn open_files(self, count: u64) -> Self {
        self.with("nofile", count)
    }

    pub(crate) fn threads(self, count: u64) -> Self {
        self.with("nproc", count)
    }

    pub(crate) fn pending_signals(self, count: u64) -> Self {
        self.with("sigpending", count)
    }

    pub(crate) fn locked_memory(self, bytes: u64) -> Self {
        self.with("memlock", bytes)
    }

    pub(crate) fn of_nobody(self) -> Self {
        self.with("user", NOBODY)
    }

    pub(crate) fn in_group(self, folder: &Path) -> Self {
        self.with("group", folder.display())
    }

    /// `gnomon` with these arguments, under the limits.
    pub(crate) fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env::current_exe().unwrap());
        command.args(words).env(VARIABLE, &self.0);
        command
    }

    /// In the child, what is to be done.
    pub(crate) fn of_this_process() -> Option<Self> {
        env::var(VARIABLE).ok().map(Self)
    }

    /// Takes the limits and becomes the program; returns only if it cannot.
    pub(crate) fn become_gnomon(self) -> ExitCode {
        for line in self.0.lines() {
            let (name, value) = line.split_once('=').unwrap();
            let set = |resource| {
                let limit = value.parse().unwrap();
                setrlimit(resource, limit, limit).unwrap();
            };
            match name {
                "fsize" => set(Resource::RLIMIT_FSIZE),
                "as" => set(Resource::RLIMIT_AS),
                "data" => set(Resource::RLIMIT_DATA),
                "nofile" => set(Resource::RLIMIT_NOFILE),
                "nproc" => set(Resource::RLIMIT_NPROC),
                "sigpending" => set(Resource::RLIMIT_SIGPENDING),
                "memlock" => set(Resource::RLIMIT_MEMLOCK),
                "group" => fs::write(Path::new(value).join("cgroup.procs"), "0").unwrap(),
                "user" => {
                    let id = value.parse().unwrap();
                    setgroups(&[]).unwrap();
                    setgid(Gid::from_raw(id)).unwrap();
                    setuid(Uid::from_raw(id)).unwrap();
                }
                other => panic!("{other}"),
            }
        }
        let error = Command::new(gnomon()).args(env::args_os().skip(1)).env_remove(VARIABLE).exec();
        eprintln!("{}: {error}", gnomon().display());
        ExitCode::from(126)
    }
}

/// The folder of the group that this process is in, and the file of its limit on memory.
pub(crate) fn own_group(controller: &str) -> Option<(PathBuf, &'static str)> {
    let memberships = fs::read_to_string("/proc/self/cgroup").ok()?;
    let first = Path::new("/sys/fs/cgroup").join(controller);
    let (place, file, own) = match first.is_dir() {
        true => (first, "memory.limit_in_bytes", format!(":{controller}:")),
        false => (PathBuf::from("/sys/fs/cgroup"), "memory.max", "0::".to_owned()),
    };
    let line = memberships.lines().find(|line| line.contains(&own))?;
    let path = line.rsplit(':').next()?;
    Some((place.join(path.trim_start_matches('/')), file))
}
