#![no_main]

// A frame of zstd may want 128 MiB remembered, and twice as much is had for it.
libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    gnomon_fuzz::allow_allocations(257 << 20);
    gnomon_fuzz::run("compressed", data);
});
