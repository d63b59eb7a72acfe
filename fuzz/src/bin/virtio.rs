#![no_main]

#[path = "../untraced.rs"]
mod untraced;

libfuzzer_sys::fuzz_target!(|data: &[u8]| gnomon_fuzz::run("virtio", data));
