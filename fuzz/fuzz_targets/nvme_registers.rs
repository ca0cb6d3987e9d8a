//! What a hostile host writes into an NVMe controller's registers, with starts and stops that end at any time.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    bluff_nvme::fuzzing::fuzz_registers(data);
});
