//! What a hostile host gives an NVMe controller as admin commands, with namespaces that come, go and change meanwhile.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    bluff_nvme::fuzzing::fuzz_admin(data);
});
