//! Keys that were read and that the guest has not read yet.
//!
//! Guarantee: bounded, and nothing is lost: who has more asks for room first, and is told when there is
//! some.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Condvar, Mutex};

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::sync::lock;

/// Keys that are handed to the guest at a time.
const CHUNK_KEYS: usize = 4096;

struct State {
    waiting: VecDeque<u8>,
    is_closed: bool,
}

/// See the module's documentation. One thread puts keys in, another takes them.
pub(super) struct Keys {
    state: Mutex<State>,
    arrived: Condvar,
    most: usize,
    /// Readable after keys were taken, or at the end.
    room_made: EventFd,
}

impl Keys {
    /// At most so many wait.
    pub(super) fn new(most: usize) -> io::Result<Self> {
        let room_made = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let state = Mutex::new(State { waiting: VecDeque::new(), is_closed: false });
        Ok(Self { state, arrived: Condvar::new(), most, room_made })
    }

    /// How many more may be put in. What [`Self::room_made`] told so far is forgotten: without room, it is
    /// told once there is some.
    pub(super) fn room(&self) -> usize {
        // Before the look, so that what is taken after it is told of.
        let _ = self.room_made.read();
        self.most.saturating_sub(lock(&self.state).waiting.len())
    }

    /// For a poll, see [`Self::room`].
    pub(super) fn room_made(&self) -> BorrowedFd<'_> {
        self.room_made.as_fd()
    }

    /// Puts keys in for which there is room; false if nobody will take them.
    pub(super) fn put(&self, keys: &[u8]) -> bool {
        let mut state = lock(&self.state);
        debug_assert!(state.waiting.len() + keys.len() <= self.most, "room was asked for");
        state.waiting.extend(keys);
        self.arrived.notify_one();
        !state.is_closed
    }

    /// Waits for keys and takes some; `None` at the end.
    pub(super) fn take(&self) -> Option<Vec<u8>> {
        let mut state = lock(&self.state);
        while state.waiting.is_empty() && !state.is_closed {
            state = self.arrived.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        if state.is_closed {
            return None;
        }
        let count = state.waiting.len().min(CHUNK_KEYS);
        let keys = state.waiting.drain(..count).collect();
        drop(state);
        self.tell();
        Some(keys)
    }

    /// Nobody takes keys any more.
    pub(super) fn close(&self) {
        lock(&self.state).is_closed = true;
        self.arrived.notify_all();
        self.tell();
    }

    fn tell(&self) {
        // An eventfd takes far more than there are keys.
        let _ = self.room_made.write(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_room_again_for_as_many_as_were_taken() {
        let keys = Keys::new(10_000).unwrap();
        assert_eq!(keys.room(), 10_000);
        assert!(keys.put(&[1; 9_000]) && keys.put(&[2; 1_000]));
        assert_eq!(keys.room(), 0);
        assert!(keys.room_made.read().is_err(), "nothing is told");
        assert_eq!(keys.take().unwrap(), [1; CHUNK_KEYS]);
        assert!(keys.room_made.read().is_ok());
        assert_eq!(keys.room(), CHUNK_KEYS);
        let rest = [keys.take().unwrap(), keys.take().unwrap()].concat();
        assert_eq!(rest, [&[1; 9_000 - CHUNK_KEYS][..], &[2; 1_000]].concat());
        keys.close();
        assert!(!keys.put(b"x") && keys.take().is_none());
    }
}
