//! Where things lie in the memory of a Linux guest.
//!
//! | guest-physical | what |
//! |---|---|
//! | 0x472 | the PC's reset flag, a word |
//! | 0x500 | descriptor table of the entry |
//! | 0x6000 | PVH: `hvm_start_info`, its list of modules and its memory map |
//! | 0x7000 | `boot_params` |
//! | 0x9000 | page tables of the entry, five pages |
//! | 0x2_0000 | command line |
//! | 0xe_0000 | ACPI tables, in the area that is reserved on a PC |
//! | 0xf_fff0 | what a jump to a PC's firmware finds: a reset |
//! | 0x10_0000 | kernel and initial RAM disk, up to the end of RAM |
//! | 0xd000_0000 | registers of the virtio devices |
//! | 0xfec0_0000 | KVM's I/O APIC, and its local APICs 2 MiB above |

use crate::abi;

/// A word by which an operating system tells a PC's firmware how it wants to be started again, just
/// before it resets the machine: [`RESET_COLD`] or [`RESET_WARM`].
pub(super) const RESET_FLAG: u64 = 0x472;
/// Begin from nothing.
pub(super) const RESET_COLD: u16 = 0;
/// Leave the memory test out.
pub(super) const RESET_WARM: u16 = 0x1234;
/// What stands there before a guest says anything.
pub(super) const RESET_NOT_ASKED: u16 = 0xffff;
/// Where a processor begins in real mode, and a guest that has the firmware reset the machine jumps to.
pub(super) const FIRMWARE_ENTRY: u64 = 0xf_fff0;
/// The descriptor table of the entry.
pub(super) const GDT: u64 = 0x500;
/// `hvm_start_info`.
pub(super) const PVH_START_INFO: u64 = 0x6000;
/// Modules of `hvm_start_info`.
pub(super) const PVH_MODULES: u64 = 0x6100;
/// Memory map of `hvm_start_info`.
pub(super) const PVH_MEMORY_MAP: u64 = 0x6200;
/// `boot_params`; as for the test guest.
pub(super) const BOOT_PARAMS: u64 = abi::BOOT_PARAMS_GPA;
/// The command line; as for the test guest.
pub(super) const CMDLINE: u64 = abi::CMDLINE_GPA;
/// The root system description pointer, and after it the ACPI tables.
pub(super) const ACPI: u64 = 0xe_0000;
/// First byte that the ACPI tables may not use.
#[cfg(test)]
pub(super) const ACPI_END: u64 = 0xf_0000;
/// What the page tables of the entry map, in bytes: the kernel has to be in there.
pub(super) const MAPPED_AT_ENTRY: u64 = 1 << 30;
/// Where kernels may be.
pub(super) const HIGH_MEMORY: u64 = abi::KERNEL_MIN_GPA;

/// Most memory of a Linux guest, in bytes: what is below the devices' registers.
pub const MAX_MEMORY_BYTES: u64 = 3 << 30;
/// Registers of the first virtio device.
pub const VIRTIO_BASE: u64 = 0xd000_0000;
/// Bytes from one device's registers to those of the next.
pub const VIRTIO_STRIDE: u64 = 0x1000;
/// Interrupt of the first virtio device.
pub const VIRTIO_FIRST_IRQ: u32 = 5;
/// Interrupt of ACPI events. Nothing raises it.
pub(super) const SCI_IRQ: u16 = 9;
/// Most virtio devices: interrupts 5 to 8, and 10 to 15.
pub const MAX_VIRTIO_DEVICES: usize = 10;
/// Interrupt of the serial port.
pub const SERIAL_IRQ: u32 = 4;
/// KVM's I/O APIC.
pub(super) const IO_APIC: u32 = 0xfec0_0000;
/// KVM's local APICs.
pub(super) const LOCAL_APIC: u32 = 0xfee0_0000;

const _: () = assert!(MAX_MEMORY_BYTES <= VIRTIO_BASE, "memory and devices are apart");

/// Registers and interrupt of virtio device `index`.
#[must_use]
pub fn virtio_place(index: usize) -> Option<(u64, u32)> {
    if index >= MAX_VIRTIO_DEVICES {
        return None;
    }
    let number = u32::try_from(index).ok()?;
    let irq = VIRTIO_FIRST_IRQ + number;
    let irq = if irq >= u32::from(SCI_IRQ) { irq + 1 } else { irq };
    Some((VIRTIO_BASE + u64::from(number) * VIRTIO_STRIDE, irq))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_share_neither_registers_nor_interrupts() {
        let places: Vec<_> = (0..MAX_VIRTIO_DEVICES).map(|n| virtio_place(n).unwrap()).collect();
        assert_eq!(places[0], (0xd000_0000, 5));
        assert_eq!(places[4], (0xd000_4000, 10), "9 is ACPI's");
        assert_eq!(places[9], (0xd000_9000, 15));
        for pair in places.windows(2) {
            assert!(pair[0].0 + VIRTIO_STRIDE <= pair[1].0 && pair[0].1 < pair[1].1);
        }
        assert_eq!(virtio_place(MAX_VIRTIO_DEVICES), None);
    }
}
