//! The report as a file.
//!
//! Guarantee: the file named on the command line is either what it was before or the whole report,
//! whenever somebody looks, even if the process or the machine dies: the report is written to a
//! temporary file next to it, put on the disk, then renamed. A symbolic link stays, and what it leads
//! to is replaced, as a shell's redirection would have it.

use std::fs::Permissions;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use super::Report;
use crate::sys::names::{Leftover, folder_of};

/// The report cannot be written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JsonError {
    /// There is something that is not a file.
    #[error("--json {}: there is something that is not a file; name another one", .path.display())]
    NotAFile { path: PathBuf },
    /// No file can be made next to it.
    #[error("--json {}: cannot write to directory {}: {source}; name another place", .path.display(), .folder.display())]
    Folder { path: PathBuf, folder: PathBuf, source: io::Error },
    /// The report could not be written or renamed.
    #[error("--json {}: cannot write the report: {source}; make room, or name another place", .path.display())]
    Write { path: PathBuf, source: io::Error },
    /// Symbolic links lead nowhere.
    #[error("--json {}: its symbolic links cannot be followed: {source}; name a file", .path.display())]
    Link { path: PathBuf, source: io::Error },
}

/// Makes sure that a report can be written there, and leaves nothing behind.
///
/// # Errors
/// [`JsonError::NotAFile`], [`JsonError::Folder`].
pub(crate) fn check_writable(path: &Path) -> Result<(), JsonError> {
    let path = &follow(path)?;
    let there_is_a_file = match path.metadata() {
        Ok(metadata) => metadata.is_file(),
        // Whether one can be made there shows below.
        Err(_) => true,
    };
    if !there_is_a_file || path.file_name().is_none() {
        let path = path.to_owned();
        return Err(JsonError::NotAFile { path });
    }
    temporary(path).map(drop)
}

/// Writes the report.
///
/// # Errors
/// [`JsonError`]; a file that was there is then unchanged.
pub(crate) fn write(path: &Path, report: &Report) -> Result<(), JsonError> {
    let path = &follow(path)?;
    let refused = |source: io::Error| JsonError::Write { path: path.to_owned(), source };
    let file = temporary(path)?;
    // A signal that ends the process removes it; renamed, it has another name.
    let _removed = Leftover::new(file.path()).map_err(refused)?;
    let mut writer = BufWriter::new(&file);
    serde_json::to_writer_pretty(&mut writer, report).map_err(|error| refused(error.into()))?;
    writeln!(writer).and_then(|()| writer.flush()).map_err(refused)?;
    drop(writer);
    file.as_file().sync_all().map_err(refused)?;
    file.persist(path).map_err(|error| refused(error.error))?;
    Ok(())
}

/// Most symbolic links that are followed, as in the kernel (path_resolution(7)).
const MOST_LINKS: usize = 40;

/// Where symbolic links lead, whether something is there or not.
fn follow(path: &Path) -> Result<PathBuf, JsonError> {
    let refused = |source| JsonError::Link { path: path.to_owned(), source };
    let mut found = path.to_owned();
    for _ in 0..=MOST_LINKS {
        if !found.is_symlink() {
            return Ok(found);
        }
        let next = found.read_link().map_err(refused)?;
        // Relative to the directory that the link is in.
        found = found.parent().unwrap_or(Path::new("")).join(next);
    }
    Err(refused(nix::errno::Errno::ELOOP.into()))
}

/// A file in the same directory, removed again if it is not renamed.
fn temporary(path: &Path) -> Result<NamedTempFile, JsonError> {
    let folder = folder_of(path);
    tempfile::Builder::new()
        .prefix(".gnomon-report-")
        // As any other new file; the user's umask applies.
        .permissions(Permissions::from_mode(0o666))
        .tempfile_in(folder)
        .map_err(|source| JsonError::Folder {
            path: path.to_owned(),
            folder: folder.to_owned(),
            source,
        })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn the_check_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        check_writable(&folder.path().join("report.json")).unwrap();
        assert!(names(folder.path()).is_empty());
    }

    #[test]
    fn places_that_hold_no_file_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        for path in [folder.path(), Path::new("/dev/null"), Path::new("..")] {
            let error = check_writable(path).unwrap_err();
            assert!(matches!(error, JsonError::NotAFile { .. }), "{error}");
        }
        let error = check_writable(&folder.path().join("no/report.json")).unwrap_err();
        assert!(matches!(error, JsonError::Folder { .. }), "{error}");
        assert!(error.to_string().contains("no"), "{error}");
    }

    #[test]
    fn a_report_replaces_the_old_one_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("report.json");
        fs::write(&path, "old and longer than nothing").unwrap();
        let report = super::super::tests::report();
        write(&path, &report).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["result"], "passed");
        assert_eq!(value["guest"]["verified"], 1_000_000);
        assert_eq!(names(folder.path()), ["report.json"]);
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o400, 0o400);
    }

    #[test]
    fn a_symbolic_link_stays_and_what_it_leads_to_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let place = |name: &str| folder.path().join(name);
        let links = [("first", "second"), ("second", "elsewhere/report.json"), ("round", "round")];
        for (link, to) in links {
            std::os::unix::fs::symlink(to, place(link)).unwrap();
        }
        let error = check_writable(&place("first")).unwrap_err();
        assert!(matches!(error, JsonError::Folder { .. }), "{error}");
        fs::create_dir(place("elsewhere")).unwrap();
        let report = super::super::tests::report();
        // First nothing is there, then the report of before.
        for _ in 0..2 {
            check_writable(&place("first")).unwrap();
            write(&place("first"), &report).unwrap();
            assert!(place("first").is_symlink() && place("second").is_symlink());
            assert_eq!(names(&place("elsewhere")), ["report.json"]);
            assert!(fs::read(place("elsewhere/report.json")).unwrap().starts_with(b"{"));
        }
        let error = check_writable(&place("round")).unwrap_err();
        assert!(matches!(error, JsonError::Link { .. }), "{error}");
    }
}
