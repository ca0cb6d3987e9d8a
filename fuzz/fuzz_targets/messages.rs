//! What a hostile front end sends, with late completions, disconnects and deaths in between.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    bluff_vhost_user::fuzzing::fuzz_messages(data);
});
