//! vCPUs: their own data behind GS, how they start, and how they wait for each other.

use core::arch::{asm, global_asm};
use core::cell::UnsafeCell;
use core::hint::spin_loop;
use core::mem::offset_of;
use core::ptr;
use core::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering};

use crate::demand::DemandRegion;
use crate::descriptors::{GDT_REGISTER, Segments};
use crate::exceptions::{self, Expectation, IST_STACKS};
use crate::machine::Machine;
use crate::memory::{FreeRam, PAGE_BYTES};
use crate::paging::AddressSpace;
use crate::shared::SHARED_PAGES;
use crate::workloads::PagingBlock;
use crate::{ring0, x86};
use gnomon_abi as abi;

const STACK_PAGES: u64 = 16;
const IST_STACK_PAGES: u64 = 4;

/// What one vCPU has for itself. Its address is the vCPU's GS base.
#[repr(C)]
pub struct Vcpu {
    this: *const Vcpu,
    /// 0 is the boot vCPU.
    pub index: u32,
    stack_top: u64,
    ist: [u64; IST_STACKS],
    segments: UnsafeCell<Segments>,
    /// Top of the stack of [`ring0`]; its page begins with the address of `ist`.
    ring0_stack: u64,
    machine: AtomicPtr<Machine>,
    /// The exception that it awaits.
    pub expectation: Expectation,
    /// What it maps on demand.
    pub demand: DemandRegion,
    /// What it changes mappings of.
    pub paging: PagingBlock,
    /// What it has added to each page of the shared counters.
    pub tallies: [AtomicU64; SHARED_PAGES],
}

// SAFETY: `segments` is used by the vCPU itself only, in `Vcpu::init`; the rest is atomic or fixed.
unsafe impl Sync for Vcpu {}

impl Vcpu {
    /// All vCPUs' data, with their stacks.
    pub fn place_all(ram: &mut FreeRam, count: u32, space: AddressSpace) -> &'static [Vcpu] {
        ram.place_each(count as usize, |ram, i, this| {
            let mut stack = |pages| ram.take_pages(pages) + pages * PAGE_BYTES;
            Vcpu {
                this,
                index: i as u32,
                stack_top: stack(STACK_PAGES),
                ist: [(); IST_STACKS].map(|()| stack(IST_STACK_PAGES)),
                segments: UnsafeCell::new(Segments::new()),
                ring0_stack: stack(1),
                machine: AtomicPtr::new(ptr::null_mut()),
                expectation: Expectation::default(),
                demand: DemandRegion::new(ram, space, i as u32),
                paging: PagingBlock::new(ram, space, i as u32),
                tallies: [const { AtomicU64::new(0) }; SHARED_PAGES],
            }
        })
    }

    /// The data of the vCPU that asks.
    #[inline]
    pub fn current() -> &'static Vcpu {
        let this: *const Vcpu;
        // SAFETY: `init` has made GS point to a `Vcpu`, whose first field is its own address, and
        // which lives for good.
        unsafe {
            asm!("mov {}, gs:[0]", out(reg) this, options(nostack, preserves_flags, readonly));
            &*this
        }
    }

    /// Sets up the vCPU that runs this: GS base, descriptors, interrupt table.
    ///
    /// # Safety
    /// To be run once for each `Vcpu`, by its vCPU, after [`exceptions::fill_idt`].
    pub unsafe fn init(&'static self) {
        // SAFETY: this vCPU has the `Vcpu` for itself, and no use for another GS base.
        unsafe {
            x86::wrmsr(x86::MSR_GS_BASE, self.this as u64);
            if !ring0::is_present() {
                Segments::fill(self.segments.get(), &self.ist);
                Segments::load(self.segments.get());
                exceptions::load_idt();
            } else if self.index == 0 {
                // The others come with theirs.
                self.fill_for_ring0();
                Segments::load(self.segments.get());
            }
        }
    }

    /// Fills in the descriptors for a vCPU with a CPL 0, and where that sends exceptions.
    ///
    /// # Safety
    /// The vCPU does not run yet, or is this one.
    unsafe fn fill_for_ring0(&'static self) {
        let ist = &raw const self.ist as u64;
        // SAFETY: the page is this vCPU's, mapped at its physical address; the caller vouches for the
        // descriptors.
        unsafe {
            ((self.ring0_stack - PAGE_BYTES) as *mut u64).write_volatile(ist);
            Segments::fill(self.segments.get(), &[self.ring0_stack]);
        }
    }

    /// The address of what GS points to.
    pub fn address(&self) -> u64 {
        self.this as u64
    }
}

global_asm!(
    r#"
    .section .text.entry, "ax", @progbits
    .globl secondary_entry
    secondary_entry:
        mov rsp, [rdi + {stack_top}]
        xor ebp, ebp
        mov eax, cs
        test al, 3
        jnz 1f
        lea rcx, [rdi + {gdt_register}]
        lea rdx, [rip + 1f]
        jmp ring0_enter_secondary
    1:
        call {main}
        ud2
    "#,
    stack_top = const offset_of!(Vcpu, stack_top),
    gdt_register = const offset_of!(Vcpu, segments) + GDT_REGISTER,
    main = sym secondary_main,
);

unsafe extern "C" {
    static secondary_entry: u8;
}

extern "C" fn secondary_main(vcpu: &'static Vcpu) -> ! {
    // SAFETY: `start_others` stored a machine that lives for good. This is the vCPU that the
    // structure was made for, and it starts once.
    let machine = unsafe {
        vcpu.init();
        &*vcpu.machine.load(Ordering::Acquire)
    };
    crate::plan::run(machine, vcpu);
    x86::park()
}

/// Starts all vCPUs but the one that runs this. Panics if one does not start.
pub fn start_others(machine: &'static Machine) {
    for vcpu in &machine.vcpus[1..] {
        let pointer = (&raw const *machine).cast_mut();
        vcpu.machine.store(pointer, Ordering::Release); // pairs with the Acquire in secondary_main
        if ring0::is_present() {
            // SAFETY: it does not run yet.
            unsafe { vcpu.fill_for_ring0() };
        }
        let entry = &raw const secondary_entry as u64;
        let arguments = [u64::from(vcpu.index), entry, vcpu.address()];
        // SAFETY: the entry code switches to the vCPU's own stack and runs `secondary_main` with
        // an argument of the type that it expects.
        let result = unsafe { x86::hypercall(abi::HC_START_VCPU, &arguments) };
        assert!(result == 0, "vCPU {} did not start: {result:#x}", vcpu.index);
    }
}

/// A place where all vCPUs wait for each other, again and again.
pub struct Barrier {
    participants: u32,
    arrived: AtomicU32,
    generation: AtomicU32,
}

impl Barrier {
    /// A barrier for so many vCPUs.
    pub fn new(participants: u32) -> Barrier {
        Barrier { participants, arrived: AtomicU32::new(0), generation: AtomicU32::new(0) }
    }

    /// Waits until all have come. What each did before is visible to all afterwards.
    pub fn wait(&self) {
        let generation = self.generation.load(Ordering::Acquire);
        // AcqRel: the last to come has seen what the others did, and hands it on by the Release
        // store below, which pairs with the Acquire loads of those who wait.
        if self.arrived.fetch_add(1, Ordering::AcqRel) + 1 == self.participants {
            self.arrived.store(0, Ordering::Relaxed);
            self.generation.store(generation.wrapping_add(1), Ordering::Release);
        } else {
            while self.generation.load(Ordering::Acquire) == generation {
                spin_loop();
            }
        }
    }
}
