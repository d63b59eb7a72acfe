//! The monitor: the only CPL 0 code in a VM, a few instructions that turn every exception of the
//! guest into an exit to its vCPU's thread.
//!
//! Guarantee: the guest cannot read, change, enter or imitate the monitor. Its pages are
//! supervisor-only in every shadow root, at [`abi::GVA_LIMIT`] and above; its gates, but for
//! `int3`, cannot be called from CPL 3; and the TSS I/O bitmap lets CPL 3 reach the guest's own
//! ports only, so an exit on a monitor port comes from the monitor's code.
//!
//! Protocol: vector N's stub does `out N, al`, which exits to the vCPU thread without touching a
//! register. The thread finds the exception frame at the top of the vCPU's monitor stack, and
//! leaves it (resume) or rewrites it (inject, or emulate). The stub then drops the error code, if
//! the vector has one, and returns to the frame with `iretq`. There are no instructions but
//! `out`, `add` and `iretq`, because some hosts emulate CPL 0.
//!
//! Layout, in pages from the start of the pinned slot: page tables, stubs, IDT, GDT, then one page
//! a vCPU with its TSS at the start and its stack at the end. All accessed and dirty bits are
//! preset, so neither the processor nor KVM ever writes these tables.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::{Bytes, MmapRegion, VolatileMemory};

use crate::abi;
use crate::addr::{PAGE_SIZE, PAGE_SIZE_U64};
use crate::vmm::cpu::exceptions::has_error_code;
use crate::vmm::cpu::{GUEST_CS, GUEST_SS};

/// The monitor's code selector.
pub(super) const MONITOR_CS: u16 = 0x10;
/// Selector of the guest-visible task register.
pub(super) const MONITOR_TR: u16 = 0x40;
/// Number of gates in the IDT.
const VECTORS: usize = 256;
/// Bytes between two stubs.
const STUB_BYTES: usize = 8;

/// Page indices of the fixed part.
const PDPT_PAGE: usize = 0;
const PD_PAGE: usize = 1;
const STUBS_PAGE: usize = 2;
const IDT_PAGE: usize = 3;
const GDT_PAGE: usize = 4;
const PT_PAGE: usize = 5;

/// GDT entries; the selectors are their byte offsets.
const GDT_ENTRIES: u16 = 10;
/// Offset of the GDT's last byte.
const GDT_LIMIT: u16 = GDT_ENTRIES * 8 - 1;

/// Page-table entry bits.
const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const NO_EXECUTE: u64 = 1 << 63;

/// Fixed part of a 64-bit TSS; the I/O bitmap follows it.
const TSS_BYTES: usize = TSS_BYTES_U16 as usize;
/// [`TSS_BYTES`] as the I/O map base has it.
const TSS_BYTES_U16: u16 = 0x68;
const TSS_RSP0: usize = 0x04;
const TSS_IO_MAP_BASE: usize = 0x66;
/// Ports that the bitmap covers; those above trap for being outside it.
const IO_BITMAP_PORTS: u16 = 0x618;
const IO_BITMAP_BYTES: usize = (IO_BITMAP_PORTS / 8) as usize;
/// Offset of the TSS's last byte: the bitmap is followed by a byte of ones, since the processor
/// reads two bytes at a time.
#[allow(clippy::cast_possible_truncation)]
pub(super) const TSS_LIMIT: u32 = (TSS_BYTES + IO_BITMAP_BYTES) as u32;

/// Bytes of an exception frame without its error code.
const FRAME_BYTES: usize = 40;

/// Where the parts of the monitor lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MonitorLayout {
    vcpus: usize,
    page_tables: usize,
}

impl MonitorLayout {
    /// The layout for `vcpus` vCPUs.
    pub(super) fn new(vcpus: usize) -> Self {
        // One page table maps 512 pages; mapping the tables themselves as well keeps offsets in
        // the slot and in the virtual range equal. At most 1023 vCPUs: three tables suffice.
        let mut page_tables = 1;
        while PT_PAGE + page_tables + vcpus > page_tables * 512 {
            page_tables += 1;
        }
        Self { vcpus, page_tables }
    }

    fn first_vcpu_page(&self) -> usize {
        PT_PAGE + self.page_tables
    }

    /// Number of pages in all.
    pub(super) fn pages(&self) -> usize {
        self.first_vcpu_page() + self.vcpus
    }

    /// Size in bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.pages() as u64 * PAGE_SIZE_U64
    }

    fn gva(page: usize) -> u64 {
        abi::GVA_LIMIT + page as u64 * PAGE_SIZE_U64
    }

    /// Virtual address of the IDT.
    pub(super) fn idt_base(&self) -> u64 {
        Self::gva(IDT_PAGE)
    }

    /// Offset of the IDT's last byte.
    pub(super) fn idt_limit(&self) -> u16 {
        0xfff
    }

    /// Virtual address of the GDT.
    pub(super) fn gdt_base(&self) -> u64 {
        Self::gva(GDT_PAGE)
    }

    /// Offset of the GDT's last byte.
    pub(super) fn gdt_limit(&self) -> u16 {
        GDT_LIMIT
    }

    /// Virtual address of vCPU `index`'s TSS.
    pub(super) fn tss_base(&self, index: usize) -> u64 {
        Self::gva(self.first_vcpu_page() + index)
    }

    /// Virtual address just above vCPU `index`'s monitor stack.
    fn stack_top(&self, index: usize) -> u64 {
        self.tss_base(index) + PAGE_SIZE_U64
    }

    /// Where a `syscall` lands on a host that ignores that EFER.SCE is clear. At CPL 3 the fetch
    /// faults, at CPL 0 the stub of the unused last vector exits: the guest gains nothing.
    pub(super) fn syscall_landing(&self) -> u64 {
        Self::gva(STUBS_PAGE) + (u8::MAX as usize * STUB_BYTES) as u64
    }

    /// Whether `rip` lies in the stubs.
    pub(super) fn holds_code(&self, rip: u64) -> bool {
        (Self::gva(STUBS_PAGE)..Self::gva(STUBS_PAGE + 1)).contains(&rip)
    }
}

/// Why the monitor could not be written: an offset outside the slot, which is a bug.
pub(super) type InstallError = vm_memory::volatile_memory::Error;

/// Writes the monitor into the start of `region`, which begins at machine address `machine`.
/// Returns the entry for PML4 slot 255 of every shadow root.
pub(super) fn install(
    layout: &MonitorLayout,
    region: &MmapRegion,
    machine: u64,
) -> Result<u64, InstallError> {
    write_page_tables(layout, region, machine)?;
    write_stubs(region)?;
    write_idt(region)?;
    write_gdt(region)?;
    for index in 0..layout.vcpus {
        write_tss(layout, region, index)?;
    }
    Ok(machine_page(machine, PDPT_PAGE) | PRESENT | WRITABLE | ACCESSED)
}

fn machine_page(machine: u64, page: usize) -> u64 {
    machine + page as u64 * PAGE_SIZE_U64
}

fn put(region: &MmapRegion, page: usize, offset: usize, bytes: &[u8]) -> Result<(), InstallError> {
    region.as_volatile_slice().write_slice(bytes, page * PAGE_SIZE + offset)
}

fn write_page_tables(
    layout: &MonitorLayout,
    region: &MmapRegion,
    machine: u64,
) -> Result<(), InstallError> {
    let upper = PRESENT | WRITABLE | ACCESSED;
    let pd = machine_page(machine, PD_PAGE) | upper;
    put(region, PDPT_PAGE, 0, &pd.to_le_bytes())?;
    for table in 0..layout.page_tables {
        let entry = machine_page(machine, PT_PAGE + table) | upper;
        put(region, PD_PAGE, table * 8, &entry.to_le_bytes())?;
    }
    for page in 0..layout.pages() {
        let rights = match page {
            STUBS_PAGE => 0,
            IDT_PAGE | GDT_PAGE => NO_EXECUTE,
            _ if page >= layout.first_vcpu_page() => WRITABLE | NO_EXECUTE,
            // The tables themselves are of no use to the monitor.
            _ => continue,
        };
        let entry = machine_page(machine, page) | PRESENT | ACCESSED | DIRTY | rights;
        put(region, PT_PAGE + page / 512, page % 512 * 8, &entry.to_le_bytes())?;
    }
    Ok(())
}

fn write_stubs(region: &MmapRegion) -> Result<(), InstallError> {
    for vector in 0..=u8::MAX {
        // out vector, al
        let mut stub = vec![0xe6, vector];
        if has_error_code(vector) {
            // add rsp, 8
            stub.extend_from_slice(&[0x48, 0x83, 0xc4, 0x08]);
        }
        // iretq
        stub.extend_from_slice(&[0x48, 0xcf]);
        put(region, STUBS_PAGE, usize::from(vector) * STUB_BYTES, &stub)?;
    }
    Ok(())
}

fn write_idt(region: &MmapRegion) -> Result<(), InstallError> {
    /// Present 64-bit interrupt gate, DPL 0.
    const GATE: u8 = 0x8e;
    /// The same, callable from CPL 3: `int3` must raise #BP, not #GP.
    const GATE_USER: u8 = 0xee;
    const BREAKPOINT: usize = 3;
    for vector in 0..VECTORS {
        let target = MonitorLayout::gva(STUBS_PAGE) + (vector * STUB_BYTES) as u64;
        let [a, b, c, d, e, f, g, h] = target.to_le_bytes();
        let [cs_low, cs_high] = MONITOR_CS.to_le_bytes();
        let kind = if vector == BREAKPOINT { GATE_USER } else { GATE };
        let gate = [a, b, cs_low, cs_high, 0, kind, c, d, e, f, g, h, 0, 0, 0, 0];
        put(region, IDT_PAGE, vector * 16, &gate)?;
    }
    Ok(())
}

fn write_gdt(region: &MmapRegion) -> Result<(), InstallError> {
    // Accessed bits are preset. There is no 32-bit code segment: guest code is 64-bit only.
    let descriptors: [(u16, u64); 3] = [
        (MONITOR_CS, 0x00af_9b00_0000_ffff),
        (GUEST_SS, 0x00cf_f300_0000_ffff),
        (GUEST_CS, 0x00af_fb00_0000_ffff),
    ];
    for (selector, descriptor) in descriptors {
        put(region, GDT_PAGE, usize::from(selector & !7), &descriptor.to_le_bytes())?;
    }
    Ok(())
}

fn write_tss(
    layout: &MonitorLayout,
    region: &MmapRegion,
    index: usize,
) -> Result<(), InstallError> {
    let page = layout.first_vcpu_page() + index;
    put(region, page, TSS_RSP0, &layout.stack_top(index).to_le_bytes())?;
    put(region, page, TSS_IO_MAP_BASE, &TSS_BYTES_U16.to_le_bytes())?;
    put(region, page, TSS_BYTES, &io_bitmap())
}

/// One bit a port, set for those that trap at CPL 3, and the closing byte of ones.
fn io_bitmap() -> [u8; IO_BITMAP_BYTES + 1] {
    let mut bitmap = [0xff; IO_BITMAP_BYTES + 1];
    let serial = abi::PORT_SERIAL..abi::PORT_SERIAL + 8;
    let hypercall = abi::PORT_HYPERCALL..abi::PORT_HYPERCALL + 4;
    let dma = abi::PORT_DMA..abi::PORT_DMA + 4;
    for port in serial.chain(hypercall).chain(dma).chain([abi::PORT_EXIT]) {
        bitmap[usize::from(port / 8)] &= !(1 << (port % 8));
    }
    bitmap
}

/// The guest's state as the processor pushed it on entry to the monitor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ExceptionFrame {
    pub(super) error_code: u64,
    pub(super) rip: u64,
    pub(super) cs: u64,
    pub(super) rflags: u64,
    pub(super) rsp: u64,
}

/// The top of one vCPU's monitor stack, as the host sees it.
#[derive(Clone)]
pub(super) struct MonitorStack {
    region: Arc<MmapRegion>,
    /// Offset in the region just above the stack.
    top: usize,
    /// The same place as the monitor sees it.
    top_gva: u64,
}

impl MonitorStack {
    pub(super) fn new(layout: &MonitorLayout, region: Arc<MmapRegion>, index: usize) -> Self {
        Self {
            region,
            top: (layout.first_vcpu_page() + index + 1) * PAGE_SIZE,
            top_gva: layout.stack_top(index),
        }
    }

    /// The real RSP in `vector`'s stub when the exception came from the guest; any other says
    /// that it hit the monitor itself.
    pub(super) fn expected_rsp(&self, vector: u8) -> u64 {
        self.top_gva - FRAME_BYTES as u64 - if has_error_code(vector) { 8 } else { 0 }
    }

    fn word(&self, below_top: usize) -> Result<u64, InstallError> {
        self.region.as_volatile_slice().load(self.top - below_top, Ordering::Relaxed)
    }

    fn set_word(&self, below_top: usize, value: u64) -> Result<(), InstallError> {
        self.region.as_volatile_slice().store(value, self.top - below_top, Ordering::Relaxed)
    }

    /// The whole page, which has the vCPU's TSS, too.
    pub(super) fn page(&self) -> Result<Vec<u8>, InstallError> {
        let mut page = vec![0; PAGE_SIZE];
        self.region.as_volatile_slice().read_slice(&mut page, self.top - PAGE_SIZE)?;
        Ok(page)
    }

    /// Overwrites the whole page with one of a vCPU of the same index in another VM with as many
    /// vCPUs: the TSS is the same.
    pub(super) fn set_page(&self, page: &[u8]) -> Result<(), InstallError> {
        self.region.as_volatile_slice().write_slice(page, self.top - PAGE_SIZE)
    }

    /// Reads the frame; the error code is meaningless for vectors without one. The vCPU is out of
    /// `KVM_RUN`, and the exit orders its writes before these reads.
    pub(super) fn read(&self) -> Result<ExceptionFrame, InstallError> {
        Ok(ExceptionFrame {
            error_code: self.word(48)?,
            rip: self.word(40)?,
            cs: self.word(32)?,
            rflags: self.word(24)?,
            rsp: self.word(16)?,
        })
    }

    /// Rewrites where the monitor returns to; selectors are always the guest's own.
    pub(super) fn write(&self, rip: u64, rflags: u64, rsp: u64) -> Result<(), InstallError> {
        self.set_word(40, rip)?;
        self.set_word(32, u64::from(GUEST_CS))?;
        self.set_word(24, rflags)?;
        self.set_word(16, rsp)?;
        self.set_word(8, u64::from(GUEST_SS))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read<const N: usize>(region: &MmapRegion, page: usize, offset: usize) -> [u8; N] {
        let mut bytes = [0; N];
        region.as_volatile_slice().read_slice(&mut bytes, page * PAGE_SIZE + offset).unwrap();
        bytes
    }

    fn installed(vcpus: usize) -> (MonitorLayout, Arc<MmapRegion>, u64) {
        let layout = MonitorLayout::new(vcpus);
        let region = Arc::new(MmapRegion::new(layout.pages() * PAGE_SIZE).unwrap());
        let pml4e = install(&layout, &region, 4 << 30).unwrap();
        (layout, region, pml4e)
    }

    #[test]
    fn every_page_the_monitor_uses_is_mapped_supervisor_only() {
        for vcpus in [1, 2, 505, 506, 1023] {
            let (layout, region, pml4e) = installed(vcpus);
            assert_eq!(pml4e & 0xfff, 0x23, "no user bit");
            for page in (STUBS_PAGE..PT_PAGE).chain(layout.first_vcpu_page()..layout.pages()) {
                let entry = u64::from_le_bytes(read(&region, PT_PAGE + page / 512, page % 512 * 8));
                assert_eq!(entry & 0x000f_ffff_ffff_f000, (4 << 30) + page as u64 * 4096);
                assert_eq!(entry & 0x65, 0x61, "present, accessed, dirty, not user");
            }
            assert!(layout.pages() <= layout.page_tables * 512);
        }
    }

    #[test]
    fn stubs_pop_an_error_code_exactly_where_there_is_one() {
        let (_, region, _) = installed(1);
        assert_eq!(read(&region, STUBS_PAGE, 13 * 8), [0xe6, 13, 0x48, 0x83, 0xc4, 8, 0x48, 0xcf]);
        assert_eq!(read(&region, STUBS_PAGE, 6 * 8), [0xe6, 6, 0x48, 0xcf, 0, 0, 0, 0]);
    }

    #[test]
    fn only_the_breakpoint_gate_is_open_to_the_guest() {
        let (_, region, _) = installed(1);
        for vector in 0..VECTORS {
            let gate: [u8; 16] = read(&region, IDT_PAGE, vector * 16);
            assert_eq!(gate[5], if vector == 3 { 0xee } else { 0x8e }, "vector {vector}");
        }
    }

    #[test]
    fn the_io_bitmap_opens_the_guests_ports_only() {
        let bitmap = io_bitmap();
        let open: Vec<u16> = (0..IO_BITMAP_PORTS)
            .filter(|port| bitmap[usize::from(port / 8)] & 1 << (port % 8) == 0)
            .collect();
        let mut expected = vec![abi::PORT_EXIT];
        expected.extend(0x3f8..0x400);
        expected.extend(0x600..0x604);
        expected.extend(0x610..0x614);
        assert_eq!(open, expected);
        assert_eq!(bitmap.last(), Some(&0xff));
    }

    #[test]
    fn a_rewritten_frame_returns_to_the_guests_own_selectors() {
        let (layout, region, _) = installed(2);
        let stack = MonitorStack::new(&layout, region.clone(), 1);
        stack.write(0x1000, 0x202, 0x7000).unwrap();
        let frame = stack.read().unwrap();
        assert_eq!((frame.rip, frame.cs, frame.rflags, frame.rsp), (0x1000, 0x33, 0x202, 0x7000));
        assert_eq!(stack.expected_rsp(14), layout.tss_base(1) + 4096 - 48);
        assert_eq!(stack.expected_rsp(6), layout.tss_base(1) + 4096 - 40);
        let ss: [u8; 8] = read(&region, layout.pages() - 1, 4096 - 8);
        assert_eq!(u64::from_le_bytes(ss), 0x2b);
    }
}
