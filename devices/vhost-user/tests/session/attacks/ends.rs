//! Ends of sessions and of rings while I/O never completes.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use bluff_vhost_user::AttachmentEvent;
use bluff_virtio::Stop;

use super::{settled, still_serves};
use crate::support::*;

#[test]
fn b15_disconnect_with_io_that_never_completes() {
    let _alone = alone();
    let function = Function::new(4);
    let before = open_files();
    for round in 1..=times(1000) / 10 + 1 {
        let front = function.negotiated();
        let _memory = front.memory();
        for i in 0..4 {
            front.start(i);
        }
        function.control.lock().pace = Pace::AtBound;
        function.control.take_calls();
        let start = Instant::now();
        drop(front);
        // Comes back at once: served when the old session is over, not turned away.
        let front = function.negotiated();
        assert!(start.elapsed() < Duration::from_secs(2));
        let stop = Stop {
            bound: Duration::from_millis(300),
            leave: false,
            answer: false,
        };
        let calls = function.control.take_calls();
        let stops = calls
            .iter()
            .filter(|c| matches!(c, Call::Stop(_, s) if *s == stop));
        assert_eq!(stops.count(), 4, "{calls:?}");
        assert!(calls.contains(&Call::Reset));
        function.control.lock().pace = Pace::Now;
        drop(front);
        function.wait_gone(2 * round);
    }
    settled(before);
    still_serves(&function);
}

#[test]
fn b15_every_way_to_stop_ends_within_the_bound() {
    let _alone = alone();
    let function = Function::new(4);
    for way in ["base", "reset", "status"] {
        function.control.lock().pace = Pace::Now;
        let front = function.negotiated();
        let _memory = front.memory();
        for i in 0..4 {
            front.start(i);
        }
        function.control.lock().pace = Pace::AtBound;
        let start = Instant::now();
        match way {
            // One after the other, as QEMU does: the bound is for all of them.
            "base" => (0..4).for_each(|i| assert_eq!(front.base(i), 7 + i)),
            "reset" => assert!(front.ok(RESET_DEVICE, &[], &[])),
            _ => assert!(front.set(SET_STATUS, 0)),
        }
        let took = start.elapsed();
        assert!(took >= Duration::from_millis(290), "{way}: {took:?}");
        assert!(took < Duration::from_millis(900), "{way}: {took:?}");
        assert!((0..4).all(|i| !function.control.is_running(i)));
        // And the function can be set up again, by the same front end.
        function.control.lock().pace = Pace::Now;
        front.negotiate();
        front.start(0);
        let n = function.count(|e| *e == AttachmentEvent::Connected);
        drop(front);
        function.wait_gone(n);
    }
}

/// The next pause would answer requests with errors that there was time for.
#[test]
fn b15_what_is_no_stop_uses_up_nothing_of_the_bound() {
    let _alone = alone();
    let function = Function::new(3);
    let bound = Duration::from_millis(300);
    let front = function.negotiated();
    let memory = front.memory();
    (0..3).for_each(|i| front.start(i));
    function.control.lock().pace = Pace::AtBound;
    let given = |ring: u16| {
        front.base(ring.into());
        let calls = function.control.take_calls();
        let mut stops = calls.iter().filter_map(|call| match call {
            Call::Stop(index, stop) if *index == ring => Some(stop.bound),
            _ => None,
        });
        stops.next().expect("a stop")
    };
    // Each takes the bound, as requests are still under way.
    let region = |i: u64| single((i * MEMORY, MEMORY, USER + i * MEMORY, 0));
    for i in 1..3 {
        assert!(front.ok(ADD_MEM_REG, &region(i), &[memory.as_fd()]));
    }
    assert_eq!(given(0), bound);
    // In a row with the one before, and then not.
    assert!(given(1) < bound / 2);
    assert!(front.ok(REM_MEM_REG, &region(1), &[]));
    assert_eq!(given(2), bound);
}
