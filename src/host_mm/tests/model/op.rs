//! What may happen to host memory, and how the host may go wrong, at random.

use std::num::NonZeroU64;
use std::time::Duration;

use nix::errno::Errno;
use proptest::prelude::*;

use super::PAGES;
use crate::hooks::{EINTR, FRAME_ENOMEM, SLOW_NOTIFIER, SWAP_FULL, SWAP_READ, SWAP_WRITE};
use crate::{Injection, InjectionPlan, When};
use gnomon_export_rmap::addr::PAGE_SIZE;

/// What may happen. Pages are numbered from 0; `seed` 0 is a page of zeros.
#[derive(Clone, Copy, Debug)]
pub(super) enum Op {
    /// Bring a page in, by its lock.
    FaultIn(u64),
    /// The hypervisor reads a page.
    HostRead(u64),
    /// The hypervisor writes a part of a page.
    HostWrite {
        page: u64,
        seed: u64,
        from: usize,
        to: usize,
    },
    /// A processor reads a page.
    GuestRead {
        processor: usize,
        page: u64,
    },
    /// A processor writes a page.
    GuestWrite {
        processor: usize,
        page: u64,
        seed: u64,
    },
    /// Evict a page, if it is in a frame.
    Evict(u64),
    /// Evict everything.
    EvictAll,
    /// Clean a page, if it is in a frame.
    Clean(u64),
    /// Read or write a page of a second object, which no client maps.
    OtherRead(u64),
    OtherWrite {
        page: u64,
        seed: u64,
    },
    /// Drop the second object and make a new one.
    OtherDrop,
    /// Drop the second object and make it a clone of the first.
    OtherClone,
    /// Move a page to another frame, if it is in one.
    Migrate(u64),
    /// Merge two pages, if they are in frames and the same; and a page of zeros with the shared one.
    Merge(u64, u64),
    MergeZero(u64),
    /// The guest gives a page back.
    Free(u64),
    /// Pages of the first object change places with pages of the second.
    Exchange {
        page: u64,
        other: u64,
        count: u64,
    },
    /// As above, but the second object gets copies, and the first keeps its content.
    RemapToCopies {
        page: u64,
        other: u64,
        count: u64,
    },
    /// The same of the second object: evict a page, give it back, or merge it with the first's.
    OtherEvict(u64),
    OtherFree(u64),
    OtherMerge(u64),
    /// Make the second object one that shares some pages of the first, or a clone of itself.
    OtherShare {
        page: u64,
        count: u64,
    },
    OtherCloneAgain,
    /// Start the dirty log of the first object, and ask it about some pages.
    StartLog,
    TakeLog {
        page: u64,
        count: u64,
    },
    /// Count the pages of both objects by where they are.
    Audit,
    /// Take all frames for pages of a third object, so that faults have to reclaim, and drop it.
    Pressure {
        zeros: bool,
    },
}

pub(super) fn ops() -> impl Strategy<Value = Vec<Op>> {
    let page = 0..PAGES;
    let seed = prop_oneof![1 => Just(0u64), 6 => 1..1000u64];
    let processor = 0..4usize;
    let span = (0..PAGE_SIZE, 0..=PAGE_SIZE);
    let op = prop_oneof![
        2 => page.clone().prop_map(Op::FaultIn),
        4 => page.clone().prop_map(Op::HostRead),
        4 => (page.clone(), seed.clone(), span).prop_map(|(page, seed, (a, b))| {
            Op::HostWrite { page, seed, from: a.min(b), to: a.max(b) }
        }),
        8 => (processor.clone(), page.clone())
            .prop_map(|(processor, page)| Op::GuestRead { processor, page }),
        8 => (processor, page.clone(), seed.clone())
            .prop_map(|(processor, page, seed)| Op::GuestWrite { processor, page, seed }),
        12 => page.clone().prop_map(Op::Evict),
        4 => Just(Op::EvictAll),
        4 => page.clone().prop_map(Op::Clean),
        2 => page.clone().prop_map(Op::OtherRead),
        3 => (page.clone(), seed).prop_map(|(page, seed)| Op::OtherWrite { page, seed }),
        1 => Just(Op::OtherDrop),
        2 => Just(Op::OtherClone),
        3 => page.clone().prop_map(Op::Migrate),
        3 => (page.clone(), page.clone()).prop_map(|(one, two)| Op::Merge(one, two)),
        2 => page.clone().prop_map(Op::MergeZero),
        2 => page.clone().prop_map(Op::Free),
        2 => (0..PAGES - 3, 0..PAGES - 3, 0..4u64)
            .prop_map(|(page, other, count)| Op::Exchange { page, other, count }),
        1 => (0..PAGES - 3, 0..PAGES - 3, 0..4u64)
            .prop_map(|(page, other, count)| Op::RemapToCopies { page, other, count }),
        2 => page.clone().prop_map(Op::OtherEvict),
        1 => page.clone().prop_map(Op::OtherFree),
        2 => page.clone().prop_map(Op::OtherMerge),
        1 => (page.clone(), 0..=PAGES).prop_map(|(page, count)| Op::OtherShare { page, count }),
        1 => Just(Op::OtherCloneAgain),
        1 => Just(Op::StartLog),
        3 => (page.clone(), 0..=PAGES).prop_map(|(page, count)| Op::TakeLog { page, count }),
        1 => Just(Op::Audit),
        1 => any::<bool>().prop_map(|zeros| Op::Pressure { zeros }),
    ];
    prop::collection::vec(op, 1..120)
}

/// How the host goes wrong.
#[derive(Clone, Debug)]
pub(super) enum Trouble {
    /// Swap works for so many reads and writes, then never again; the last write is torn.
    DiesAfter(u64),
    /// Faults that can be injected, and mended.
    Injected(InjectionPlan),
}

fn when() -> impl Strategy<Value = When> {
    let number = |n| NonZeroU64::new(n).unwrap_or(NonZeroU64::MIN);
    prop_oneof![
        (1..60u64).prop_map(move |n| When::Once(number(n))),
        (1..60u64, 1..5u64)
            .prop_map(move |(n, m)| When::Every { first: number(n), step: number(m) }),
        (1..50u32).prop_map(|percent| When::Chance(f64::from(percent) / 100.0)),
    ]
}

fn chance() -> impl Strategy<Value = When> {
    (1..60u32).prop_map(|percent| When::Chance(f64::from(percent) / 100.0))
}

pub(super) fn trouble() -> impl Strategy<Value = Trouble> {
    let errno = prop_oneof![Just(Errno::EIO), Just(Errno::ENOSPC), Just(Errno::ENOMEM)];
    let fault = prop_oneof![
        3 => (errno.clone(), when()).prop_map(|(errno, when)| (SWAP_WRITE.failing(errno), when)),
        3 => (errno, when()).prop_map(|(errno, when)| (SWAP_READ.failing(errno), when)),
        2 => when().prop_map(|when| (SWAP_FULL.plain(), when)),
        1 => chance().prop_map(|when| (FRAME_ENOMEM.plain(), when)),
        1 => chance().prop_map(|when| (EINTR.plain(), when)),
        1 => Just((SLOW_NOTIFIER.lasting(Duration::from_micros(50)), When::Chance(0.01))),
    ];
    let items = prop::collection::vec(fault, 0..4).prop_map(|faults| {
        faults.into_iter().map(|(fault, when)| Injection { fault, when }).collect()
    });
    prop_oneof![
        1 => (0..80u64).prop_map(Trouble::DiesAfter),
        3 => (items, any::<u64>())
            .prop_map(|(items, seed)| Trouble::Injected(InjectionPlan { items, seed, ..InjectionPlan::default() })),
    ]
}
