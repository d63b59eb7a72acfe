//! Random guests, well-behaved or not, against the model.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;

use proptest::prelude::*;

use crate::addr::{Gpa, Gva, PAGE_SIZE_U64};
use crate::host_mm::HostMmConfig;
use crate::shadow_mmu::reference::machine::{
    ACCESSED, ADDRESS, DIRTY, Machine, NO_EXECUTE, PAGE_SIZE_BIT, PHYS_BITS, PRESENT, RAM_BYTES,
    WINDOW_GFN, WRITABLE, config, gva,
};
use crate::shadow_mmu::reference::memory::{MAX_SHADOW_PAGES, Memory};
use crate::shadow_mmu::reference::rig::Rig;
use crate::shadow_mmu::reference::step::{At, Change, HostStep, POOL, ROOTS, Step, Then};
use crate::shadow_mmu::{Access, LoadRoot, PagingContext};

/// Of the root that a rig starts with.
const FIRST_CONTEXT: PagingContext =
    PagingContext { cr3: Gpa::new(ROOTS[0] * PAGE_SIZE_U64), write_protect: true, nxe: true };

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
        6 => any_host_step().prop_map(Step::Host),
    ]
}

fn any_host_step() -> impl Strategy<Value = HostStep> {
    let page = 0..POOL;
    let range = (page.clone(), page.clone(), 1..5u64);
    let word = prop::sample::select(&[0usize, 1, 2, 17, 511]);
    prop_oneof![
        2 => page.clone().prop_map(HostStep::Migrate),
        2 => (page.clone(), page.clone()).prop_map(|(one, two)| HostStep::Merge(one, two)),
        1 => page.clone().prop_map(HostStep::MergeWithOther),
        2 => page.clone().prop_map(HostStep::MergeZero),
        1 => page.clone().prop_map(HostStep::Reclaim),
        1 => page.clone().prop_map(HostStep::EvictOther),
        1 => Just(HostStep::StartLog),
        1 => (page.clone(), 1..POOL).prop_map(|(first, count)| {
            HostStep::TakeLog(first, count.min(POOL - first))
        }),
        1 => page.clone().prop_map(HostStep::ReadOther),
        1 => range.clone().prop_map(|(to, from, count)| HostStep::RemapToCopies(to, from, count)),
        2 => Just(HostStep::Clone),
        1 => Just(HostStep::Renew),
        2 => (page.clone(), word, any_value())
            .prop_map(|(page, index, value)| HostStep::WriteOther(page, index, value)),
        1 => page.prop_map(HostStep::Free),
        1 => range.prop_map(|(to, from, count)| HostStep::Exchange(to, from, count)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn any_guest_finds_what_its_tables_say(
        shadow_pages in prop::sample::select(&[12u32, 64]),
        share_zero: bool,
        steps in prop::collection::vec(any_step(), 1..80),
    ) {
        let mut rig = Rig::new(HostMmConfig { share_zero, ..config() }, shadow_pages);
        for step in &steps {
            rig.run(step);
            rig.audit();
        }
        rig.finish();
    }

    /// As above on memory that guests have one after the other, where frames are so few that faults
    /// reclaim. It holds nothing of a guest that is gone.
    #[test]
    fn memory_that_many_guests_had_is_as_new(
        guests in prop::collection::vec(
            (any::<bool>(), prop::collection::vec(any_step(), 1..60)),
            1..4,
        ),
    ) {
        let memory = Memory::new();
        for (share_zero, steps) in &guests {
            let config = HostMmConfig { share_zero: *share_zero, ..config() };
            let mut rig = Rig::on(&memory, config, MAX_SHADOW_PAGES);
            for step in steps {
                rig.run(step);
                rig.audit();
            }
            rig.finish_on(&memory);
            prop_assert!(memory.is_pristine());
        }
    }
}

/// Everything that a guest may leave is noticed when its memory is to go to the next one.
#[test]
fn memory_of_a_guest_that_is_not_gone_is_not_given_to_the_next() {
    type Leave = fn(&Machine);
    let leaves: [(bool, Leave); 3] = [
        (true, |_| {}),
        (false, |machine| std::mem::forget(machine.object().clone())),
        (false, |machine| std::mem::forget(machine.mm.clone())),
    ];
    for (is_gone, leave) in leaves {
        let memory = Memory::new();
        let machine = Machine::on(&memory, config(), 12);
        machine.set_entry(1, 0, 1);
        leave(&machine);
        let mm = machine.mm.clone();
        let reset = catch_unwind(AssertUnwindSafe(|| {
            drop(machine);
            memory.reset(mm);
        }));
        assert_eq!(reset.is_ok(), is_gone);
        assert_eq!(memory.is_pristine(), is_gone);
    }
}

/// The two ways in which a shared page could be written are noticed: an SPTE that allows it, and a
/// page of zeros that is no longer.
#[test]
fn a_shared_page_that_may_be_written_is_noticed() {
    let config = || HostMmConfig { share_zero: true, ..config() };
    let read = Step::Access(Some(gva([0, 0, 0, 0])), Access::Read, 0);
    let audited = |spoil: &dyn Fn(&Machine)| {
        let mut rig = Rig::new(config(), 64);
        rig.run(&Step::EditPath(None, 3, Change::Flip(DIRTY), Then::Nothing));
        rig.run(&read);
        spoil(&rig.machine);
        catch_unwind(AssertUnwindSafe(|| rig.audit())).is_ok()
    };
    let entry = |machine: &Machine| {
        let LoadRoot::Root(root) = machine.shadow.reuse_root(&FIRST_CONTEXT).unwrap() else {
            panic!("the rig has a root");
        };
        let spte = machine.spte_value(root, gva([0, 0, 0, 0]));
        assert!(machine.is_shared(spte), "{spte:x}");
        (root, spte)
    };
    assert!(audited(&|machine| assert_ne!(entry(machine).1, 0)));
    assert!(!audited(&|machine| {
        let (root, spte) = entry(machine);
        let place = machine.spte(root, gva([0, 0, 0, 0])).unwrap();
        place.store(spte | WRITABLE, Ordering::Release);
    }));
    assert!(!audited(&|machine| {
        let (_, spte) = entry(machine);
        machine.guest_word(spte & ADDRESS).store(7, Ordering::Release);
        machine.set_entry(16, 1, 0);
    }));
}
