//! The ACPI tables: processors, interrupt controllers, devices, and how to power off and to reset.
//!
//! The machine is one of full ACPI, always in ACPI mode: with the reduced form Linux leaves the
//! interval timer and the 8259s alone, which KVM has and Linux calibrates its timers with. Devices are
//! in the DSDT, so that a stock kernel loads its `virtio_mmio` module by itself.
//!
//! Source: ACPI 6.5, chapters 5 (tables), 4.8 (fixed hardware), 7.4.2 (`\_Sx`); the identifier
//! `LNRO0005` is what Linux's `virtio_mmio` driver and QEMU use.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Device, Interrupt, Memory32Fixed, Name, Package, Path, ResourceTemplate, Scope,
};
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADT, FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;

use super::LinuxError;
use super::layout::{self, virtio_place};
use super::power;
use super::zero_page::narrow;

const OEM: [u8; 6] = *b"GNOMON";
const OEM_TABLE: [u8; 8] = *b"GNOMONVM";
const OEM_REVISION: u32 = 1;
/// Bytes of a table's header.
const HEADER_BYTES: u32 = 36;
/// Most vCPUs: local APIC identifiers of 8 bits, of which 255 means all.
pub(super) const MAX_VCPUS: usize = 255;

/// FADT, `IAPC_BOOT_ARCH`: there is no VGA, no message-signalled interrupt, no CMOS clock; and, as
/// their bits are clear, no keyboard controller and no other legacy device that is not described.
const BOOT_ARCH: u16 = 1 << 2 | 1 << 3 | 1 << 5;
/// MADT, flags: there are two 8259s, too.
const PC_COMPATIBLE: u32 = 1;
/// MADT: the interrupt of ACPI events is active high and level-triggered (structure 2).
const SCI_OVERRIDE: [u8; 10] = [2, 10, 0, 9, 9, 0, 0, 0, 0x0d, 0];

/// A table and where it goes.
type Placed = (u64, Vec<u8>);

/// The tables for so many vCPUs and virtio devices.
pub(super) fn build(vcpus: usize, devices: usize) -> Result<Vec<Placed>, LinuxError> {
    if vcpus > MAX_VCPUS {
        return Err(LinuxError::TooManyVcpus { vcpus, max: MAX_VCPUS });
    }
    if devices > layout::MAX_VIRTIO_DEVICES {
        return Err(LinuxError::TooManyDevices { devices, max: layout::MAX_VIRTIO_DEVICES });
    }
    let mut tables = Tables { next: layout::ACPI, placed: Vec::new() };
    let pointer = tables.reserve(Rsdp::len());
    let facs = tables.add(bytes_of(&FACS::new()));
    let dsdt = tables.add(dsdt(devices));
    let fadt = tables.add(fadt(facs, dsdt));
    let madt = tables.add(madt(vcpus));
    let mut list = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    list.add_entry(fadt);
    list.add_entry(madt);
    let list = tables.add(bytes_of(&list));
    tables.placed.push((pointer, bytes_of(&Rsdp::new(OEM, list))));
    Ok(tables.placed)
}

struct Tables {
    next: u64,
    placed: Vec<Placed>,
}

impl Tables {
    /// Tables are aligned to 64 bytes, which the FACS needs.
    fn reserve(&mut self, bytes: usize) -> u64 {
        let at = self.next;
        self.next = (at + bytes as u64).next_multiple_of(64);
        at
    }

    fn add(&mut self, table: Vec<u8>) -> u64 {
        let at = self.reserve(table.len());
        self.placed.push((at, table));
        at
    }
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn fadt(facs: u64, dsdt: u64) -> Vec<u8> {
    let port = |bits, size, port: u16| GAS::new(AddressSpace::SystemIo, bits, 0, size, port.into());
    let mut table = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .firmware_ctrl_32(narrow(facs))
        .dsdt_64(dsdt)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        // No fixed power button, sleep button or wake-up clock.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless);
    table.dsdt = narrow(dsdt).into();
    table.sci_int = layout::SCI_IRQ.into();
    table.pm1a_evt_blk = u32::from(power::EVENT_PORT).into();
    table.pm1_evt_len = power::EVENT_BYTES;
    table.x_pm1a_evt_blk = port(32, AccessSize::WordAccess, power::EVENT_PORT);
    table.pm1a_cnt_blk = u32::from(power::CONTROL_PORT).into();
    table.pm1_cnt_len = power::CONTROL_BYTES;
    table.x_pm1a_cnt_blk = port(16, AccessSize::WordAccess, power::CONTROL_PORT);
    // No C2, no C3.
    table.p_lvl2_lat = 0xffff.into();
    table.p_lvl3_lat = 0xffff.into();
    table.iapc_boot_arch = BOOT_ARCH.into();
    table.reset_reg = port(8, AccessSize::ByteAccess, power::RESET_PORT);
    table.reset_value = power::RESET_VALUE;
    let table: FADT = table.finalize();
    bytes_of(&table)
}

fn madt(vcpus: usize) -> Vec<u8> {
    let mut table = Sdt::new(*b"APIC", HEADER_BYTES, 5, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(&layout::LOCAL_APIC.to_le_bytes());
    table.append_slice(&PC_COMPATIBLE.to_le_bytes());
    for index in 0..vcpus {
        // KVM gives vCPU n the local APIC n.
        let id = u8::try_from(index).unwrap_or(u8::MAX);
        table.append_slice(&bytes_of(&ProcessorLocalApic::new(id, id, EnabledStatus::Enabled)));
    }
    table.append_slice(&bytes_of(&IoApic::new(0, layout::IO_APIC, 0)));
    table.append_slice(&SCI_OVERRIDE);
    table.as_slice().to_vec()
}

fn dsdt(devices: usize) -> Vec<u8> {
    let mut table = Sdt::new(*b"DSDT", HEADER_BYTES, 2, OEM, OEM_TABLE, OEM_REVISION);
    let off = Package::new(vec![&power::SLEEP_TYPE_OFF, &power::SLEEP_TYPE_OFF]);
    table.append_slice(&bytes_of(&Name::new(Path::new("_S5_"), &off)));
    for index in 0..devices {
        if let Some((address, irq)) = virtio_place(index) {
            table.append_slice(&virtio(index, narrow(address), irq));
        }
    }
    table.as_slice().to_vec()
}

fn virtio(index: usize, address: u32, irq: u32) -> Vec<u8> {
    // Ten at most.
    let digit = char::from(b'0' + u8::try_from(index).unwrap_or(0) % 10);
    let registers = Memory32Fixed::new(true, address, narrow(layout::VIRTIO_STRIDE));
    // A consumer of an interrupt that is edge-triggered, active high, not shared.
    let interrupt = Interrupt::new(true, true, false, false, irq);
    let resources = ResourceTemplate::new(vec![&registers, &interrupt]);
    let number = u8::try_from(index).unwrap_or(0);
    let identifier = Name::new(Path::new("_HID"), &"LNRO0005");
    let number = Name::new(Path::new("_UID"), &number);
    let resources = Name::new(Path::new("_CRS"), &resources);
    let path = Path::new(&format!("VIO{digit}"));
    let device = Device::new(path, vec![&identifier, &number, &resources]);
    bytes_of(&Scope::new(Path::new("\\_SB_"), vec![&device]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn u32_at(table: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(table[at..at + 4].try_into().unwrap())
    }

    fn u64_at(table: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(table[at..at + 8].try_into().unwrap())
    }

    /// Finds the tables as an operating system does, checking sums and lengths on the way.
    fn walk(placed: &[Placed]) -> Vec<&[u8]> {
        let at = |address: u64| {
            let found = placed.iter().find(|(at, _)| *at == address);
            &found.unwrap_or_else(|| panic!("nothing at {address:#x}")).1[..]
        };
        let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        let pointer = at(layout::ACPI);
        assert_eq!(&pointer[..8], b"RSD PTR ");
        assert_eq!((sum(&pointer[..20]), sum(pointer)), (0, 0));
        let list = at(u64_at(pointer, 24));
        let mut tables = vec![list];
        for entry in list[36..].chunks(8) {
            tables.push(at(u64::from_le_bytes(entry.try_into().unwrap())));
        }
        let fadt = tables[1];
        assert_eq!(u64::from(u32_at(fadt, 40)), u64_at(fadt, 140), "DSDT, twice");
        tables.push(at(u64_at(fadt, 140)));
        for table in &tables {
            assert_eq!(u32_at(table, 4) as usize, table.len());
            assert_eq!(sum(table), 0, "{:?}", String::from_utf8_lossy(&table[..4]));
        }
        assert_eq!(&at(u32_at(fadt, 36).into())[..4], b"FACS");
        tables
    }

    #[test]
    fn an_operating_system_finds_each_table_and_each_sum_is_right() {
        let placed = build(3, 2).unwrap();
        let tables = walk(&placed);
        let signatures: Vec<_> = tables.iter().map(|table| &table[..4]).collect();
        assert_eq!(signatures, [b"XSDT", b"FACP", b"APIC", b"DSDT"]);
    }

    #[test]
    fn the_fadt_names_the_registers_that_the_machine_has() {
        let placed = build(1, 0).unwrap();
        let fadt = walk(&placed)[1];
        assert_eq!((u32_at(fadt, 56), fadt[88]), (0xb000, 4), "PM1a events");
        assert_eq!((u32_at(fadt, 64), fadt[89]), (0xb004, 2), "PM1a control");
        assert_eq!((u64_at(fadt, 120), fadt[128]), (0x64, 0xfe), "reset");
        assert_eq!(u32_at(fadt, 112) & (1 << 10 | 1 << 20), 1 << 10, "reset, full hardware");
        assert_eq!(u32_at(fadt, 48), 0, "no SMI command: ACPI is on from the start");
    }

    #[test]
    fn the_madt_has_each_processor_and_the_controller() {
        let placed = build(3, 0).unwrap();
        let madt = walk(&placed)[2];
        let mut rest = &madt[44..];
        let mut kinds = Vec::new();
        while let [kind, length, ..] = *rest {
            kinds.push((kind, rest[3]));
            rest = &rest[usize::from(length)..];
        }
        assert_eq!(kinds[..3], [(0, 0), (0, 1), (0, 2)]);
        assert_eq!((kinds[3].0, kinds[4]), (1, (2, 9)));
        assert_eq!(kinds.len(), 5);
    }

    #[test]
    fn devices_are_named_with_their_registers_and_interrupts() {
        let placed = build(1, 2).unwrap();
        let dsdt = walk(&placed)[3];
        let has = |wanted: &[u8]| dsdt.windows(wanted.len()).any(|window| window == wanted);
        assert!(has(b"VIO0") && has(b"VIO1") && !has(b"VIO2"));
        assert!(has(b"LNRO0005"));
        assert!(has(&[0x86, 9, 0, 1, 0, 0x10, 0, 0xd0, 0, 0x10, 0, 0]), "Memory32Fixed of VIO1");
        assert!(has(&[0x89, 6, 0, 3, 1, 6, 0, 0, 0]), "Interrupt of VIO1");
        assert!(has(b"_S5_\x12\x06\x02\x0a\x05\x0a\x05"));
    }

    #[test]
    fn the_largest_tables_fit_their_place_and_larger_ones_are_refused() {
        let placed = build(MAX_VCPUS, layout::MAX_VIRTIO_DEVICES).unwrap();
        walk(&placed);
        let end = placed.iter().map(|(at, table)| at + table.len() as u64).max().unwrap();
        assert!(end <= layout::ACPI_END, "{end:#x}");
        let error = build(256, 0).unwrap_err().to_string();
        assert_eq!(error, "256 vCPUs: a Linux guest has at most 255; choose fewer");
        assert!(build(1, 11).unwrap_err().to_string().contains("11 devices"));
    }
}
