//! Random sequences of messages, completions, disconnections and deaths. `BLUFF_TEST_LONG=1` for more
//! of them; the same bytes are a fuzz target.

use bluff_testing::times;
use bluff_vhost_user::fuzzing::fuzz_messages;
use proptest::prelude::*;

use crate::support::beside;

fn cases() -> u32 {
    times(1_000, 50_000)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases()) })]

    #[test]
    fn any_bytes_are_survived(data in prop::collection::vec(any::<u8>(), 0..3000)) {
        let _beside = beside();
        fuzz_messages(&data);
    }

    /// Small choices: messages that make sense, so that rings run.
    #[test]
    fn sensible_messages_are_survived(
        data in prop::collection::vec(prop_oneof![8 => 0..60u8, 1 => 210..=255u8], 0..3000)
    ) {
        let _beside = beside();
        fuzz_messages(&data);
    }
}
