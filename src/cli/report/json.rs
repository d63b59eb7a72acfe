//! The report as a file.
//!
//! Guarantee: the file named on the command line is either what it was before or the whole report,
//! whenever somebody looks, even if the process or the machine dies: the report is written to a
//! temporary file next to it, put on the disk, then renamed. A symbolic link stays, and what it leads
//! to is replaced, as a shell's redirection would have it. A name of an open descriptor (`/dev/stdout`,
//! `/dev/fd/3`) stands for that descriptor: the report is written to it as to any pipe, behind what was
//! written before, and nothing is replaced.

use std::fs::{self, File, Permissions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::statfs::{PROC_SUPER_MAGIC, statfs};
use tempfile::NamedTempFile;

use super::Report;
use crate::sys::names::{Leftover, folder_of};
use crate::sys::stdio;

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
    let path = &match follow(path)? {
        Place::File(path) => path,
        Place::Descriptor(name) => return open_descriptor(&name).map(drop),
    };
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
    let path = &match follow(path)? {
        Place::File(path) => path,
        Place::Descriptor(name) => {
            let file = open_descriptor(&name)?;
            let refused = |source| JsonError::Write { path: name.clone(), source };
            return write_to(&file, report).map_err(refused);
        }
    };
    let refused = |source: io::Error| JsonError::Write { path: path.to_owned(), source };
    let file = temporary(path)?;
    // A signal that ends the process removes it; renamed, it has another name.
    let _removed = Leftover::new(file.path()).map_err(refused)?;
    write_to(file.as_file(), report).map_err(refused)?;
    file.as_file().sync_all().map_err(refused)?;
    file.persist(path).map_err(|error| refused(error.error))?;
    Ok(())
}

fn write_to(file: &File, report: &Report) -> io::Result<()> {
    let mut writer = BufWriter::new(file);
    serde_json::to_writer_pretty(&mut writer, report)?;
    writeln!(writer)?;
    writer.flush()
}

/// Where a report goes.
enum Place {
    /// To a file of its own.
    File(PathBuf),
    /// To what is open under this name.
    Descriptor(PathBuf),
}

/// Most symbolic links that are followed, as in the kernel (path_resolution(7)).
const MOST_LINKS: usize = 40;

/// Where symbolic links lead, whether something is there or not.
fn follow(path: &Path) -> Result<Place, JsonError> {
    let refused = |source| JsonError::Link { path: path.to_owned(), source };
    let mut found = path.to_owned();
    for _ in 0..=MOST_LINKS {
        if !found.is_symlink() {
            return Ok(Place::File(found));
        }
        if is_descriptor(&found) {
            return Ok(Place::Descriptor(found));
        }
        let next = found.read_link().map_err(refused)?;
        // Relative to the directory that the link is in.
        found = found.parent().unwrap_or(Path::new("")).join(next);
    }
    Err(refused(nix::errno::Errno::ELOOP.into()))
}

/// Whether this link is a process's name of a file that it has open (proc_pid_fd(5)).
fn is_descriptor(link: &Path) -> bool {
    let Ok(folder) = folder_of(link).canonicalize() else { return false };
    folder.file_name().is_some_and(|name| name == "fd")
        && statfs(&folder).is_ok_and(|found| found.filesystem_type() == PROC_SUPER_MAGIC)
}

/// What is open under that name, to be written to.
fn open_descriptor(name: &Path) -> Result<File, JsonError> {
    let refused = |source| JsonError::Write { path: name.to_owned(), source };
    let folder = folder_of(name).canonicalize().map_err(refused)?;
    let is_own = fs::canonicalize("/proc/self/fd").is_ok_and(|own| own == folder);
    let number = name.file_name().and_then(|number| number.to_str()?.parse().ok());
    let Some(number) = number.filter(|_| is_own) else {
        // Another process's: its offset is out of reach, the end of the file is not.
        return File::options().append(true).open(name).map_err(refused);
    };
    let file = stdio::duplicate(number).map_err(refused)?;
    let flags = fcntl(&file, FcntlArg::F_GETFL).map_err(|errno| refused(errno.into()))?;
    match OFlag::from_bits_truncate(flags) & OFlag::O_ACCMODE {
        OFlag::O_RDONLY => Err(refused(nix::errno::Errno::EBADF.into())),
        _ => Ok(file),
    }
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
    use std::io::{Read, Seek, SeekFrom};
    use std::os::fd::AsRawFd;

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
    fn a_name_of_a_descriptor_is_written_to_and_nothing_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let place = |name: &str| folder.path().join(name);
        let mut file = File::create_new(place("out")).unwrap();
        writeln!(file, "before").unwrap();
        let number = file.as_raw_fd();
        // By way of a link to it, as /dev/stdout is; as a process other than this one would name it.
        std::os::unix::fs::symlink(format!("/proc/self/fd/{number}"), place("link")).unwrap();
        let mut names_of_it = vec![place("link")];
        // A bare system has no such link into /proc.
        if Path::new("/dev/fd").exists() {
            names_of_it.push(format!("/dev/fd/{number}").into());
        }
        // Last: appended to, it leaves the offset of the others where it was.
        names_of_it.push(format!("/proc/thread-self/fd/{number}").into());
        let report = super::super::tests::report();
        for path in &names_of_it {
            check_writable(path).unwrap();
            write(path, &report).unwrap();
        }
        // What follows comes behind, and the file is the one that was there.
        file.seek(SeekFrom::End(0)).unwrap();
        writeln!(file, "after").unwrap();
        let text = fs::read_to_string(place("out")).unwrap();
        let inner = text.strip_prefix("before\n").unwrap().strip_suffix("after\n").unwrap();
        let values: Vec<serde_json::Value> =
            serde_json::Deserializer::from_str(inner).into_iter().map(Result::unwrap).collect();
        assert_eq!(values.len(), names_of_it.len());
        assert!(values.iter().all(|value| value["result"] == "passed"));
        let mut found = names(folder.path());
        found.sort();
        assert_eq!(found, ["link", "out"]);
    }

    #[test]
    fn a_descriptor_may_be_a_pipe_but_not_one_to_read_from() {
        let (mut reader, writer) = io::pipe().unwrap();
        let name = |fd: i32| PathBuf::from(format!("/proc/self/fd/{fd}"));
        let path = name(writer.as_raw_fd());
        check_writable(&path).unwrap();
        let text = std::thread::scope(|scope| {
            let told = scope.spawn(move || {
                let mut text = String::new();
                reader.read_to_string(&mut text).map(|_| text)
            });
            write(&path, &super::super::tests::report()).unwrap();
            drop(writer);
            told.join().unwrap().unwrap()
        });
        assert!(text.starts_with('{') && text.ends_with("}\n"), "{text}");
        let file = File::open("/dev/null").unwrap();
        let error = check_writable(&name(file.as_raw_fd())).unwrap_err();
        assert!(matches!(error, JsonError::Write { .. }), "{error}");
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
