//! What a hostile guest or network sends as a frame: read beside etherparse, hashed, verified, answered.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    bluff_packet::fuzzing::packet_parse(data);
});
