//! What a hostile network sends to a tunnel's port: VXLAN and Geneve, and the frames inside.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    bluff_packet::fuzzing::packet_tunnel(data);
});
