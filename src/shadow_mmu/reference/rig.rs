//! A guest on the shadow MMU and the same guest in the model, step by step. A difference panics:
//! this is for tests and fuzzing.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::cpu::{Cpu, Done};
use super::machine::{
    ACCESSED, ADDRESS, DIRTY, Machine, NO_EXECUTE, PAGE_SIZE_BIT, PRESENT, RAM_BYTES, WINDOW_BYTES,
    WINDOW_GFN, WRITABLE, gva,
};
use super::memory::{Memory, used_frames};
use super::model::{Leaf, Model};
use super::other::Other;
use super::step::{At, Change, ROOTS, Step, Then, beside};
use super::tlb::{Revocations, Tlb};
use crate::addr::{Gfn, Gpa, Gva, PAGE_SIZE_U64};
use crate::export_rmap::{FlushReason, LockedPage, PageFlags};
use crate::host_mm::{DirtyLog, HostMm, HostMmConfig};
use crate::shadow_mmu::{Access, GuestAccessError, LoadRoot, PagingContext};

/// See the module's documentation.
pub(crate) struct Rig {
    pub(crate) machine: Machine,
    cpu: Cpu,
    pub(super) model: Model,
    revocations: Revocations,
    last: Gva,
    pub(super) other: Other,
    pub(super) log: Option<DirtyLog>,
}

impl Rig {
    /// A guest on the smallest host memory, all of it the kernel's. Few `shadow_pages` make recycling
    /// frequent.
    pub(crate) fn new(config: HostMmConfig, shadow_pages: u32) -> Self {
        Self::with(Machine::new(config, shadow_pages), Revocations::by_kernel())
    }

    /// A guest on memory that is there already, without system calls: what the kernel would be asked
    /// to unmap is taken as unmapped. To be ended with [`finish_on`](Self::finish_on).
    pub(crate) fn on(memory: &Memory, config: HostMmConfig, shadow_pages: u32) -> Self {
        Self::with(Machine::on(memory, config, shadow_pages), Revocations::recorded())
    }

    fn with(machine: Machine, revocations: Revocations) -> Self {
        let cpu = Cpu::new(&machine, ROOTS[0]);
        let model = Model::new(cpu.context);
        let other = Other::new(&machine.mm);
        let last = gva([0; 4]);
        let mut rig = Self { machine, cpu, model, revocations, last, other, log: None };
        rig.map_something();
        // No processor has seen anything else.
        rig.model.forget_versions();
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
        let Ok(leaf) = self.model.walk(self.last, Access::Read) else {
            return;
        };
        let at = leaf.entries()[depth.min(leaf.entries().len() - 1)];
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

    fn recycle(&mut self) {
        let old = self.cpu.root;
        self.machine.shadow.recycle();
        self.model.forget_versions();
        assert_eq!(self.machine.shadow.root_machine_address(old), None, "void");
        let context = self.cpu.context;
        let LoadRoot::Root(root) = self.machine.shadow.reuse_root(&context).unwrap() else {
            panic!("no page for a root after recycling");
        };
        self.cpu.root = root;
        self.cpu.tlb().clear();
    }

    fn load_root(&mut self, cr3: u64) {
        let cr3_base = Gpa::new(cr3 * PAGE_SIZE_U64);
        let context = PagingContext { cr3: cr3_base, ..self.cpu.context };
        match self.machine.shadow.load_root(&context).unwrap() {
            LoadRoot::Root(_) => self.cpu.load_cr3(&self.machine, cr3),
            LoadRoot::NeedsRecycle => {
                self.cpu.context.cr3 = cr3_base;
                self.recycle();
            }
        }
        self.model.context = self.cpu.context;
        self.model.flush_all();
    }

    fn invlpg(&mut self, gva: Gva) {
        self.machine.shadow.invlpg(self.cpu.root, gva).unwrap();
        self.model.invlpg(gva);
    }

    /// Does the step in both, and compares what it finds. What it leaves is for
    /// [`audit`](Self::audit).
    pub(crate) fn run(&mut self, step: &Step) {
        let machine = &self.machine;
        match *step {
            Step::Access(at, access, value) => {
                self.focus(at);
                self.access(self.last, access, value);
            }
            Step::Beside(distance, access) => self.access(beside(self.last, distance), access, 2),
            Step::Virtual(at, access, value) => {
                self.focus(at);
                self.access_virtual(self.last, access, value);
            }
            Step::Edit(table, index, entry) => self.edit(table, index, entry),
            Step::EditPath(at, depth, change, then) => {
                self.focus(at);
                self.edit_path(depth, change);
                match then {
                    Then::Nothing => {}
                    Then::Access(access) => self.access(self.last, access, 4),
                    Then::Invlpg(distance) => self.invlpg(beside(self.last, distance)),
                    Then::LoadRoot => self.load_root(self.cpu.context.cr3.gfn().as_u64()),
                }
            }
            Step::Invlpg(at) => {
                self.focus(at);
                self.invlpg(self.last);
            }
            Step::LoadRoot(number) => self.load_root(ROOTS[number]),
            Step::Control(write_protect, nxe) => {
                self.cpu.context.write_protect = write_protect;
                self.cpu.context.nxe = nxe;
                self.load_root(self.cpu.context.cr3.gfn().as_u64());
            }
            Step::Evict(gfn) => machine.evict(Gfn::new(gfn)),
            Step::Clean(gfn) => machine.clean(Gfn::new(gfn)),
            Step::EvictAll => drop(machine.mm.evict_frames(&machine.used_frames()).unwrap()),
            Step::CleanAll => drop(machine.mm.clean_frames(&machine.used_frames()).unwrap()),
            Step::Age(gfn) => {
                if let Some(page) = machine.object().try_lock_resident(Gfn::new(gfn)) {
                    machine.mm.notifiers().age_page(&page);
                    machine.mm.notifiers().flush(&[page.pfn()], FlushReason::Aged).unwrap();
                }
            }
            Step::Recycle => self.recycle(),
            Step::Host(step) => self.run_host(step),
        }
        self.revocations.obey(&self.machine, &mut self.cpu.tlb());
    }

    /// The end: all of guest memory, then that nothing is left behind.
    pub(crate) fn finish(self) {
        let mm = self.take_apart();
        assert_eq!(mm.violations().1, 0, "nothing is exported in the end");
        // What pages of zeros were shared stay, until somebody wants their frames.
        mm.evict_frames(&used_frames(&mm)).unwrap();
        let stats = mm.stats();
        assert_eq!((stats.frames_in_use, stats.swap_slots_used), (0, 0));
    }

    /// As [`finish`](Self::finish), for a guest on this memory, which can take the next one then.
    pub(crate) fn finish_on(self, memory: &Memory) {
        memory.reset(self.take_apart());
    }

    fn take_apart(self) -> Arc<HostMm> {
        self.compare_memory(true);
        self.other.compare();
        self.machine.mm.clone()
    }

    fn access_and_obey(&mut self, at: Gva, access: Access, store: Option<u64>) -> Done {
        let Self { machine, cpu, revocations, .. } = self;
        let obey = |tlb: &mut Tlb| revocations.obey(machine, tlb);
        // What the same step did before may have taken pages away.
        obey(&mut cpu.tlb());
        cpu.access_and_obey(machine, at, access, store, obey)
    }

    /// An access by the processor.
    fn access(&mut self, at: Gva, access: Access, value: u64) {
        let store = (access == Access::Write).then_some(value);
        let mut done = self.access_and_obey(at, access, store);
        if self.cpu.faults == 0 {
            self.check_used_translation(at, access, done, store);
            return;
        }
        let expected = self.model.access(at, access);
        if done == Done::NeedsRecycle {
            self.recycle();
            done = self.access_and_obey(at, access, store);
        }
        match expected {
            Err(code) => assert_eq!(done, Done::Fault(code)),
            Ok(leaf) if !is_memory(leaf.gpa) => {
                assert_eq!(done, Done::Outside(Gpa::new(leaf.gpa)));
            }
            Ok(leaf) => {
                let gfn = leaf.gfn();
                assert!(self.machine.leads_to(self.cpu.used, gfn), "{at} used another than {gfn}");
                assert_eq!(done, Done::Value(self.model.read(leaf.gpa)));
                self.note_store(leaf.gpa, store);
            }
        }
        assert_eq!(self.cpu.faults, 1, "one fault is enough");
    }

    /// An access without a fault used some translation that a TLB may hold.
    fn check_used_translation(&mut self, at: Gva, access: Access, done: Done, store: Option<u64>) {
        let used = self.cpu.used;
        let allowed = self.model.allowed(at);
        let fits = |leaf: &&Leaf| {
            let written = access != Access::Write || leaf.dirty;
            let suits = leaf.allows(access) && leaf.accessed && written;
            suits && self.machine.leads_to(used, leaf.gfn())
        };
        // Where several do, they share the frame, and only one if it is written.
        let leaf = allowed.iter().find(fits);
        let leaf = leaf.unwrap_or_else(|| panic!("{access:?} at {at} used {used:x}: {allowed:?}"));
        assert_eq!(done, Done::Value(self.model.read(leaf.gpa)));
        if store.is_some() {
            assert!(!self.machine.is_shared(used), "{at}: a shared frame was written");
        }
        self.note_store(leaf.gpa, store);
    }

    fn note_store(&mut self, gpa: u64, store: Option<u64>) {
        if let Some(value) = store {
            self.model.write(gpa, value);
        }
    }

    /// An access by the emulator, which has no TLB.
    fn access_virtual(&mut self, at: Gva, access: Access, value: u64) {
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
                assert_eq!((gva, error_code), (at, code));
            }
            (Ok(leaf), Err(GuestAccessError::OutsideRam { gpa })) => {
                assert!(!is_memory(leaf.gpa) && gpa.as_u64() == leaf.gpa);
            }
            (Ok(leaf), Ok(())) => {
                assert!(is_memory(leaf.gpa));
                if access == Access::Write {
                    self.model.write(leaf.gpa, value);
                }
                assert_eq!(u64::from_le_bytes(bytes), self.model.read(leaf.gpa));
            }
            (expected, done) => {
                panic!("{done:?}, not {expected:?}");
            }
        }
    }

    /// Everything that must hold between steps.
    pub(crate) fn audit(&self) {
        self.machine.assert_sound();
        let tlb = self.cpu.tlb().clone();
        for at in all_gvas() {
            let spte = self.machine.spte_value(self.cpu.root, at);
            self.audit_spte(at, spte);
            let cached = tlb.get(&(at.as_u64() / PAGE_SIZE_U64)).copied().unwrap_or(0);
            self.audit_spte(at, cached);
            if cached & DIRTY != 0
                && let Some(pfn) = Machine::spte_frame(cached)
            {
                // The processor writes without asking: then somebody must know.
                let page = self.machine.mm.frame_table().try_lock(pfn);
                let noted = page.is_some_and(|page| page.flags().contains(PageFlags::DIRTY));
                assert!(spte & DIRTY != 0 || noted, "{at}: written, unknown to the host");
            }
        }
        self.compare_memory(false);
    }

    /// An SPTE, in the tables or in a TLB, grants no more than the guest's tables did at some
    /// moment since it flushed the address, on the frame in which the page is now; and nobody may
    /// write a shared frame.
    fn audit_spte(&self, at: Gva, spte: u64) {
        if spte & PRESENT == 0 {
            return;
        }
        let allowed = self.model.allowed(at);
        let some = |suits: &dyn Fn(&Leaf) -> bool| {
            allowed.iter().any(|leaf| suits(leaf) && self.machine.leads_to(spte, leaf.gfn()))
        };
        assert!(some(&|leaf| leaf.accessed), "{at}: {spte:x} is stale, allowed {allowed:?}");
        if spte & WRITABLE != 0 {
            let suits = |leaf: &Leaf| leaf.writable && leaf.dirty;
            assert!(some(&suits), "{at}: {spte:x} is writable, allowed {allowed:?}");
            assert!(!self.machine.is_shared(spte), "{at}: {spte:x} is writable and shared");
        }
        if spte & NO_EXECUTE == 0 {
            assert!(some(&|leaf| leaf.executable), "{at}: {spte:x} is executable");
        }
    }

    /// Guest memory, accessed and dirty bits included: what is in frames, or all of it.
    fn compare_memory(&self, all: bool) {
        let object = self.machine.object();
        let mut at: Option<(Gfn, Option<LockedPage<'_>>)> = None;
        for (gpa, expected) in self.model.words() {
            let gpa = Gpa::new(gpa);
            let gfn = gpa.gfn();
            if at.as_ref().is_none_or(|&(last, _)| last != gfn) {
                // The lock of the page before goes first: reclaim may want it.
                drop(at.take());
                let page = match object.try_lock_resident(gfn) {
                    None if all && gfn < WINDOW_GFN => Some(object.lock_page(gfn).unwrap()),
                    page => page,
                };
                at = Some((gfn, page));
            }
            let found = match &at {
                Some((_, Some(page))) => {
                    object.word(page, gpa.page_offset()).unwrap().load(Ordering::Relaxed)
                }
                _ if gfn >= WINDOW_GFN => self.machine.read_word(gpa.as_u64()),
                _ => continue,
            };
            assert_eq!(found, expected, "guest-physical {gpa}");
        }
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
