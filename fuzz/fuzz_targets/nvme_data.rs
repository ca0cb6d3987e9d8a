//! What a hostile host writes into PRP lists and SGLs.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    bluff_nvme::fuzzing::fuzz_data(data);
});
