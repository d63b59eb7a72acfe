//! Random guests, well-behaved or not, against the model.

use std::fs::File;

use proptest::prelude::*;

use super::cpu::{Cpu, Done};
use super::machine::{
    ACCESSED, ADDRESS, DIRTY, Machine, NO_EXECUTE, PAGE_SIZE_BIT, PHYS_BITS, PRESENT, RAM_BYTES,
    WINDOW_BYTES, WINDOW_GFN, WRITABLE, config, gva,
};
use super::model::{Leaf, Model, walk};
use crate::addr::{Gfn, Gpa, Gva, PAGE_SIZE_U64};
use crate::export_rmap::{FlushReason, PageFlags};
use crate::shadow_mmu::PagingContext;
use crate::shadow_mmu::{Access, GuestAccessError, LoadRoot};

/// Guest frames of the two PML4s; tables are in 1 to 8, data in 16 to 31.
const ROOTS: [u64; 2] = [1, 8];
const POOL: u64 = 32;

/// Any address, or (`None`) the one used last: most faults hide in what is done twice.
type At = Option<Gva>;

fn any_at() -> impl Strategy<Value = At> {
    prop_oneof![Just(None), any_gva().prop_map(Some)]
}

/// Another page of the same large page.
fn beside(gva: Gva, distance: u64) -> Gva {
    Gva::new(gva.as_u64() ^ (distance * PAGE_SIZE_U64))
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

/// What follows a change of an entry.
#[derive(Clone, Copy, Debug)]
enum Then {
    Nothing,
    /// No flush, but another access, which may or may not see the change.
    Access(Access),
    /// Of the address itself, or of a page so many pages beside it.
    Invlpg(u64),
    LoadRoot,
}

/// A change of an entry.
#[derive(Clone, Copy, Debug)]
enum Change {
    To(u64),
    /// Another page of data, with the same rights.
    Address(u64),
    Flip(u64),
}

#[derive(Clone, Debug)]
enum Step {
    Access(At, Access, u64),
    /// An access to a page beside the last one.
    Beside(u64, Access),
    /// The emulator's access on the guest's behalf.
    Virtual(At, Access, u64),
    Edit(u64, usize, u64),
    /// Changes an entry that the walk for the address goes through: 0 is the topmost.
    EditPath(At, usize, Change, Then),
    Invlpg(At),
    LoadRoot(usize),
    Control(bool, bool),
    Evict(u64),
    EvictAll,
    Clean(u64),
    CleanAll,
    Age(u64),
    Recycle,
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
        1 => (0..2usize).prop_map(Step::LoadRoot),
        1 => any::<(bool, bool)>().prop_map(|(wp, nxe)| Step::Control(wp, nxe)),
        3 => (0..POOL).prop_map(Step::Evict),
        1 => Just(Step::EvictAll),
        3 => (0..POOL).prop_map(Step::Clean),
        1 => Just(Step::CleanAll),
        2 => (0..POOL).prop_map(Step::Age),
        1 => Just(Step::Recycle),
    ]
}

struct Rig {
    machine: Machine,
    cpu: Cpu,
    model: Model,
    pagemap: File,
    last: Gva,
}

impl Rig {
    fn new(shadow_pages: u32) -> Self {
        let machine = Machine::new(config(), shadow_pages);
        let cpu = Cpu::new(&machine, ROOTS[0]);
        let model = Model::new(cpu.context);
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let mut rig = Self { machine, cpu, model, pagemap, last: gva([0; 4]) };
        rig.map_something();
        rig
    }

    /// A sane set of tables to start from, shared between the roots, with all sizes of pages.
    fn map_something(&mut self) {
        let table = |number: u64| (number * PAGE_SIZE_U64) | PRESENT | WRITABLE;
        let mut entries = vec![
            (1, 0, table(2)),
            (1, 3, table(2)),
            (1, 256, table(3)),
            (8, 0, table(3)),
            (8, 3, table(8)),
            (2, 0, table(4)),
            (2, 1, table(5)),
            (3, 0, table(5)),
            (3, 1, PAGE_SIZE_BIT | table(0)),
            (4, 0, table(6)),
            (4, 1, table(7)),
            (5, 0, table(7) | NO_EXECUTE),
            (5, 1, PAGE_SIZE_BIT | 1 << 21 | table(0)),
        ];
        for (number, index) in [0, 1, 2, 17].into_iter().enumerate() {
            let number = number as u64;
            entries.push((6, index, table(16 + number)));
            entries.push((7, index, ((20 + number) * PAGE_SIZE_U64) | PRESENT | ACCESSED));
        }
        let window = WINDOW_GFN.base().as_u64() | PRESENT | WRITABLE;
        entries.extend([(6, 17, window), (7, 1, window + PAGE_SIZE_U64)]);
        for (table, index, entry) in entries {
            self.edit(table, index, entry);
        }
    }

    fn edit(&mut self, table: u64, index: usize, entry: u64) {
        self.machine.set_entry(table, index, entry);
        self.model.write(table * PAGE_SIZE_U64 + index as u64 * 8, entry);
    }

    fn edit_path(&mut self, depth: usize, change: Change) {
        let Ok(leaf) = walk(self.model.now(), &self.model.context, self.last, Access::Read) else {
            return;
        };
        let at = leaf.entries[depth.min(leaf.entries.len() - 1)];
        let entry = match change {
            Change::To(entry) => entry,
            Change::Address(address) => self.model.read(at) & !ADDRESS | address,
            Change::Flip(flag) => self.model.read(at) ^ flag,
        };
        let index = at % PAGE_SIZE_U64 / 8;
        self.edit(at / PAGE_SIZE_U64, usize::try_from(index).unwrap(), entry);
    }

    fn focus(&mut self, at: At) {
        self.last = at.unwrap_or(self.last);
    }

    fn recycle(&mut self) -> Result<(), TestCaseError> {
        let old = self.cpu.root;
        self.machine.shadow.recycle();
        self.model.forget_versions();
        prop_assert_eq!(self.machine.shadow.root_machine_address(old), None, "void");
        let context = self.cpu.context;
        let LoadRoot::Root(root) = self.machine.shadow.reuse_root(&context).unwrap() else {
            return Err(TestCaseError::fail("no page for a root after recycling"));
        };
        self.cpu.root = root;
        self.cpu.tlb().clear();
        Ok(())
    }

    fn load_root(&mut self, cr3: u64) -> Result<(), TestCaseError> {
        let cr3_base = Gpa::new(cr3 * PAGE_SIZE_U64);
        let context = PagingContext { cr3: cr3_base, ..self.cpu.context };
        match self.machine.shadow.load_root(&context).unwrap() {
            LoadRoot::Root(_) => self.cpu.load_cr3(&self.machine, cr3),
            LoadRoot::NeedsRecycle => {
                self.cpu.context.cr3 = cr3_base;
                self.recycle()?;
            }
        }
        self.model.context = self.cpu.context;
        self.model.flush_all();
        Ok(())
    }

    fn invlpg(&mut self, gva: Gva) {
        self.machine.shadow.invlpg(self.cpu.root, gva).unwrap();
        self.model.invlpg(gva);
    }

    fn run(&mut self, step: &Step) -> Result<(), TestCaseError> {
        let machine = &self.machine;
        match *step {
            Step::Access(at, access, value) => {
                self.focus(at);
                self.access(self.last, access, value)?;
            }
            Step::Beside(distance, access) => {
                self.access(beside(self.last, distance), access, 2)?
            }
            Step::Virtual(at, access, value) => {
                self.focus(at);
                self.access_virtual(self.last, access, value)?;
            }
            Step::Edit(table, index, entry) => self.edit(table, index, entry),
            Step::EditPath(at, depth, change, then) => {
                self.focus(at);
                self.edit_path(depth, change);
                match then {
                    Then::Nothing => {}
                    Then::Access(access) => self.access(self.last, access, 4)?,
                    Then::Invlpg(distance) => self.invlpg(beside(self.last, distance)),
                    Then::LoadRoot => self.load_root(self.cpu.context.cr3.gfn().as_u64())?,
                }
            }
            Step::Invlpg(at) => {
                self.focus(at);
                self.invlpg(self.last);
            }
            Step::LoadRoot(number) => self.load_root(ROOTS[number])?,
            Step::Control(write_protect, nxe) => {
                self.cpu.context.write_protect = write_protect;
                self.cpu.context.nxe = nxe;
                self.load_root(self.cpu.context.cr3.gfn().as_u64())?;
            }
            Step::Evict(gfn) => machine.evict(Gfn::new(gfn)),
            Step::Clean(gfn) => machine.clean(Gfn::new(gfn)),
            Step::EvictAll => drop(machine.mm.evict_frames(&machine.all_frames()).unwrap()),
            Step::CleanAll => drop(machine.mm.clean_frames(&machine.all_frames()).unwrap()),
            Step::Age(gfn) => {
                if let Some(page) = machine.object().try_lock_resident(Gfn::new(gfn)) {
                    machine.mm.notifiers().age_page(&page);
                    machine.mm.notifiers().flush(&[page.pfn()], FlushReason::Aged).unwrap();
                }
            }
            Step::Recycle => self.recycle()?,
        }
        self.cpu.obey_revocations(&self.machine, &self.pagemap);
        self.audit()
    }

    /// An access by the processor.
    fn access(&mut self, at: Gva, access: Access, value: u64) -> Result<(), TestCaseError> {
        let store = (access == Access::Write).then_some(value);
        let mut done = self.cpu.access(&self.machine, at, access, store);
        if self.cpu.faults == 0 {
            let gfn = self.machine.target(self.cpu.used);
            let gpa = gfn.base().as_u64() + at.page_offset() as u64;
            let allowed = self.model.allowed(at);
            let fits = |leaf: &Leaf| {
                let written = access != Access::Write || leaf.dirty;
                leaf.gfn() == gfn && leaf.allows(access) && leaf.accessed && written
            };
            prop_assert!(
                allowed.iter().any(fits),
                "{access:?} at {at} used {gfn}, not {allowed:?}"
            );
            prop_assert_eq!(done, Done::Value(self.model.read(gpa)));
            store.into_iter().for_each(|value| self.model.write(gpa, value));
            return Ok(());
        }
        let expected = self.model.access(at, access);
        if done == Done::NeedsRecycle {
            self.recycle()?;
            done = self.cpu.access(&self.machine, at, access, store);
        }
        match expected {
            Err(code) => prop_assert_eq!(done, Done::Fault(code)),
            Ok(leaf) if !is_memory(leaf.gpa) => {
                prop_assert_eq!(done, Done::Outside(Gpa::new(leaf.gpa)));
            }
            Ok(leaf) => {
                prop_assert_eq!(self.machine.target(self.cpu.used), leaf.gfn());
                prop_assert_eq!(done, Done::Value(self.model.read(leaf.gpa)));
                store.into_iter().for_each(|value| self.model.write(leaf.gpa, value));
            }
        }
        prop_assert_eq!(self.cpu.faults, 1, "one fault is enough");
        Ok(())
    }

    /// An access by the emulator, which has no TLB.
    fn access_virtual(&mut self, at: Gva, access: Access, value: u64) -> Result<(), TestCaseError> {
        let expected = self.model.access(at, access);
        let mut bytes = value.to_le_bytes();
        let (shadow, context) = (&self.machine.shadow, self.cpu.context);
        let done = if access == Access::Write {
            shadow.write_virtual(&context, at, &bytes)
        } else {
            shadow.read_virtual(&context, at, &mut bytes, access)
        };
        match (expected, done) {
            (Err(code), Err(GuestAccessError::PageFault { gva, error_code })) => {
                prop_assert_eq!((gva, error_code), (at, code));
            }
            (Ok(leaf), Err(GuestAccessError::OutsideRam { gpa })) => {
                prop_assert!(!is_memory(leaf.gpa) && gpa.as_u64() == leaf.gpa);
            }
            (Ok(leaf), Ok(())) => {
                prop_assert!(is_memory(leaf.gpa));
                if access == Access::Write {
                    self.model.write(leaf.gpa, value);
                }
                prop_assert_eq!(u64::from_le_bytes(bytes), self.model.read(leaf.gpa));
            }
            (expected, done) => {
                return Err(TestCaseError::fail(format!("{done:?}, not {expected:?}")));
            }
        }
        Ok(())
    }

    /// Everything that must hold between steps.
    fn audit(&self) -> Result<(), TestCaseError> {
        self.machine.assert_sound();
        let tlb = self.cpu.tlb().clone();
        for at in all_gvas() {
            let spte = self.machine.spte_value(self.cpu.root, at);
            self.audit_spte(at, spte)?;
            let cached = tlb.get(&(at.as_u64() / PAGE_SIZE_U64)).copied().unwrap_or(0);
            self.audit_spte(at, cached)?;
            if cached & DIRTY != 0 && self.machine.target(cached) < WINDOW_GFN {
                // The processor writes without asking: then somebody must know.
                let page = self.machine.object().try_lock_resident(self.machine.target(cached));
                let noted = page.is_some_and(|page| page.flags().contains(PageFlags::DIRTY));
                prop_assert!(spte & DIRTY != 0 || noted, "{at}: written, unknown to the host");
            }
        }
        self.compare_memory(false)
    }

    /// An SPTE, in the tables or in a TLB, grants no more than the guest's tables did at some
    /// moment since it flushed the address.
    fn audit_spte(&self, at: Gva, spte: u64) -> Result<(), TestCaseError> {
        if spte & PRESENT == 0 {
            return Ok(());
        }
        let gfn = self.machine.target(spte);
        let allowed = self.model.allowed(at);
        let some = |suits: &dyn Fn(&Leaf) -> bool| {
            allowed.iter().any(|leaf| leaf.gfn() == gfn && suits(leaf))
        };
        prop_assert!(some(&|leaf| leaf.accessed), "{at} -> {gfn}: stale, allowed {allowed:?}");
        if spte & WRITABLE != 0 {
            let suits = |leaf: &Leaf| leaf.writable && leaf.dirty;
            prop_assert!(some(&suits), "{at} -> {gfn}: writable, allowed {allowed:?}");
        }
        if spte & NO_EXECUTE == 0 {
            prop_assert!(some(&|leaf| leaf.executable), "{at} -> {gfn}: executable");
        }
        let somewhere = self.machine.frame(gfn).is_some() || gfn >= WINDOW_GFN;
        prop_assert!(somewhere, "{at} -> {gfn}: not in a frame");
        Ok(())
    }

    /// Guest memory, accessed and dirty bits included: what is in frames, or all of it.
    fn compare_memory(&self, all: bool) -> Result<(), TestCaseError> {
        let object = self.machine.object();
        for (&gpa, &expected) in self.model.now() {
            let gpa = Gpa::new(gpa);
            let found = match object.try_lock_resident(gpa.gfn()) {
                Some(page) => {
                    let word = object.word(&page, gpa.page_offset()).unwrap();
                    word.load(std::sync::atomic::Ordering::Relaxed)
                }
                None if all || gpa.gfn() >= WINDOW_GFN => self.machine.read_word(gpa.as_u64()),
                None => continue,
            };
            prop_assert_eq!(found, expected, "guest-physical {}", gpa);
        }
        Ok(())
    }
}

/// Whether the guest has anything there: RAM or the pinned window.
fn is_memory(gpa: u64) -> bool {
    let window = WINDOW_GFN.base().as_u64();
    gpa < RAM_BYTES || (window..window + WINDOW_BYTES).contains(&gpa)
}

fn all_gvas() -> impl Iterator<Item = Gva> {
    let last = [0, 1, 2, 17];
    [0, 3, 256].into_iter().flat_map(move |l4| {
        (0..4u64)
            .flat_map(move |mid| last.into_iter().map(move |l1| gva([l4, mid / 2, mid % 2, l1])))
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn any_guest_finds_what_its_tables_say(
        shadow_pages in prop::sample::select(&[12u32, 64]),
        steps in prop::collection::vec(any_step(), 1..80),
    ) {
        let mut rig = Rig::new(shadow_pages);
        for step in &steps {
            rig.run(step)?;
        }
        rig.compare_memory(true)?;
        let mm = rig.machine.mm.clone();
        drop(rig);
        prop_assert_eq!(mm.violations().1, 0, "nothing is exported in the end");
        prop_assert_eq!(mm.stats().frames_in_use, 0);
    }
}
