//! What a hostile underlay sends: from the link's frames, questions and tunnels among them, to what a tenant is given.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _ = bluff_overlay::fuzzing::fuzz_wire(data);
});
