//! The messages between a peer and the process that lends it pages, as bytes.
//!
//! Guarantee: [`Request::parse`] and [`ReplyReader`] take any bytes and either return a message that
//! serialises to the same bytes, or say that they are none. Nothing here does I/O or keeps more than
//! one message.
//!
//! Each message is 32 bytes, little-endian: `u32` kind, `u32` count, three `u64`. Only
//! [`Reply::Invalidate`] has more: as many `u32` as its count says. Fields without a meaning are
//! zero. docs/peer-protocol.md has them in a table.

use crate::addr::Gfn;

/// First word of [`Reply::Hello`].
pub const MAGIC: u64 = u64::from_le_bytes(*b"GnomonPr");
/// Version of this protocol; others are not spoken.
pub const VERSION: u32 = 2;
/// Bytes of a message, but for the slots of an invalidation.
pub const MESSAGE_BYTES: usize = 32;
/// Most pages of one [`Request::Map`].
pub const MAX_MAP_PAGES: u32 = 64;
/// Most [`Request::Map`] that may be unanswered at a time.
pub const MAX_REQUESTS: usize = 16;
/// Most slots of one [`Reply::Invalidate`].
pub const MAX_NAMED_SLOTS: usize = 1 << 16;

/// What a peer says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Lend `count` pages of memory object `object` from `first`, into the slots from `slot`.
    Map {
        /// Number of the memory object, from 0.
        object: u32,
        /// First page.
        first: Gfn,
        /// Number of pages, 1 to [`MAX_MAP_PAGES`].
        count: u32,
        /// Slot for the first of them; all must be free.
        slot: u32,
    },
    /// The peer has given up `count` slots from `slot` of its own accord.
    Unmap {
        /// First slot.
        slot: u32,
        /// Number of slots, at least 1.
        count: u32,
    },
    /// The peer has given up the slots of the invalidation of this number.
    Ack {
        /// Of [`Reply::Invalidate`].
        sequence: u64,
    },
    /// The peer leaves; nothing follows.
    Bye,
}

/// Two numbers that are nothing to the protocol: see [`Reply::Note`].
pub type Note = [u64; 2];

/// What a peer is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// First of all, with the descriptor of the file that pages are lent in.
    Hello {
        /// Memory objects that pages can be had of.
        objects: u32,
        /// Slots of the file, one page each.
        slots: u32,
        /// Time in which an invalidation must be acknowledged, in milliseconds.
        limit_ms: u32,
    },
    /// About a memory object.
    Info {
        /// Its number.
        object: u32,
        /// Its size in pages.
        pages: u64,
    },
    /// What those who serve a memory object have to say of it to those who know what it means; comes again
    /// when it changes. Nothing in the protocol depends on it.
    Note {
        /// The object's number.
        object: u32,
        /// What is said.
        note: Note,
    },
    /// The slot holds the page.
    Mapped {
        /// The slot.
        slot: u32,
        /// Memory object.
        object: u32,
        /// Page.
        gfn: Gfn,
    },
    /// The page cannot be had; the slot is free.
    Refused {
        /// The slot.
        slot: u32,
        /// Page.
        gfn: Gfn,
        /// Why.
        why: Refusal,
    },
    /// Give these slots up, then acknowledge.
    Invalidate {
        /// One more than that of the last.
        sequence: u64,
        /// The slots, at most [`MAX_NAMED_SLOTS`].
        slots: Vec<u32>,
    },
    /// The slots of that invalidation are empty and free.
    Freed {
        /// Of [`Reply::Invalidate`].
        sequence: u64,
    },
    /// The slot that was given up with [`Request::Unmap`] is empty and free.
    Unmapped {
        /// The slot.
        slot: u32,
    },
    /// The connection ends: every slot is empty.
    Closed {
        /// Why.
        why: Closing,
    },
}

macro_rules! codes {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $code:literal, $text:literal;)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name {
            $($(#[$variant_doc])* $variant = $code,)*
        }

        impl $name {
            fn from_code(code: u64) -> Option<Self> {
                match code {
                    $($code => Some(Self::$variant),)*
                    _ => None,
                }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(match self {
                    $(Self::$variant => $text,)*
                })
            }
        }
    };
}

codes! {
    /// Why a page cannot be had.
    Refusal {
        /// There is no such memory object, or it has no such page.
        Outside = 1, "there is no such page";
        /// The host has no frame for it or cannot read it back.
        Unavailable = 2, "the host cannot bring the page in";
    }
}

codes! {
    /// Why a connection ends.
    Closing {
        /// The run is over.
        EndOfRun = 1, "the run is over";
        /// The peer said that it leaves.
        Left = 2, "it left";
        /// The peer's end of the socket is closed.
        HungUp = 3, "it hung up without a word";
        /// The peer did not acknowledge an invalidation in time.
        TooSlow = 4, "it did not acknowledge an invalidation in time";
        /// The peer said something that it must not say.
        Malformed = 5, "it broke the protocol";
        /// The peer does not read what it is told.
        Unread = 6, "it does not read its socket";
        /// A peer of another user.
        OtherUser = 7, "it belongs to another user";
        /// No further peer can be served.
        TooMany = 8, "there are too many peers";
        /// `--inject peer-kill`.
        Injected = 9, "an injected fault dropped it";
        /// The host has no thread, file or socket for it.
        Trouble = 10, "the host cannot serve it";
    }
}

/// Bytes that are no message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a message of kind {kind} with count {count} does not exist or has fields that cannot be")]
pub struct NotAMessage {
    /// Its first field.
    pub kind: u32,
    /// Its second field.
    pub count: u32,
}

/// A message as its fields.
#[derive(Clone, Copy)]
struct Fields {
    kind: u32,
    count: u32,
    words: [u64; 3],
}

impl Fields {
    fn parse(bytes: &[u8; MESSAGE_BYTES]) -> Self {
        let word = |index: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[8 * index..8 * index + 8]);
            u64::from_le_bytes(word)
        };
        let (kind, count) = halves(word(0));
        Self { kind, count, words: [word(1), word(2), word(3)] }
    }

    fn bytes(self) -> [u8; MESSAGE_BYTES] {
        let mut bytes = [0; MESSAGE_BYTES];
        let words = [join(self.kind, self.count), self.words[0], self.words[1], self.words[2]];
        for (chunk, word) in bytes.chunks_exact_mut(8).zip(words) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    fn wrong(self) -> NotAMessage {
        NotAMessage { kind: self.kind, count: self.count }
    }
}

/// Lower and upper half.
#[allow(clippy::cast_possible_truncation)]
const fn halves(word: u64) -> (u32, u32) {
    (word as u32, (word >> 32) as u32)
}

const fn join(low: u32, high: u32) -> u64 {
    low as u64 | (high as u64) << 32
}

/// Page numbers have 52 bits at most, whatever the object.
const MAX_GFN: u64 = 1 << 52;

fn page(raw: u64) -> Option<Gfn> {
    (raw < MAX_GFN).then(|| Gfn::new(raw))
}

impl Request {
    /// The message in these bytes.
    ///
    /// # Errors
    /// [`NotAMessage`].
    pub fn parse(bytes: &[u8; MESSAGE_BYTES]) -> Result<Self, NotAMessage> {
        let fields = Fields::parse(bytes);
        let Fields { kind, count, words: [a, b, c] } = fields;
        let (low, high) = halves(a);
        let request = match (kind, b, c) {
            (1, _, 0) if (1..=MAX_MAP_PAGES).contains(&count) => {
                // Each of its pages must have an answer that is a message.
                let last = b.checked_add(u64::from(count) - 1).and_then(page);
                last.map(|_| Self::Map { object: low, first: Gfn::new(b), count, slot: high })
            }
            (2, 0, 0) if count > 0 && high == 0 => Some(Self::Unmap { slot: low, count }),
            (3, 0, 0) if count == 0 => Some(Self::Ack { sequence: a }),
            (4, 0, 0) if count == 0 && a == 0 => Some(Self::Bye),
            _ => None,
        };
        request.ok_or(fields.wrong())
    }

    /// The message as bytes.
    #[must_use]
    pub fn bytes(self) -> [u8; MESSAGE_BYTES] {
        let (kind, count, words) = match self {
            Self::Map { object, first, count, slot } => {
                (1, count, [join(object, slot), first.as_u64(), 0])
            }
            Self::Unmap { slot, count } => (2, count, [slot.into(), 0, 0]),
            Self::Ack { sequence } => (3, 0, [sequence, 0, 0]),
            Self::Bye => (4, 0, [0; 3]),
        };
        Fields { kind, count, words }.bytes()
    }
}

impl Reply {
    /// Puts the message's bytes at the end of `out`.
    pub fn write(&self, out: &mut impl Extend<u8>) {
        let (kind, count, words) = match *self {
            Self::Hello { objects, slots, limit_ms } => {
                (1, objects, [MAGIC, join(VERSION, PAGE_BYTES), join(slots, limit_ms)])
            }
            Self::Info { object, pages } => (2, object, [pages, 0, 0]),
            Self::Mapped { slot, object, gfn } => (3, object, [slot.into(), gfn.as_u64(), 0]),
            Self::Refused { slot, gfn, why } => (4, 0, [slot.into(), gfn.as_u64(), why as u64]),
            Self::Invalidate { sequence, ref slots } => {
                // Bounded by the session: it has no more slots.
                (5, u32::try_from(slots.len()).unwrap_or(u32::MAX), [sequence, 0, 0])
            }
            Self::Freed { sequence } => (6, 0, [sequence, 0, 0]),
            Self::Unmapped { slot } => (7, 0, [slot.into(), 0, 0]),
            Self::Closed { why } => (8, 0, [why as u64, 0, 0]),
            Self::Note { object, note: [first, second] } => (9, object, [first, second, 0]),
        };
        out.extend(Fields { kind, count, words }.bytes());
        if let Self::Invalidate { slots, .. } = self {
            out.extend(slots.iter().flat_map(|slot| slot.to_le_bytes()));
        }
    }

    /// The message in these fields; `slots` are those that followed.
    fn parse(fields: Fields, slots: Vec<u32>) -> Option<Self> {
        let Fields { kind, count, words: [a, b, c] } = fields;
        let (slot, rest) = halves(a);
        let is_slot = rest == 0;
        match kind {
            1 if a == MAGIC && b == join(VERSION, PAGE_BYTES) => {
                let (slots, limit_ms) = halves(c);
                Some(Self::Hello { objects: count, slots, limit_ms })
            }
            2 if b == 0 && c == 0 => Some(Self::Info { object: count, pages: a }),
            3 if is_slot && c == 0 => Some(Self::Mapped { slot, object: count, gfn: page(b)? }),
            4 if is_slot && count == 0 => {
                Some(Self::Refused { slot, gfn: page(b)?, why: Refusal::from_code(c)? })
            }
            5 if b == 0 && c == 0 => Some(Self::Invalidate { sequence: a, slots }),
            6 if count == 0 && b == 0 && c == 0 => Some(Self::Freed { sequence: a }),
            7 if is_slot && count == 0 && b == 0 && c == 0 => Some(Self::Unmapped { slot }),
            8 if count == 0 && b == 0 && c == 0 => {
                Some(Self::Closed { why: Closing::from_code(a)? })
            }
            9 if c == 0 => Some(Self::Note { object: count, note: [a, b] }),
            _ => None,
        }
    }
}

/// Page size, as it is told.
const PAGE_BYTES: u32 = 4096;
const KIND_INVALIDATE: u32 = 5;

/// Cuts a stream of bytes into replies.
#[derive(Debug, Default)]
pub struct ReplyReader(Vec<u8>);

impl ReplyReader {
    /// Adds what was received.
    pub fn push(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// The next message, if all of it is there.
    ///
    /// # Errors
    /// [`NotAMessage`]; nothing after that can be understood.
    pub fn take(&mut self) -> Result<Option<Reply>, NotAMessage> {
        let Some(head) = self.0.first_chunk::<MESSAGE_BYTES>() else {
            return Ok(None);
        };
        let fields = Fields::parse(head);
        let named = if fields.kind == KIND_INVALIDATE { fields.count as usize } else { 0 };
        if named > MAX_NAMED_SLOTS {
            return Err(fields.wrong());
        }
        let length = MESSAGE_BYTES + named * size_of::<u32>();
        if self.0.len() < length {
            return Ok(None);
        }
        let slot =
            |chunk: &[u8]| chunk.iter().rev().fold(0, |all, &byte| all << 8 | u32::from(byte));
        let slots = self.0[MESSAGE_BYTES..length].chunks_exact(4).map(slot).collect();
        self.0.drain(..length);
        Reply::parse(fields, slots).map(Some).ok_or(fields.wrong())
    }
}

#[cfg(test)]
#[path = "protocol_tests.rs"]
mod tests;
