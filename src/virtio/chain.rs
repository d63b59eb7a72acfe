//! One buffer of a queue: what its descriptors say, read once.
//!
//! The device makes nothing of how the bytes are divided among descriptors (VIRTIO 1.2, 2.7.4.1): a
//! buffer is a string of bytes that the device reads, and one that it writes.

use virtio_queue::DescriptorChain;
use virtio_queue::desc::split::Descriptor;

use crate::addr::Gpa;
use crate::iotlb::Iotlb;

/// A string of bytes in guest memory, in pieces. Nothing says that they are guest memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Segments {
    parts: Vec<(Gpa, u32)>,
    bytes: u64,
}

impl Segments {
    fn push(&mut self, descriptor: &Descriptor) {
        self.parts.push((Gpa::new(descriptor.addr().0), descriptor.len()));
        self.bytes += u64::from(descriptor.len());
    }

    /// How many there are.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The pieces: where each begins, and its length in bytes.
    pub(super) fn parts(&self) -> &[(Gpa, u32)] {
        &self.parts
    }

    /// Where the bytes from `offset` are, at most `len` of them: address, length.
    pub(super) fn range(&self, offset: u64, len: usize) -> impl Iterator<Item = (Gpa, usize)> {
        let (mut skip, mut left) = (offset, len as u64);
        self.parts.iter().filter_map(move |&(start, bytes)| {
            let bytes = u64::from(bytes);
            let skipped = skip.min(bytes);
            skip -= skipped;
            let taken = (bytes - skipped).min(left);
            left -= taken;
            // An end past that of the address space is no guest memory: nor is the last byte of it.
            let start = start.checked_add(skipped).unwrap_or(Gpa::new(u64::MAX));
            (taken > 0).then_some((start, usize::try_from(taken).unwrap_or(usize::MAX)))
        })
    }
}

/// A buffer that the driver has made available.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Chain {
    /// Where its descriptors begin, by which it is given back.
    pub(super) head: u16,
    /// What the device reads.
    pub(super) readable: Segments,
    /// What the device writes.
    pub(super) writable: Segments,
    /// What is wrong with the descriptors after those, as the rest of a sentence.
    pub(super) fault: Option<&'static str>,
}

impl Chain {
    /// Reads the descriptors, at most as many as the queue has entries (2.7.5.3.1: not more in an
    /// indirect table either).
    pub(super) fn read(chain: DescriptorChain<&Iotlb>, queue_size: u16) -> Self {
        let mut this = Self {
            head: chain.head_index(),
            readable: Segments::default(),
            writable: Segments::default(),
            fault: None,
        };
        let mut goes_on = true;
        for (count, descriptor) in chain.enumerate() {
            if count >= usize::from(queue_size) {
                break;
            }
            goes_on = descriptor.has_next();
            if descriptor.is_write_only() {
                this.writable.push(&descriptor);
            } else if this.writable.parts.is_empty() {
                this.readable.push(&descriptor);
            } else {
                this.fault = Some("has something to read after something to write");
            }
        }
        if goes_on {
            this.fault = Some("has no end");
        }
        this
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segments(parts: &[(u64, u32)]) -> Segments {
        let mut segments = Segments::default();
        for &(start, bytes) in parts {
            segments.push(&Descriptor::new(start, bytes, 0, 0));
        }
        segments
    }

    fn range(segments: &Segments, offset: u64, len: usize) -> Vec<(u64, usize)> {
        segments.range(offset, len).map(|(gpa, len)| (gpa.as_u64(), len)).collect()
    }

    #[test]
    fn a_range_skips_and_ends_within_pieces() {
        let three = segments(&[(100, 10), (200, 0), (300, 10), (400, 10)]);
        assert_eq!(three.bytes(), 30);
        assert_eq!(range(&three, 0, 30), [(100, 10), (300, 10), (400, 10)]);
        assert_eq!(range(&three, 5, 10), [(105, 5), (300, 5)]);
        assert_eq!(range(&three, 10, 1), [(300, 1)]);
        assert_eq!(range(&three, 29, 100), [(409, 1)]);
        assert!(range(&three, 30, 1).is_empty());
        assert!(range(&three, u64::MAX, 1).is_empty());
        assert_eq!(range(&segments(&[(u64::MAX - 1, 10)]), 5, 2), [(u64::MAX, 2)]);
    }
}
