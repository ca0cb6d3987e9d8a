//! Features and configuration space.

use bluff_virtio::features;
use std::os::fd::AsFd;

use super::{file, still_serves};
use crate::support::*;

#[test]
fn b12_features_not_offered_and_negotiation_in_mid_io() {
    let _alone = alone();
    let function = Function::new(1);
    let front = function.connect();
    let offered = front.number(GET_FEATURES);
    let protocol = front.number(GET_PROTOCOL_FEATURES);
    front.negotiate();
    for bit in 0..64 {
        if offered & (1 << bit) == 0 {
            assert!(!front.set(SET_FEATURES, 1 << bit), "{bit}");
        }
        if protocol & (1 << bit) == 0 {
            assert!(!front.set(SET_PROTOCOL_FEATURES, 1 << bit | 8), "{bit}");
        }
    }
    let _memory = front.memory();
    front.start(0);
    function.control.take_calls();
    let bits = offered & !features::LOG_ALL & !features::RING_PACKED;
    for other in [
        0,
        bits ^ features::EVENT_IDX,
        bits | features::RING_PACKED,
        bits ^ F_PROTOCOL,
    ] {
        assert!(!front.set(SET_FEATURES, other));
    }
    assert!(front.set(SET_FEATURES, bits), "the same again");
    assert!(function.control.take_calls().is_empty());
    let log = file(4096);
    for _ in 0..times(1000) {
        // Each migration brings its log.
        let answer = front.ask(SET_LOG_BASE, &longs(&[4096, 0]), &[log.as_fd()]);
        assert!(answer.is_some());
        assert!(front.set(SET_FEATURES, bits | features::LOG_ALL));
        assert!(front.set(SET_FEATURES, bits));
        assert_eq!(
            function.control.take_calls(),
            [Call::Log(0, true), Call::Log(0, false)]
        );
    }
    drop(front);
    still_serves(&function);
}

#[test]
fn b13_config_out_of_range() {
    let _alone = alone();
    let function = Function::new(1);
    let front = function.negotiated();
    let config = |offset: u32, size: u32, flags: u32, bytes: usize| {
        let mut payload = words(&[offset, size, flags]);
        payload.resize(12 + bytes, 0x5a);
        payload
    };
    // QEMU asks for the structure that it knows, which may be longer than ours.
    let (got, _) = front.ask(GET_CONFIG, &config(0, 256, 0, 256), &[]).unwrap();
    assert_eq!(got.len(), 12 + 256);
    assert!(got[12..72].iter().copied().eq(0..60));
    assert!(got[72..].iter().all(|b| *b == 0));
    for (offset, size, bytes) in [
        (0, 0, 0),
        (0, 4097, 4096),
        (4096, 1, 1),
        (u32::MAX, 1, 1),
        (1, u32::MAX, 1),
        (0, 8, 7),
        (0, 7, 8),
    ] {
        let (got, _) = front
            .ask(GET_CONFIG, &config(offset, size, 0, bytes), &[])
            .unwrap();
        assert!(got.is_empty(), "no payload says that it failed");
        assert!(!front.ok(SET_CONFIG, &config(offset, size, 0, bytes), &[]));
    }
    for (offset, size, flags, good) in [
        (32, 1, 0, true),
        (59, 1, 0, true),
        (59, 2, 0, false),
        (60, 1, 0, false),
        (0, 1, 0, false),
        (32, 1, 1, true),
        (32, 1, 4, false),
        (32, 1, u32::MAX, false),
    ] {
        let payload = config(offset, size, flags, size as usize);
        assert_eq!(front.ok(SET_CONFIG, &payload, &[]), good, "{offset}+{size}");
    }
    drop(front);
    still_serves(&function);
}
