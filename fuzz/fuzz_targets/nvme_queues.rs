//! What a hostile host writes into NVMe queues and doorbells, with late storage, memory that comes and goes, and stops.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    bluff_nvme::fuzzing::fuzz_queues(data);
});
