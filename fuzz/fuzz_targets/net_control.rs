//! What a hostile driver has a network device set, and the frames that follow from it.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    bluff_virtio_net::fuzzing::fuzz_control(data);
});
