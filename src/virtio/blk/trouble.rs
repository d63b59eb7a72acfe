//! What an image's host refused, for the user: the guest gets no more than an I/O error.
//!
//! Guarantee: bounded, however many requests fail: a line for each kind of request and cause, with a
//! count.

use std::fmt;
use std::io;

use crate::sync::{Mutex, lock};

/// Kinds of trouble that are told apart; what comes after that is left out.
const MOST_KINDS: usize = 16;

/// What could not be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    Read,
    Write,
    Flush,
}

/// Requests that failed for the same cause.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskTrouble {
    op: Op,
    kind: io::ErrorKind,
    errno: Option<i32>,
    count: u64,
}

impl DiskTrouble {
    /// What is behind it, and what to do.
    fn advice(&self) -> &'static str {
        match (self.kind, self.errno) {
            (io::ErrorKind::UnexpectedEof, _) => {
                "the image is shorter than it was at the start: leave its size alone while a guest uses it"
            }
            (_, Some(libc::ENOSPC)) => {
                "the file system that the image is on is full: make room there"
            }
            (_, Some(libc::EDQUOT)) => "this user's quota is used up: make room there",
            (_, Some(libc::EFBIG)) => {
                "the image has grown to the largest that a file may be here: raise `ulimit -f`, or move it to another file system"
            }
            (_, Some(libc::EROFS)) => "the file system that the image is on has become read-only",
            (_, Some(libc::ENXIO | libc::ENODEV | libc::ENOMEDIUM)) => "the device is gone",
            _ => "look at what the host's kernel says (dmesg)",
        }
    }
}

impl fmt::Display for DiskTrouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match (self.op, self.count) {
            (Op::Read, 1) => "read",
            (Op::Read, _) => "reads",
            (Op::Write, 1) => "write",
            (Op::Write, _) => "writes",
            (Op::Flush, 1) => "flush",
            (Op::Flush, _) => "flushes",
        };
        write!(f, "{} {what} failed", self.count)?;
        if let Some(errno) = self.errno {
            write!(f, " ({})", io::Error::from_raw_os_error(errno))?;
        }
        write!(f, ": {}", self.advice())
    }
}

/// All trouble with an image, in the order in which it came.
#[derive(Default)]
pub(super) struct Troubles(Mutex<Vec<DiskTrouble>>);

impl Troubles {
    pub(super) fn add(&self, op: Op, error: &io::Error) {
        let (kind, errno) = (error.kind(), error.raw_os_error());
        let mut all = lock(&self.0);
        let is_same = |it: &&mut DiskTrouble| (it.op, it.kind, it.errno) == (op, kind, errno);
        if let Some(known) = all.iter_mut().find(is_same) {
            known.count = known.count.saturating_add(1);
        } else if all.len() < MOST_KINDS {
            all.push(DiskTrouble { op, kind, errno, count: 1 });
        }
    }

    /// One more, for the cause of the last of this kind.
    pub(super) fn again(&self, op: Op) {
        if let Some(known) = lock(&self.0).iter_mut().rfind(|it| it.op == op) {
            known.count = known.count.saturating_add(1);
        }
    }

    pub(super) fn list(&self) -> Vec<DiskTrouble> {
        lock(&self.0).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(troubles: &Troubles) -> Vec<String> {
        troubles.list().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn each_cause_has_a_line_with_its_remedy_and_no_more_however_often_it_strikes() {
        let troubles = Troubles::default();
        for _ in 0..1000 {
            troubles.add(Op::Write, &io::Error::from_raw_os_error(libc::ENOSPC));
            troubles.add(Op::Read, &io::ErrorKind::UnexpectedEof.into());
        }
        troubles.add(Op::Flush, &io::Error::from_raw_os_error(libc::EIO));
        troubles.again(Op::Flush);
        troubles.add(Op::Write, &io::Error::from_raw_os_error(libc::EFBIG));
        let said = said(&troubles);
        assert_eq!(said.len(), 4, "{said:?}");
        assert!(said[0].starts_with("1000 writes failed (No space left on device"), "{said:?}");
        assert!(said[0].contains("is full: make room"), "{said:?}");
        assert!(said[1].starts_with("1000 reads failed: the image is shorter"), "{said:?}");
        assert!(said[2].starts_with("2 flushes failed (Input/output error"), "{said:?}");
        assert!(said[3].starts_with("1 write failed (File too large"), "{said:?}");
        assert!(said[3].contains("ulimit -f"), "{said:?}");
    }

    #[test]
    fn kinds_of_trouble_are_bounded() {
        let troubles = Troubles::default();
        for errno in 1..120 {
            troubles.add(Op::Read, &io::Error::from_raw_os_error(errno));
        }
        assert_eq!(troubles.list().len(), MOST_KINDS);
        troubles.again(Op::Write);
        assert_eq!(troubles.list().len(), MOST_KINDS);
    }
}
