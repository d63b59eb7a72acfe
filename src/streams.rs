//! Sequential streams among the faults: how far to read ahead of one.
//!
//! A fault shortly after the place where an earlier one left off continues its stream, and each
//! such fault doubles what is brought in ahead of it. Any other fault starts a stream of its own,
//! in place of the one that has been quiet for longest, with nothing ahead: random access costs no
//! reads that nobody asked for.

/// Streams followed at once: vCPUs and their loops interleave.
const STREAMS: usize = 8;
/// Pages that a continuing fault may lie beyond the expected one: strides, and other vCPUs.
const SLACK_PAGES: u64 = 4;
/// Most pages ahead of a fault.
const MAX_AHEAD: usize = 16;

#[derive(Clone, Copy, Debug, Default)]
struct Stream {
    /// The page at which the next fault is expected.
    next: u64,
    ahead: usize,
    /// When the stream was last continued, in faults.
    used: u64,
}

/// The streams of one mapping of a guest's memory.
#[derive(Debug, Default)]
pub(crate) struct Streams {
    streams: [Stream; STREAMS],
    faults: u64,
}

impl Streams {
    /// Notes a fault at page `page`, counted where the faults are; how many pages after it to bring
    /// in.
    pub(crate) fn advance(&mut self, page: u64) -> usize {
        self.faults += 1;
        let continued = |stream: &&mut Stream| {
            stream.used > 0 && page.checked_sub(stream.next).is_some_and(|gap| gap <= SLACK_PAGES)
        };
        let (stream, ahead) = if let Some(stream) = self.streams.iter_mut().find(continued) {
            let ahead = (stream.ahead * 2).clamp(2, MAX_AHEAD);
            (stream, ahead)
        } else {
            let [first, rest @ ..] = &mut self.streams;
            let oldest = rest.iter_mut().fold(first, |oldest, stream| {
                if stream.used < oldest.used { stream } else { oldest }
            });
            (oldest, 0)
        };
        // The pages ahead will not fault: the stream goes on behind them.
        *stream = Stream { next: page + 1 + ahead as u64, ahead, used: self.faults };
        ahead
    }

    /// Not all was brought in ahead: the stream that was to go on at `expected` goes on at `next`.
    pub(crate) fn fell_short(&mut self, expected: u64, next: u64) {
        for stream in &mut self.streams {
            if stream.used > 0 && stream.next == expected {
                stream.next = next;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sequential_stream_reads_further_and_further_ahead() {
        let mut streams = Streams::default();
        let mut page = 100;
        let mut seen = Vec::new();
        for _ in 0..6 {
            let ahead = streams.advance(page);
            seen.push(ahead);
            page += 1 + ahead as u64;
        }
        assert_eq!(seen, [0, 2, 4, 8, 16, 16]);
    }

    #[test]
    fn a_stream_that_fell_short_goes_on_where_it_stopped() {
        let mut streams = Streams::default();
        assert_eq!((streams.advance(10), streams.advance(11), streams.advance(14)), (0, 2, 4));
        // The next fault is expected at 19, and only 15 and 16 were brought in.
        streams.fell_short(19, 17);
        assert_eq!(streams.advance(17), 8);
    }

    #[test]
    fn random_faults_read_nothing_ahead() {
        let mut streams = Streams::default();
        let ahead: usize = (0..1000u64).map(|n| streams.advance(n * 7919 % 100_003)).sum();
        assert_eq!(ahead, 0);
    }

    #[test]
    fn interleaved_streams_are_told_apart() {
        let mut streams = Streams::default();
        let mut pages = [1000u64, 50_000, 900_000];
        let mut last = [0; 3];
        for _ in 0..5 {
            for (page, last) in pages.iter_mut().zip(&mut last) {
                *last = streams.advance(*page);
                *page += 1 + *last as u64;
            }
        }
        assert_eq!(last, [16; 3]);
    }
}
