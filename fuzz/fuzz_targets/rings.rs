//! What a hostile driver writes into rings, descriptors, tables and requests.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    bluff_virtio_blk::fuzzing::fuzz_ring(data);
});
