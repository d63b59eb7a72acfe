//! Random guests, well-behaved or not, against the model.

use proptest::prelude::*;

use crate::addr::{Gva, PAGE_SIZE_U64};
use crate::shadow_mmu::Access;
use crate::shadow_mmu::reference::machine::{
    ACCESSED, DIRTY, NO_EXECUTE, PAGE_SIZE_BIT, PHYS_BITS, PRESENT, RAM_BYTES, WINDOW_GFN,
    WRITABLE, config, gva,
};
use crate::shadow_mmu::reference::rig::Rig;
use crate::shadow_mmu::reference::step::{At, Change, POOL, ROOTS, Step, Then};

fn any_at() -> impl Strategy<Value = At> {
    prop_oneof![Just(None), any_gva().prop_map(Some)]
}

fn any_gva() -> impl Strategy<Value = Gva> {
    let pick = |indices: &'static [u64]| prop::sample::select(indices);
    let offset = prop::sample::select(&[0u64, 8, 4088]);
    (pick(&[0, 0, 3, 256]), pick(&[0, 1]), pick(&[0, 1]), pick(&[0, 1, 2, 17]), offset)
        .prop_map(|(l4, l3, l2, l1, offset)| Gva::new(gva([l4, l3, l2, l1]).as_u64() + offset))
}

/// An entry that may lead anywhere.
fn any_entry() -> impl Strategy<Value = u64> {
    let gib = RAM_BYTES / 4;
    let target = prop_oneof![
        4 => (0..9u64).prop_map(|table| table * PAGE_SIZE_U64),
        5 => (16..POOL).prop_map(|data| data * PAGE_SIZE_U64),
        2 => (0..3u64).prop_map(|page| page << 21 | PAGE_SIZE_BIT),
        2 => (0..5u64).prop_map(move |page| (page * gib) | PAGE_SIZE_BIT),
        1 => (0..4u64).prop_map(|page| RAM_BYTES + page * PAGE_SIZE_U64),
        2 => (0..5u64).prop_map(|page| WINDOW_GFN.base().as_u64() + page * PAGE_SIZE_U64),
    ];
    let flag =
        |weight: u32, flag: u64| prop_oneof![weight => Just(flag), 10 - weight => Just(0u64)];
    let flags = (
        flag(9, PRESENT),
        flag(7, WRITABLE),
        flag(3, NO_EXECUTE),
        flag(5, ACCESSED),
        flag(4, DIRTY),
        (flag(1, PAGE_SIZE_BIT), flag(1, 1 << PHYS_BITS), flag(1, 1 << 14), flag(1, 1 << 12)),
    );
    (target, flags).prop_map(|(target, (p, w, x, a, d, (size, phys, low, pat)))| {
        target ^ size ^ low ^ pat | p | w | x | a | d | phys
    })
}

fn any_access() -> impl Strategy<Value = Access> {
    prop::sample::select(&[Access::Read, Access::Write, Access::Execute])
}

/// Values that are no present entries, unless they are meant to be entries.
fn any_value() -> impl Strategy<Value = u64> {
    prop_oneof![3 => any::<u64>().prop_map(|value| value & !PRESENT), 1 => any_entry()]
}

fn any_step() -> impl Strategy<Value = Step> {
    let then = prop_oneof![
        Just(Then::Nothing),
        any_access().prop_map(Then::Access),
        prop::sample::select(&[0u64, 1, 2, 17]).prop_map(Then::Invlpg),
        Just(Then::LoadRoot)
    ];
    let flags = [PRESENT, WRITABLE, NO_EXECUTE, ACCESSED, DIRTY, PAGE_SIZE_BIT];
    let change = prop_oneof![
        any_entry().prop_map(Change::To),
        (16..POOL).prop_map(|data| Change::Address(data * PAGE_SIZE_U64)),
        prop::sample::select(flags.to_vec()).prop_map(Change::Flip),
    ];
    let index = prop::sample::select(&[0usize, 1, 2, 3, 17, 256]);
    prop_oneof![
        10 => (any_at(), any_access(), any_value())
            .prop_map(|(at, access, value)| Step::Access(at, access, value)),
        4 => (prop::sample::select(&[1u64, 2, 16]), any_access())
            .prop_map(|(distance, access)| Step::Beside(distance, access)),
        2 => (any_at(), any_access(), any_value())
            .prop_map(|(at, access, value)| Step::Virtual(at, access, value)),
        2 => (1..9u64, index, any_entry())
            .prop_map(|(table, index, entry)| Step::Edit(table, index, entry)),
        6 => (any_at(), prop::sample::select(&[0usize, 1, 2, 3, 3]), change, then)
            .prop_map(|(at, depth, change, then)| Step::EditPath(at, depth, change, then)),
        1 => any_at().prop_map(Step::Invlpg),
        1 => (0..ROOTS.len()).prop_map(Step::LoadRoot),
        1 => any::<(bool, bool)>().prop_map(|(wp, nxe)| Step::Control(wp, nxe)),
        3 => (0..POOL).prop_map(Step::Evict),
        1 => Just(Step::EvictAll),
        3 => (0..POOL).prop_map(Step::Clean),
        1 => Just(Step::CleanAll),
        2 => (0..POOL).prop_map(Step::Age),
        1 => Just(Step::Recycle),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn any_guest_finds_what_its_tables_say(
        shadow_pages in prop::sample::select(&[12u32, 64]),
        steps in prop::collection::vec(any_step(), 1..80),
    ) {
        let mut rig = Rig::new(config(), shadow_pages);
        for step in &steps {
            rig.run(step);
            rig.audit();
        }
        rig.finish();
    }
}
