//! The disks of a Linux guest: how they are named, opened, and what is told of their trouble.

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use crate::cli::config::UsageError;
use crate::cli::output::{self, printable};
use crate::virtio::{Block, Contents, Device, DiskMode};

/// `PATH[,ro|,rw][,raw]`, the options in any order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DiskArg {
    pub(super) path: PathBuf,
    pub(super) mode: DiskMode,
    pub(super) contents: Contents,
}

impl FromStr for DiskArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (mut path, mut mode, mut contents) = (text, None, None);
        // A comma may be part of a name: what was said already is, too.
        while let Some((before, option)) = path.rsplit_once(',') {
            match option {
                "ro" if mode.is_none() => mode = Some(DiskMode::ReadOnly),
                "rw" if mode.is_none() => mode = Some(DiskMode::ReadWrite),
                "raw" if contents.is_none() => contents = Some(Contents::Raw),
                _ => break,
            }
            path = before;
        }
        if path.is_empty() {
            return Err(
                "name a file or a device, with ,ro behind it for one that is only read".to_owned()
            );
        }
        Ok(Self {
            path: path.into(),
            mode: mode.unwrap_or(DiskMode::ReadWrite),
            contents: contents.unwrap_or(Contents::Checked),
        })
    }
}

struct Disk {
    path: PathBuf,
    block: Arc<Block>,
    /// Causes of trouble that were told.
    told: usize,
}

/// The disks of a guest, in order.
pub(super) struct Disks(Vec<Disk>);

impl Disks {
    pub(super) fn open(disks: &[DiskArg]) -> Result<Self, UsageError> {
        let open = |(index, disk): (usize, &DiskArg)| {
            let serial = format!("gnomon-disk{index}");
            let block = Block::open(&disk.path, disk.mode, disk.contents, &serial)
                .map_err(|error| UsageError(format!("--disk: {error}")))?;
            Ok(Disk { path: disk.path.clone(), block: Arc::new(block), told: 0 })
        };
        disks.iter().enumerate().map(open).collect::<Result<_, _>>().map(Self)
    }

    pub(super) fn devices(&self) -> Vec<Arc<dyn Device>> {
        self.0.iter().map(|disk| disk.block.clone() as Arc<dyn Device>).collect()
    }

    /// What is to be told before the guest starts.
    pub(super) fn warnings(&self) -> Vec<String> {
        let shared = self.0.iter().filter(|disk| disk.block.is_shared());
        shared
            .map(|disk| {
                format!(
                    "warning: --disk {} is in use on this host (mounted, swap, or part of a volume): what the guest reads may be half written",
                    disk.path.display()
                )
            })
            .collect()
    }

    /// Tells of trouble that has not been told of yet, once for each cause.
    pub(super) fn tell(&mut self) {
        self.untold().into_iter().for_each(output::note);
    }

    fn untold(&mut self) -> Vec<String> {
        let mut lines = Vec::new();
        for disk in &mut self.0 {
            let troubles = disk.block.troubles();
            for trouble in troubles.iter().skip(disk.told) {
                let line = format!("warning: disk {}: {trouble}", disk.path.display());
                lines.push(printable(&line));
            }
            disk.told = troubles.len();
        }
        lines
    }

    /// All trouble, with how often each cause struck, for the report.
    pub(super) fn report(&self) -> Vec<String> {
        let line = |disk: &Disk| {
            let path = disk.path.display().to_string();
            let troubles = disk.block.troubles();
            troubles.into_iter().map(move |trouble| printable(&format!("disk {path}: {trouble}")))
        };
        self.0.iter().flat_map(line).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_written_and_looked_at_unless_it_is_said() {
        let (ro, rw) = (DiskMode::ReadOnly, DiskMode::ReadWrite);
        let (raw, checked) = (Contents::Raw, Contents::Checked);
        for (text, path, mode, contents) in [
            ("a", "a", rw, checked),
            ("a,ro", "a", ro, checked),
            ("a,rw", "a", rw, checked),
            ("a,ro,rw", "a,ro", rw, checked),
            ("a,raw", "a", rw, raw),
            ("a,raw,ro", "a", ro, raw),
            ("a,ro,raw", "a", ro, raw),
            ("a,raw,raw", "a,raw", rw, raw),
            ("a,b,ro", "a,b", ro, checked),
            ("a,rawer", "a,rawer", rw, checked),
        ] {
            let expected = DiskArg { path: path.into(), mode, contents };
            assert_eq!(text.parse::<DiskArg>().unwrap(), expected, "{text}");
        }
        for nothing in ["", ",ro", ",raw", ",ro,raw"] {
            assert!(nothing.parse::<DiskArg>().unwrap_err().contains("name a file"), "{nothing}");
        }
    }
}
