//! What the layers do, with a clock of the test's own.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bluff_block::conformance::{Line, Memory, Rig};
use bluff_block::{BlockError, Cancel, Kind, Op, Tag, Volume, ram::Ram};
use bluff_layers::delay::When;
use bluff_layers::fault::{Action, FaultOptions, Kinds};
use bluff_layers::{Delay, DelayOptions, Fault, OptionError};
use bluff_reactor::UringUse;

const WRITE: Kind = Kind::Write { fua: false };
const MS: Duration = Duration::from_millis(1);

fn ram() -> Arc<dyn Volume> {
    Arc::new(Ram::new(512, 8 << 20).unwrap())
}

fn flush(tag: u64) -> Op {
    Op::without_data(Tag(tag), Kind::Flush, 0, 0)
}

fn results(line: &mut Line) -> Vec<(u64, Result<(), BlockError>)> {
    line.take().iter().map(|c| (c.tag.0, c.result)).collect()
}

#[test]
fn a_delay_lasts_as_long_as_it_says() {
    for when in [When::Before, When::After] {
        let options = DelayOptions {
            read: 10 * MS,
            write: 30 * MS,
            range: Some(0..4096),
            when,
            ..DelayOptions::default()
        };
        let volume = Delay::new(ram(), options);
        let mut rig = Rig::new(UringUse::Off);
        let mut line = rig.open(&volume);
        let memory = Memory::whole(512);
        line.submit(&[
            memory.op(1, WRITE, 0),
            memory.op(2, Kind::Read, 512),
            memory.op(3, Kind::Read, 4096),
            flush(4),
        ]);
        line.kick();
        let start = Instant::now();
        assert_eq!(
            line.poll(start),
            2,
            "outside of the range, and a kind without delay"
        );
        assert_eq!(results(&mut line), [(3, Ok(())), (4, Ok(()))]);
        assert_eq!(line.deadline(), Some(start + 10 * MS));
        assert_eq!(line.poll(start + 9 * MS), 0);
        assert_eq!(line.poll(start + 10 * MS), 1);
        assert_eq!(results(&mut line), [(2, Ok(()))]);
        assert_eq!(line.deadline(), Some(start + 30 * MS));
        assert_eq!(line.poll(start + 29 * MS), 0);
        assert_eq!(line.poll(start + 31 * MS), 1);
        assert_eq!(results(&mut line), [(1, Ok(()))]);
        assert_eq!(line.deadline(), None);
    }
}

/// Before: nothing has happened while it is held. After: it has.
#[test]
fn a_held_write() {
    for (when, seen) in [(When::Before, 0), (When::After, 7)] {
        let inner = ram();
        let options = DelayOptions {
            write: 3600 * 1000 * MS,
            when,
            ..DelayOptions::default()
        };
        let volume = Delay::new(inner.clone(), options);
        let mut rig = Rig::new(UringUse::Off);
        let (mut line, mut below) = (rig.open(&volume), rig.open(&*inner));
        let memory = Memory::whole(512);
        memory.set(&[7; 512]);
        line.submit(&[memory.op(1, WRITE, 0)]);
        line.kick();
        assert_eq!(line.poll(Instant::now()), 0);
        let got = Memory::whole(512);
        assert_eq!(rig.one(&mut below, got.op(1, Kind::Read, 0)), Ok(()));
        assert_eq!(got.get(), [seen; 512], "{when:?}");
        assert_eq!(line.cancel(Tag(1)), Cancel::Soon);
        assert_eq!(line.poll(Instant::now()), 1);
        let result = match when {
            When::Before => Err(BlockError::Cancelled),
            When::After => Ok(()),
        };
        assert_eq!(results(&mut line), [(1, result)]);
    }
}

#[test]
fn jitter_and_rate() {
    let options = DelayOptions {
        flush: 10 * MS,
        jitter: 10 * MS,
        rate: 0.5,
        ..DelayOptions::default()
    };
    let volume = Delay::new(ram(), options);
    let mut rig = Rig::new(UringUse::Off);
    let mut line = rig.open(&volume);
    let ops: Vec<Op> = (0..1000).map(flush).collect();
    assert_eq!(line.submit(&ops), 1000);
    let start = Instant::now();
    let at_once = line.poll(start);
    assert!((400..600).contains(&at_once), "half of them: {at_once}");
    assert_eq!(line.poll(start + 10 * MS - MS / 10), 0);
    let soon = line.poll(start + 15 * MS);
    assert!(
        soon > 150 && at_once + soon < 900,
        "spread over the jitter: {soon}"
    );
    line.poll(start + 20 * MS);
    assert_eq!(line.in_flight(), 0);
}

#[test]
fn errors_by_kind_range_and_count() {
    let fault = FaultOptions {
        kinds: Kinds {
            write: true,
            ..Kinds::NONE
        },
        range: Some(4096..8192),
        skip: 2,
        count: Some(3),
        ..FaultOptions::all(Action::Error(BlockError::NoSpace))
    };
    let volume = Fault::new(ram(), vec![fault]);
    let mut rig = Rig::new(UringUse::Off);
    let mut line = rig.open(&volume);
    let memory = Memory::whole(512);
    let mut run = |kind, at| rig.one(&mut line, memory.op(1, kind, at));
    let failed = Err(BlockError::NoSpace);
    for expected in [Ok(()), Ok(()), failed, failed, failed, Ok(())] {
        assert_eq!(run(Kind::Read, 4096), Ok(()));
        assert_eq!(run(WRITE, 8192), Ok(()));
        assert_eq!(run(WRITE, 0), Ok(()));
        assert_eq!(run(WRITE, 8192 - 512), expected);
    }
    assert_eq!(volume.handle().struck(), 3);
}

#[test]
fn a_torn_write_is_a_prefix_of_blocks_and_an_error() {
    let inner = ram();
    let volume = Fault::new(inner.clone(), vec![FaultOptions::all(Action::Torn)]);
    let mut rig = Rig::new(UringUse::Off);
    let (mut line, mut below) = (rig.open(&volume), rig.open(&*inner));
    let mut lengths = Vec::new();
    for round in 1..40u8 {
        let memory = Memory::new(8192, || 700);
        memory.set(&[round; 8192]);
        let got = rig.one(&mut line, memory.op(1, WRITE, 0));
        assert_eq!(got, Err(BlockError::Io));
        let after = Memory::whole(8192);
        assert_eq!(rig.one(&mut below, after.op(1, Kind::Read, 0)), Ok(()));
        let after = after.get();
        let written = after.iter().take_while(|&&b| b == round).count();
        assert!(written < 8192 && written.is_multiple_of(512));
        assert!(after[written..].iter().all(|&b| b != round));
        lengths.push(written);
    }
    assert!(
        lengths.iter().any(|&n| n != lengths[0]),
        "of different lengths"
    );
}

#[test]
fn completions_out_of_order() {
    let volume = Fault::new(ram(), vec![FaultOptions::all(Action::Reorder(16))]);
    let mut rig = Rig::new(UringUse::Off);
    let mut line = rig.open(&volume);
    let ops: Vec<Op> = (0..16).map(flush).collect();
    let order: Vec<u64> = rig.run(&mut line, &ops).iter().map(|c| c.tag.0).collect();
    let mut sorted = order.clone();
    sorted.sort_unstable();
    assert_eq!(sorted, (0..16).collect::<Vec<_>>());
    assert_ne!(order, sorted);
}

#[test]
fn faults_are_switched_while_it_is_in_use() {
    let volume = Fault::silent(ram());
    let handle = volume.handle();
    let mut rig = Rig::new(UringUse::Off);
    let mut line = rig.open(&volume);
    line.submit(&[flush(1), flush(2)]);
    line.kick();
    assert_eq!(line.poll(Instant::now()), 0);
    handle.clear();
    assert_eq!(
        rig_one_more(&mut rig, &mut line),
        [(3, Ok(()))],
        "the stalled stay so"
    );
    assert_eq!(line.cancel(Tag(1)), Cancel::Soon);
    let resume = std::thread::spawn(move || handle.resume());
    // The handle wakes the channel's reactor.
    rig.wait(&mut line, usize::MAX);
    resume.join().unwrap();
    let mut got = results(&mut line);
    got.sort_unstable_by_key(|r| r.0);
    assert_eq!(got, [(1, Err(BlockError::Cancelled)), (2, Ok(()))]);
    volume
        .handle()
        .set(vec![FaultOptions::all(Action::Error(BlockError::Io))]);
    assert_eq!(rig.one(&mut line, flush(4)), Err(BlockError::Io));
}

fn rig_one_more(rig: &mut Rig, line: &mut Line) -> Vec<(u64, Result<(), BlockError>)> {
    line.submit(&[flush(3)]);
    line.kick();
    rig.wait(line, 1);
    results(line)
}

fn options(all: &[(&str, &str)]) -> BTreeMap<String, String> {
    all.iter()
        .map(|(k, v)| ((*k).into(), (*v).into()))
        .collect()
}

#[test]
fn options_of_delay() {
    let read = DelayOptions::from_options(&options(&[
        ("read", "2ms"),
        ("write", "150us"),
        ("jitter", "1s"),
        ("range", "4KiB-1MiB"),
        ("rate", "0.25"),
        ("when", "after"),
        ("seed", "9"),
    ]));
    let expected = DelayOptions {
        read: 2 * MS,
        write: Duration::from_micros(150),
        jitter: Duration::from_secs(1),
        range: Some(4096..1 << 20),
        rate: 0.25,
        when: When::After,
        seed: 9,
        ..DelayOptions::default()
    };
    assert_eq!(read, Ok(expected));
    for (key, value) in [
        ("read", "2"),
        ("read", "fast"),
        ("read", "2 ms"),
        ("range", "1MiB-4KiB"),
        ("range", "4096"),
        ("rate", "1.5"),
        ("rate", "NaN"),
        ("when", "never"),
        ("seed", "-1"),
    ] {
        match DelayOptions::from_options(&options(&[(key, value)])) {
            Err(OptionError::Value { name, value: v, .. }) => {
                assert_eq!((&*name, &*v), (key, value));
            }
            other => panic!("{key}={value}: {other:?}"),
        }
    }
    let wrong = DelayOptions::from_options(&options(&[("raed", "2ms")])).unwrap_err();
    let said = wrong.to_string();
    assert!(
        said.contains("raed") && said.contains("read, write"),
        "{said}"
    );
}

#[test]
fn options_of_fault() {
    let read = FaultOptions::from_options(&options(&[
        ("action", "error"),
        ("error", "nospace"),
        ("kinds", "write,flush"),
        ("range", "0-64KiB"),
        ("skip", "5"),
        ("count", "1"),
    ]));
    let expected = FaultOptions {
        kinds: Kinds {
            write: true,
            flush: true,
            ..Kinds::NONE
        },
        range: Some(0..65536),
        skip: 5,
        count: Some(1),
        ..FaultOptions::all(Action::Error(BlockError::NoSpace))
    };
    assert_eq!(read, Ok(expected));
    let reorder = FaultOptions::from_options(&options(&[("action", "reorder"), ("window", "4")]));
    assert_eq!(reorder.unwrap().action, Action::Reorder(4));
    assert_eq!(
        FaultOptions::from_options(&options(&[("error", "io")])),
        Err(OptionError::Missing("action"))
    );
    for wrong in [("action", "explode"), ("kinds", "reads"), ("error", "EIO")] {
        let all = options(&[("action", "stall"), wrong]);
        assert!(matches!(
            FaultOptions::from_options(&all),
            Err(OptionError::Value { name, .. }) if name == wrong.0
        ));
    }
}
