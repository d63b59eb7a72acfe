#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| gnomon_fuzz::run("peer_protocol", data));
