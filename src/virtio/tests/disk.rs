//! A disk that remembers what is durable, and fails, stutters or waits as it is told.

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Condvar, Mutex};

use crate::sync::lock;
use crate::virtio::{Block, Disk, DiskMode};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    Read,
    Write,
    Sync,
}

#[derive(Default)]
pub(super) struct State {
    pub(super) content: Vec<u8>,
    /// What would be left after a power failure.
    pub(super) durable: Vec<u8>,
    /// What was done, without repetitions of reads or writes one after the other.
    pub(super) log: Vec<Op>,
    /// Fails with this errno.
    pub(super) fail: Option<(Op, i32)>,
    /// At most so many bytes at a time, and interrupted before each.
    pub(super) short: Option<usize>,
    interrupted: bool,
    /// Waits before it does this.
    pub(super) held: Option<Op>,
    /// Somebody waits.
    pub(super) is_waiting: bool,
}

/// See the module's documentation.
#[derive(Clone, Default)]
pub(super) struct TestDisk {
    state: Arc<(Mutex<State>, Condvar)>,
}

impl TestDisk {
    pub(super) fn new(content: Vec<u8>) -> Self {
        let this = Self::default();
        this.set(|state| {
            state.durable.clone_from(&content);
            state.content = content;
        });
        this
    }

    pub(super) fn block(&self) -> Arc<Block> {
        let bytes = lock(&self.state.0).content.len() as u64;
        Arc::new(Block::on(Box::new(self.clone()), bytes, DiskMode::ReadWrite, ""))
    }

    pub(super) fn set<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let changed = change(&mut lock(&self.state.0));
        self.state.1.notify_all();
        changed
    }

    /// Does one thing; `act` is told how many bytes at most.
    fn act<T>(
        &self,
        op: Op,
        act: impl FnOnce(&mut State, usize) -> io::Result<T>,
    ) -> io::Result<T> {
        let mut state = lock(&self.state.0);
        while state.held == Some(op) {
            state.is_waiting = true;
            state = self.state.1.wait(state).unwrap();
        }
        state.is_waiting = false;
        if let Some((_, errno)) = state.fail.filter(|&(failing, _)| failing == op) {
            return Err(io::Error::from_raw_os_error(errno));
        }
        if state.short.is_some() && op != Op::Sync && !state.interrupted {
            state.interrupted = true;
            return Err(io::ErrorKind::Interrupted.into());
        }
        state.interrupted = false;
        if state.log.last() != Some(&op) || op == Op::Sync {
            state.log.push(op);
        }
        let most = state.short.unwrap_or(usize::MAX);
        act(&mut state, most)
    }
}

impl FileExt for TestDisk {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.act(Op::Read, |state, most| {
            let rest = &state.content[usize::try_from(offset).unwrap()..];
            let len = buf.len().min(rest.len()).min(most);
            buf[..len].copy_from_slice(&rest[..len]);
            Ok(len)
        })
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize> {
        self.act(Op::Write, |state, most| {
            let len = buf.len().min(most);
            let at = usize::try_from(offset).unwrap();
            state.content[at..at + len].copy_from_slice(&buf[..len]);
            Ok(len)
        })
    }
}

impl Disk for TestDisk {
    fn sync(&self) -> io::Result<()> {
        self.act(Op::Sync, |state, _| {
            state.durable.clone_from(&state.content);
            Ok(())
        })
    }
}
