//! What a hostile vfio-user client sends, with late answers, clients that do not read, and clients that come and go.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    bluff_vfio_user::fuzzing::fuzz_messages(data);
});
