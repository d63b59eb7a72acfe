//! Every message survives the wire, and nothing else passes for one.

use proptest::prelude::*;

use super::*;

fn request() -> impl Strategy<Value = Request> {
    prop_oneof![
        (any::<u32>(), 0..MAX_GFN, 1..=MAX_MAP_PAGES, any::<u32>()).prop_map(
            |(object, first, count, slot)| Request::Map {
                object,
                first: Gfn::new(first),
                count,
                slot
            }
        ),
        (any::<u32>(), 1u32..).prop_map(|(slot, count)| Request::Unmap { slot, count }),
        any::<u64>().prop_map(|sequence| Request::Ack { sequence }),
        Just(Request::Bye),
    ]
}

fn reply() -> impl Strategy<Value = Reply> {
    let gfn = || (0..MAX_GFN).prop_map(Gfn::new);
    prop_oneof![
        any::<(u32, u32, u32)>().prop_map(|(objects, slots, limit_ms)| Reply::Hello {
            objects,
            slots,
            limit_ms
        }),
        any::<(u32, u64)>().prop_map(|(object, pages)| Reply::Info { object, pages }),
        any::<(u32, [u64; 2])>().prop_map(|(object, note)| Reply::Note { object, note }),
        (any::<u32>(), any::<u32>(), gfn()).prop_map(|(slot, object, gfn)| Reply::Mapped {
            slot,
            object,
            gfn
        }),
        (any::<u32>(), gfn(), 1..=2u64).prop_map(|(slot, gfn, why)| {
            Reply::Refused { slot, gfn, why: Refusal::from_code(why).unwrap() }
        }),
        (any::<u64>(), prop::collection::vec(any::<u32>(), 0..70))
            .prop_map(|(sequence, slots)| Reply::Invalidate { sequence, slots }),
        any::<u64>().prop_map(|sequence| Reply::Freed { sequence }),
        any::<u32>().prop_map(|slot| Reply::Unmapped { slot }),
        (1..=10u64).prop_map(|why| Reply::Closed { why: Closing::from_code(why).unwrap() }),
    ]
}

#[test]
fn a_request_whose_last_page_cannot_be_named_is_none() {
    let map = |first, count| Request::Map { object: 0, first: Gfn::new(first), count, slot: 0 };
    assert_eq!(Request::parse(&map(MAX_GFN - 2, 2).bytes()), Ok(map(MAX_GFN - 2, 2)));
    Request::parse(&map(MAX_GFN - 2, 3).bytes()).unwrap_err();
    Request::parse(&map(u64::MAX, 2).bytes()).unwrap_err();
}

proptest! {
    #[test]
    fn requests_survive_the_wire(request in request()) {
        prop_assert_eq!(Request::parse(&request.bytes()), Ok(request));
    }

    /// Whatever parses is what those bytes are written for: no bit is ignored.
    #[test]
    fn no_other_bytes_are_a_request(request in request(), at in 0..MESSAGE_BYTES, flip in 1u8..) {
        let mut bytes = request.bytes();
        bytes[at] ^= flip;
        if let Ok(other) = Request::parse(&bytes) {
            prop_assert_ne!(other, request);
            prop_assert_eq!(other.bytes(), bytes);
        }
    }

    #[test]
    fn replies_survive_the_wire_in_pieces(
        replies in prop::collection::vec(reply(), 1..8),
        cut in 1..100usize,
    ) {
        let mut bytes = Vec::new();
        replies.iter().for_each(|reply| reply.write(&mut bytes));
        let mut reader = ReplyReader::default();
        let mut found = Vec::new();
        for piece in bytes.chunks(cut) {
            reader.push(piece);
            while let Some(reply) = reader.take().unwrap() {
                found.push(reply);
            }
        }
        prop_assert_eq!(found, replies);
    }

    #[test]
    fn any_bytes_are_replies_that_are_written_so_or_none(
        bytes in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let mut reader = ReplyReader::default();
        reader.push(&bytes);
        let mut again = Vec::new();
        while let Ok(Some(reply)) = reader.take() {
            reply.write(&mut again);
        }
        prop_assert_eq!(&again[..], &bytes[..again.len()]);
    }
}

#[test]
fn what_cannot_be_is_no_message() {
    let map = Request::Map { object: 0, first: Gfn::new(1), count: 1, slot: 0 };
    for (at, byte) in [(0, 0), (0, 9), (4, 0), (4, 65), (23, 0x10), (24, 1)] {
        let mut bytes = map.bytes();
        bytes[at] = byte;
        assert!(Request::parse(&bytes).is_err(), "byte {at} is {byte}");
    }
    let mut hello = Vec::new();
    Reply::Hello { objects: 1, slots: 8, limit_ms: 5 }.write(&mut hello);
    for at in 8..24 {
        let mut reader = ReplyReader::default();
        let mut bytes = hello.clone();
        bytes[at] ^= 1;
        reader.push(&bytes);
        assert!(reader.take().is_err(), "magic, version and page size are these alone");
    }
    let mut reader = ReplyReader::default();
    reader.push(&Fields { kind: 5, count: u32::MAX, words: [1, 0, 0] }.bytes());
    assert!(reader.take().is_err(), "not waited for");
}
