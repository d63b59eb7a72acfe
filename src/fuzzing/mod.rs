//! Fuzz targets: what a guest, a file or a peer can do to Gnomon, as functions of a string of bytes.
//!
//! Guarantee: a target panics exactly when the code under it breaks a promise; any input is valid,
//! and the same input does the same in every run. `fuzz/` runs the targets under a coverage-guided
//! fuzzer; `cargo test` replays the inputs that it kept (`docs/fuzzing.md`).
//!
//! Not an interface: it is in test builds and behind the feature `fuzzing` alone.

mod boot;
mod compressed;
mod emulator;
mod linux;
mod memory_log;
mod peer_protocol;
#[cfg(test)]
mod replay;
#[cfg(feature = "export-notifier")]
mod shadow_mmu;
#[cfg(feature = "export-notifier")]
mod virtio;

/// A function that takes any bytes.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// The name of its folders in `fuzz/corpus` and `fuzz/regressions`, and of its binary.
    pub name: &'static str,
    /// Runs one input; panics if it finds something.
    pub run: fn(&[u8]),
}

/// All targets.
pub const TARGETS: &[Target] = &[
    Target { name: "boot", run: boot::run },
    Target { name: "compressed", run: compressed::run },
    Target { name: "emulator", run: emulator::run },
    Target { name: "linux", run: linux::run },
    Target { name: "peer_protocol", run: peer_protocol::run },
    #[cfg(feature = "export-notifier")]
    Target { name: "shadow_mmu", run: shadow_mmu::run },
    #[cfg(feature = "export-notifier")]
    Target { name: "virtio", run: virtio::run },
];

/// Runs one input of the target with this name.
///
/// # Panics
/// If the target finds something, or there is no such target.
pub fn run(name: &str, data: &[u8]) {
    let target = TARGETS.iter().find(|target| target.name == name);
    (target.unwrap_or_else(|| panic!("no fuzz target {name}")).run)(data);
}

/// Takes the next choice from an input. What is past the end of the input reads as zeros.
type Bytes<'a> = arbitrary::Unstructured<'a>;

/// A number from the input, zero when it is used up.
fn number<'a, T: arbitrary::Arbitrary<'a> + Default>(bytes: &mut Bytes<'a>) -> T {
    bytes.arbitrary().unwrap_or_default()
}

/// One of several things, the first when the input is used up.
///
/// # Panics
/// If there is nothing to choose from.
fn one_of<T: Copy>(bytes: &mut Bytes<'_>, things: &[T]) -> T {
    things[usize::from(number::<u8>(bytes)) % things.len()]
}
