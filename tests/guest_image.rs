//! The guests that come with Gnomon keep to `docs/guest-abi.md`: the embedded test guest, and the
//! example, built by the very command that the page gives.

use std::path::{Path, PathBuf};
use std::process::Command;

use elf::ElfBytes;
use elf::abi::{EM_X86_64, ET_EXEC, PF_W, PF_X, PT_DYNAMIC, PT_INTERP, PT_LOAD};
use elf::endian::LittleEndian;
use elf::file::Class;
use elf::segment::ProgramHeader;
use gnomon::abi;
use gnomon::vmm::boot::TEST_GUEST;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn documentation() -> String {
    std::fs::read_to_string(root().join("docs/guest-abi.md")).expect("the page is there")
}

/// Checks what the page demands of an image; its loaded segments.
fn check_image(bytes: &[u8]) -> Vec<ProgramHeader> {
    let file = ElfBytes::<LittleEndian>::minimal_parse(bytes).expect("an ELF file");
    assert_eq!(file.ehdr.class, Class::ELF64);
    assert_eq!((file.ehdr.e_type, file.ehdr.e_machine), (ET_EXEC, EM_X86_64));
    let headers: Vec<_> = file.segments().expect("program headers").iter().collect();
    assert!(headers.iter().all(|h| h.p_type != PT_INTERP && h.p_type != PT_DYNAMIC));
    let mut loaded: Vec<_> = headers.into_iter().filter(|h| h.p_type == PT_LOAD).collect();
    loaded.sort_by_key(|h| h.p_paddr);
    assert!(loaded[0].p_paddr >= abi::KERNEL_MIN_GPA);
    for pair in loaded.windows(2) {
        assert!(pair[0].p_paddr + pair[0].p_memsz <= pair[1].p_paddr, "segments overlap");
    }
    assert!(loaded.iter().all(|h| h.p_vaddr == h.p_paddr), "entered with the identity mapping");
    let entry = file.ehdr.e_entry;
    let inside = |h: &ProgramHeader| (h.p_vaddr..h.p_vaddr + h.p_filesz).contains(&entry);
    assert!(loaded.iter().any(|h| h.p_flags & PF_X != 0 && inside(h)), "entry {entry:#x}");
    loaded
}

#[test]
fn the_test_guest_is_an_image() {
    let loaded = check_image(TEST_GUEST);
    assert!(loaded.iter().all(|h| h.p_flags & (PF_W | PF_X) != (PF_W | PF_X)));
    // Mapped by single pages with their own permissions.
    assert!(loaded.iter().all(|h| h.p_vaddr.is_multiple_of(4096)));
}

#[test]
fn the_test_guest_has_none_of_the_forbidden_instructions() {
    use iced_x86::{Decoder, DecoderOptions, Mnemonic};
    let file = ElfBytes::<LittleEndian>::minimal_parse(TEST_GUEST).expect("an ELF file");
    let text = file.section_header_by_name(".text").expect("sections").expect(".text");
    let (code, _) = file.section_data(&text).expect("its bytes");
    let decoder = Decoder::with_ip(64, code, text.sh_addr, DecoderOptions::NONE);
    let mut instructions = 0;
    for instruction in decoder {
        instructions += 1;
        let forbidden = matches!(
            instruction.mnemonic(),
            Mnemonic::Syscall | Mnemonic::Sysenter | Mnemonic::Int | Mnemonic::Lmsw
        );
        assert!(!forbidden, "{:?} at {:#x}", instruction.mnemonic(), instruction.ip());
    }
    assert!(instructions > 1000, "{instructions} instructions are no kernel");
}

#[test]
fn the_example_builds_by_the_documented_command() {
    let page = documentation();
    let command = page
        .lines()
        .find(|line| line.starts_with("cc ") && line.ends_with("guest/examples/hello.S"))
        .expect("the page says how to build the example");
    let dir = tempfile::tempdir().expect("a temporary directory");
    let image: PathBuf = dir.path().join("hello");
    let arguments = command.split_whitespace().skip(1).map(|word| match word {
        "hello" => image.as_os_str(),
        word => word.as_ref(),
    });
    let output = Command::new("cc")
        .args(arguments)
        .arg("-Wl,--fatal-warnings")
        .current_dir(root())
        .output()
        .expect("a C compiler, which building Gnomon takes too");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    check_image(&std::fs::read(&image).expect("the image"));
}

#[test]
fn the_page_has_the_numbers_of_the_code() {
    let page = documentation();
    let calls = [
        (abi::HC_INFO, "HC_INFO"),
        (abi::HC_START_VCPU, "HC_START_VCPU"),
        (abi::HC_VIOLATION, "HC_VIOLATION"),
        (abi::HC_WATCH, "HC_WATCH"),
        (abi::HC_POWER_OFF, "HC_POWER_OFF"),
        (abi::HC_PHASE, "HC_PHASE"),
    ];
    let mut wanted: Vec<String> =
        calls.iter().map(|(number, name)| format!("| {number} | `{name}` |")).collect();
    wanted.extend([
        format!("| {:#x} | `boot_params` |", abi::BOOT_PARAMS_GPA),
        format!("| {:#x} … 0xc000 | boot page tables |", abi::BOOT_PML4_GPA),
        format!(
            "| {:#x} … {:#x} | command line",
            abi::CMDLINE_GPA,
            abi::CMDLINE_GPA + abi::CMDLINE_BYTES
        ),
        format!("| {:#x} | hypercall", abi::PORT_HYPERCALL),
        format!("| {:#x} | ends the VM", abi::PORT_EXIT),
        format!("| {:#x} … {:#x} | 16550", abi::PORT_SERIAL, abi::PORT_SERIAL + 7),
        format!("| {:#x}: PE,", abi::ENTRY_CR0),
        format!("| {:#x}: PAE,", abi::ENTRY_CR4),
        format!("| {:#x}: LME, LMA |", abi::ENTRY_EFER),
        format!("CS is {:#x}, SS is {:#x},", abi::SELECTOR_CODE, abi::SELECTOR_DATA),
        format!("| RFLAGS | {:#x}: bit 1 and IF", abi::ENTRY_RFLAGS),
        format!("{} GiB (`WINDOW_GPA`)", abi::WINDOW_GPA >> 30),
        format!("a control block of {} KiB", abi::CONTROL_BYTES >> 10),
        format!("the contract, now {}", abi::ABI_VERSION),
        "0x7f80_0000_0000 (`GVA_LIMIT`)".to_owned(),
        "| 8 | 4 | stop: 0, and 1 from".to_owned(),
        format!("| {} · i | {} | counters", "64 + 64", size_of::<abi::VcpuCounters>()),
    ]);
    wanted.extend(dma());
    assert_eq!(abi::GVA_LIMIT, 0x7f80_0000_0000);
    assert_eq!(std::mem::offset_of!(abi::Control, stop), 8);
    assert_eq!(std::mem::offset_of!(abi::Control, counters), 64);
    for text in wanted {
        assert!(page.contains(&text), "docs/guest-abi.md does not say {text:?}");
    }
}

/// What the page must say of the DMA device.
fn dma() -> Vec<String> {
    use abi::DmaDescriptor as Descriptor;
    use std::mem::offset_of;
    vec![
        format!("| {:#x} | doorbell of the DMA device", abi::PORT_DMA),
        format!("a descriptor of {} bytes", size_of::<Descriptor>()),
        format!("at an address that is a multiple of {}:", abi::DMA_ALIGN),
        format!("| {} | 4 | command:", offset_of!(Descriptor, command)),
        format!("{} copy, {} fill, {} checksum |", abi::DMA_COPY, abi::DMA_FILL, abi::DMA_CHECKSUM),
        format!("| {} | 4 | status: {} by", offset_of!(Descriptor, status), abi::DMA_PENDING),
        format!("writes {} (done) or {} (error)", abi::DMA_DONE, abi::DMA_ERROR),
        format!("| {} | 8 | guest-physical address of the source", offset_of!(Descriptor, source)),
        format!(
            "| {} | 8 | guest-physical address of the dest",
            offset_of!(Descriptor, destination)
        ),
        format!(
            "| {} | 8 | number of bytes, 1 to {} |",
            offset_of!(Descriptor, bytes),
            abi::DMA_MAX_BYTES
        ),
        format!("| {} | 8 | pattern", offset_of!(Descriptor, pattern)),
        format!("| {} | 8 | result", offset_of!(Descriptor, result)),
        format!("| {} | {} | not", offset_of!(Descriptor, unused), 8 * 10),
        format!("The device takes {}\n", abi::DMA_QUEUE),
        format!("| {} | there is no such command |", abi::DMA_BAD_COMMAND),
        format!("| {} | the number of bytes is 0", abi::DMA_BAD_LENGTH),
        format!("| {} | source or destination are not all RAM", abi::DMA_OUTSIDE_RAM),
        format!("| {} | source and destination of a copy overlap |", abi::DMA_OVERLAP),
        format!("{} a\ndevice", abi::Violation::Device as u64),
    ]
}
