//! The book of a peer against what its table of states says.

use super::*;

const FRAME: Pfn = Pfn::new(7);
const OTHER: Pfn = Pfn::new(8);

fn holding(gfn: u64, pfn: Pfn) -> Holding {
    Holding { owner: Owner { object: 3, gfn: Gfn::new(gfn) }, pfn }
}

fn said(book: &mut Book) -> Vec<Reply> {
    let mut reader = crate::peer::protocol::ReplyReader::default();
    while !book.to_send().is_empty() {
        let bytes = book.to_send().to_vec();
        reader.push(&bytes);
        book.sent_bytes(bytes.len());
    }
    std::iter::from_fn(|| reader.take().unwrap()).collect()
}

fn hear(book: &mut Book, request: Request) -> Result<Option<Event>, Fault> {
    book.receive(&request.bytes());
    book.hear()
}

/// A book with pages 0 and 1 in slots 0 and 1, of two frames.
fn with_two() -> Book {
    let mut book = Book::new(4, vec![10]);
    let asked = hear(&mut book, Request::Map { object: 0, first: Gfn::new(0), count: 2, slot: 0 });
    assert_eq!(asked, Ok(Some(Event::Asked)));
    let job = book.take_job().unwrap();
    assert!(book.lend(job, holding(0, FRAME)) && book.lend(job, holding(1, OTHER)));
    assert!(!book.lend(job, holding(2, FRAME)), "nobody asked for it");
    assert!(!book.lend(job, holding(1, FRAME)), "it has its answer");
    book.answer(job);
    assert_eq!(said(&mut book).len(), 2);
    book
}

#[test]
fn a_flush_waits_for_what_came_from_its_frames_alone() {
    let mut book = with_two();
    let now = Instant::now();
    assert_eq!(book.announce(&[FRAME], now), None, "nothing was dropped");
    book.drop_held(0);
    assert_eq!(book.announce(&[OTHER], now), None, "not its frame");
    assert_eq!(book.announce(&[FRAME, OTHER], now), Some((1, true)));
    assert_eq!(said(&mut book), [Reply::Invalidate { sequence: 1, slots: vec![0] }]);
    assert_eq!(book.announce(&[FRAME], now), Some((1, false)), "another thread's flush waits, too");
    book.drop_held(1);
    assert_eq!(book.announce(&[FRAME], now), Some((1, false)));
    assert_eq!(book.announce(&[OTHER], now), Some((2, true)));
    assert_eq!(said(&mut book).len(), 1);
    assert_eq!(hear(&mut book, Request::Ack { sequence: 2 }), Err(Fault::OutOfTurn(2)));
    let Ok(Some(Event::Acked(batch))) = hear(&mut book, Request::Ack { sequence: 1 }) else {
        panic!("in turn")
    };
    book.freed(&batch);
    assert_eq!(book.done(), 1);
    assert_eq!(book.announce(&[FRAME], now), None);
    assert_eq!(said(&mut book), [Reply::Freed { sequence: 1 }]);
}

#[test]
fn an_unmap_that_crosses_an_invalidation_changes_nothing() {
    let mut book = with_two();
    book.drop_held(0);
    book.announce(&[FRAME], Instant::now());
    said(&mut book);
    let released = hear(&mut book, Request::Unmap { slot: 0, count: 2 });
    assert_eq!(released, Ok(Some(Event::Released(0..2))));
    assert_eq!((book.held(0), book.held(1)), (None, Some(holding(1, OTHER))));
    book.released(0);
    book.released(1);
    assert_eq!(said(&mut book), [Reply::Unmapped { slot: 1 }], "slot 0 waits for its turn");
    let map = Request::Map { object: 0, first: Gfn::new(5), count: 1, slot: 0 };
    assert_eq!(hear(&mut book, map), Err(Fault::InUse(0)));
}

#[test]
fn what_is_not_lent_is_refused() {
    let mut book = Book::new(4, vec![10]);
    let map = |first, slot| Request::Map { object: 0, first: Gfn::new(first), count: 2, slot };
    hear(&mut book, map(8, 0)).unwrap();
    hear(&mut book, map(9, 2)).unwrap();
    let refused = |slot, gfn, why| Reply::Refused { slot, gfn: Gfn::new(gfn), why };
    assert_eq!(
        said(&mut book),
        [refused(2, 9, Refusal::Outside), refused(3, 10, Refusal::Outside)]
    );
    let job = book.take_job().unwrap();
    assert_eq!(book.take_job(), None);
    assert!(book.lend(job, holding(9, FRAME)));
    book.answer(job);
    assert_eq!(said(&mut book)[1], refused(0, 8, Refusal::Unavailable));
    hear(&mut book, map(0, 2)).unwrap();
}

/// The peer gives a page up and asks for another in its slot while the job that lent it goes on.
#[test]
fn a_job_answers_no_later_request_for_its_slots() {
    for second in [7, 0] {
        let mut book = Book::new(4, vec![10]);
        let map = |first, count| Request::Map { object: 0, first: Gfn::new(first), count, slot: 0 };
        hear(&mut book, map(0, 2)).unwrap();
        let first_job = book.take_job().unwrap();
        assert!(book.lend(first_job, holding(0, FRAME)));
        hear(&mut book, Request::Unmap { slot: 0, count: 1 }).unwrap();
        book.released(0);
        // Another page, or the same once more.
        hear(&mut book, map(second, 1)).unwrap();
        assert_eq!(book.wanted(first_job, Gfn::new(0)), None, "it has its answer");
        said(&mut book);
        book.answer(first_job);
        let refused = Reply::Refused { slot: 1, gfn: Gfn::new(1), why: Refusal::Unavailable };
        assert_eq!(said(&mut book), [refused], "its own page alone");
        let second_job = book.take_job().unwrap();
        assert!(book.lend(second_job, holding(second, OTHER)));
        book.answer(second_job);
        let mapped = Reply::Mapped { slot: 0, object: 0, gfn: Gfn::new(second) };
        assert_eq!(said(&mut book), [mapped]);
    }
}

#[test]
fn a_closed_book_is_empty_and_says_so_last() {
    let mut book = with_two();
    book.drop_held(0);
    let (sequence, _) = book.announce(&[FRAME], Instant::now()).unwrap();
    book.close(Closing::TooSlow);
    assert_eq!(book.all_held().count(), 0);
    assert_eq!(book.done(), sequence, "nobody waits any more");
    assert_eq!(said(&mut book).last(), Some(&Reply::Closed { why: Closing::TooSlow }));
}
