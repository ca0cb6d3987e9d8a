//! A function that is removed while a front end is there: requests under way are answered first, and only then is
//! the connection closed. That is the end of a daemon, too.

use std::net::Shutdown;
use std::os::fd::AsFd;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use bluff_vhost_user::AttachmentEvent;
use bluff_virtio::Stop;

use crate::support::*;

const BOUND: Duration = Duration::from_millis(300);

fn stop(leave: bool, answer: bool) -> Stop {
    Stop {
        bound: BOUND,
        leave,
        answer,
    }
}

/// Removes the function; tells when its device is there.
fn remove(function: &Function) -> Receiver<()> {
    let (tx, rx) = channel();
    let handle = function.sessions.as_ref().unwrap().handle();
    handle.remove("f", move |_device| tx.send(()).unwrap());
    rx
}

fn stops(function: &Function) -> Vec<Call> {
    let calls = function.control.take_calls();
    calls
        .into_iter()
        .filter(|c| matches!(c, Call::Stop(..)))
        .collect()
}

#[test]
fn what_is_under_way_is_answered_before_the_connection_ends() {
    let _alone = alone();
    for recorded in [false, true] {
        let function = Function::new(2);
        let front = function.negotiated();
        if recorded {
            let (answer, files) = front
                .ask(GET_INFLIGHT_FD, &inflight(0, 0, 2, 128), &[])
                .unwrap();
            assert!(front.ok(SET_INFLIGHT_FD, &answer, &[files[0].as_fd()]));
        }
        let _memory = front.memory();
        for i in 0..2 {
            front.start(i);
        }
        function.control.take_calls();
        function.control.lock().pace = Pace::Held;
        let removed = remove(&function);
        function
            .control
            .wait("both queues to be told", |inner| inner.held.len() == 2);
        let want = stop(recorded, true);
        assert_eq!(
            stops(&function),
            [Call::Stop(0, want), Call::Stop(1, want)],
            "recorded: {recorded}"
        );
        // The device still answers: the front end must not think that it is alone, nor is it listened to.
        assert!(front.is_quiet());
        front.send(GET_FEATURES, &[], &[]);
        assert!(front.is_quiet());
        assert!(removed.try_recv().is_err());
        function.control.lock().pace = Pace::Now;
        function.control.release();
        removed.recv_timeout(PATIENCE).unwrap();
        assert!(front.is_closed());
        let why = |e: &AttachmentEvent| matches!(e, AttachmentEvent::Disconnected(Some(_)));
        assert_eq!(function.count(why), 1);
    }
}

#[test]
fn a_front_end_that_has_gone_is_not_answered() {
    let _alone = alone();
    let function = Function::new(1);
    let front = function.negotiated();
    let _memory = front.memory();
    front.start(0);
    function.control.take_calls();
    function.control.lock().pace = Pace::Held;
    drop(front);
    function
        .control
        .wait("the queue to be told", |inner| inner.held.len() == 1);
    // What was begun is not begun again.
    let removed = remove(&function);
    function.control.lock().pace = Pace::Now;
    function.control.release();
    removed.recv_timeout(PATIENCE).unwrap();
    assert_eq!(stops(&function), [Call::Stop(0, stop(false, false))]);
}

/// The front end goes away while a message of its own is being worked on, which comes before the stop.
#[test]
fn a_front_end_that_goes_before_the_stop_is_not_answered() {
    let _alone = alone();
    let function = Function::new(1);
    let front = function.negotiated();
    let _memory = front.memory();
    front.start(0);
    function.control.take_calls();
    function.control.lock().pace = Pace::Held;
    let other = bluff_vhost_user::unix::sealed_memory(c"other", 1 << 20).unwrap();
    let mut regions = table(&[(1 << 40, 1 << 20, 1 << 40, 0)]);
    regions.resize(8 + 32, 0);
    front.send(SET_MEM_TABLE, &regions, &[other.as_fd()]);
    function
        .control
        .wait("the change", |inner| inner.held.len() == 1);
    let removed = remove(&function);
    front.socket.shutdown(Shutdown::Write).unwrap();
    assert!(front.is_closed(), "the end is seen");
    function.control.lock().pace = Pace::Now;
    function.control.release();
    removed.recv_timeout(PATIENCE).unwrap();
    assert_eq!(stops(&function), [Call::Stop(0, stop(false, false))]);
}

#[test]
fn storage_that_never_answers_ends_within_the_bound() {
    let _alone = alone();
    let function = Function::new(4);
    let front = function.negotiated();
    let _memory = front.memory();
    for i in 0..4 {
        front.start(i);
    }
    function.control.lock().pace = Pace::AtBound;
    let start = Instant::now();
    remove(&function).recv_timeout(PATIENCE).unwrap();
    assert!(start.elapsed() < BOUND + Duration::from_secs(1));
    assert!(front.is_closed());
}
