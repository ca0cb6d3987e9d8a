//! Frames from one thread to another, and on one.
//!
//! Unsafe, because tests lend the rest of their frames.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bluff_memory::IoVec;
use bluff_reactor::{Handle, Options, Reactor};
use proptest::prelude::*;

use crate::mailbox::{self, Envelope};
use crate::*;

/// A frame as it was received.
type Got = (Vec<u8>, u32, Offload);

/// Keeps what it is given.
struct Keeper(Sender<Got>);

fn whole(batch: &Batch, i: usize) -> Got {
    let frame = &batch.frames()[i];
    let mut bytes = vec![0; frame.len()];
    assert_eq!(batch.copy_to(i, 0, &mut bytes), bytes.len());
    (bytes, frame.hash, frame.offload)
}

impl Receive for Keeper {
    fn receive(&mut self, batch: &Batch, which: &[u8]) {
        for i in which {
            let _ = self.0.send(whole(batch, usize::from(*i)));
        }
    }
}

/// Adds a frame; what is over a head is lent in two pieces.
fn push(batch: &mut Batch, bytes: &[u8], hash: u32) {
    let head = bytes.len().min(HEAD);
    batch.push(&bytes[..head]).expect("not empty").hash = hash;
    let rest = &bytes[head..];
    let (a, b) = rest.split_at(rest.len() / 3);
    let name = |s: &[u8]| IoVec::new(s.as_ptr().cast_mut(), s.len());
    // SAFETY: the callers keep the bytes until the batch is cleared.
    unsafe { batch.lend(&[name(a), name(b)]) };
}

fn bytes(seed: u64, len: usize) -> Vec<u8> {
    let mut rng = fastrand::Rng::with_seed(seed).fork();
    (0..len).map(|_| rng.u8(..)).collect()
}

/// A reactor on a thread of its own with a receiver.
struct Far {
    handle: Handle,
    thread: Option<JoinHandle<()>>,
    outlet: Outlet,
    got: std::sync::mpsc::Receiver<Got>,
}

thread_local! {
    static HERE: RefCell<Vec<Registration>> = const { RefCell::new(Vec::new()) };
}

/// Adds a receiver on a reactor.
fn add(handle: &Handle) -> (Outlet, std::sync::mpsc::Receiver<Got>) {
    let (outlets, outlet) = channel();
    let (sender, got) = channel();
    handle.send(move |cx| {
        let keeper = Rc::new(RefCell::new(Keeper(sender)));
        let registration = Registration::new(cx, keeper);
        let _ = outlets.send(registration.outlet().clone());
        HERE.with_borrow_mut(|here| here.push(registration));
    });
    (outlet.recv().expect("it is built"), got)
}

impl Far {
    fn new() -> Self {
        let (handle, thread) = Handle::spawn(Options::default()).unwrap();
        let (outlet, got) = add(&handle);
        Self {
            handle,
            thread: Some(thread),
            outlet,
            got,
        }
    }

    /// Runs something there and waits for it.
    fn run(&self, what: impl FnOnce() + Send + 'static) {
        let (sender, receiver) = channel();
        self.handle.send(move |_| {
            what();
            let _ = sender.send(());
        });
        receiver.recv().expect("it runs");
    }
}

impl Drop for Far {
    fn drop(&mut self) {
        self.handle.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

const PATIENCE: Duration = Duration::from_secs(20);

#[test]
fn frames_reach_another_reactor_whole_and_in_order() {
    let far = Far::new();
    let mut batch = Batch::default();
    let mut rng = fastrand::Rng::with_seed(7);
    for round in 0..bluff_testing::times(200, 20_000) as u64 {
        let sent: Vec<Vec<u8>> = (0..rng.u64(1..=8))
            .map(|i| {
                let len = match rng.u8(..4) {
                    0 => rng.usize(1..=HEAD),
                    1 => rng.usize(1..=2000),
                    2 => rng.usize(1..=MAX_FRAME),
                    _ => 60,
                };
                bytes(round * 100 + i, len)
            })
            .collect();
        batch.clear();
        for (i, frame) in sent.iter().enumerate() {
            push(&mut batch, frame, i as u32);
            let frame = &mut batch.frames_mut()[i];
            frame.offload.csum = [
                Csum::Unknown,
                Csum::Valid,
                Csum::Partial {
                    start: 34,
                    offset: i as u16,
                },
            ][i % 3];
            let kinds = [GsoKind::Tcp4, GsoKind::Tcp6, GsoKind::Udp];
            frame.offload.gso = (i % 4 != 3).then(|| Gso {
                kind: kinds[i % 4],
                ecn: i == 4,
                size: 1400 + i as u16,
                network: 14,
                transport: 34,
                headers: 54,
            });
        }
        let offloads: Vec<_> = batch.frames().iter().map(|f| f.offload).collect();
        let which: Vec<u8> = (0..sent.len() as u8).collect();
        let mut from = 0;
        while let Err((taken, cause)) = far.outlet.deliver(&batch, &which[from..]) {
            assert_eq!(cause, Cause::Congested);
            from += taken;
            std::thread::yield_now();
        }
        for (i, frame) in sent.iter().enumerate() {
            let got = far.got.recv_timeout(PATIENCE).expect("it arrives");
            assert!(got.0 == *frame, "the bytes of frame {i}");
            assert_eq!((got.1, got.2), (i as u32, offloads[i]));
        }
    }
}

#[test]
fn a_mailbox_is_bounded() {
    let far = Far::new();
    // Its reactor is away.
    let (block, blocked) = channel::<()>();
    far.handle.send(move |_| {
        let _ = blocked.recv();
    });
    let frame = bytes(1, 60_000);
    let mut batch = Batch::default();
    for i in 0..BATCH {
        push(&mut batch, &frame, i as u32);
    }
    let which: Vec<u8> = (0..BATCH as u8).collect();
    let (taken, cause) = far.outlet.deliver(&batch, &which).unwrap_err();
    assert_eq!(cause, Cause::Congested);
    assert!((10..BATCH).contains(&taken), "{taken}");
    drop(block);
    for i in 0..taken {
        let got = far.got.recv_timeout(PATIENCE).expect("it arrives");
        assert!(got.0 == frame && got.1 == i as u32);
    }
    // There is room again, as soon as the last ones are given up.
    let start = Instant::now();
    while far.outlet.deliver(&batch, &[0]).is_err() {
        assert!(start.elapsed() < PATIENCE);
    }
    assert_eq!(far.got.recv_timeout(PATIENCE).unwrap().1, 0);
}

/// A tenant whose receiver does not keep up, and others on the same reactor.
#[test]
fn one_that_is_flooded_leaves_room_for_others() {
    let far = Far::new();
    let others: Vec<_> = (0..3).map(|_| add(&far.handle)).collect();
    let (block, blocked) = channel::<()>();
    far.handle.send(move |_| {
        let _ = blocked.recv();
    });
    let frame = bytes(1, 1500);
    let mut batch = Batch::default();
    for i in 0..BATCH {
        push(&mut batch, &frame, i as u32);
    }
    let which: Vec<u8> = (0..BATCH as u8).collect();
    let flood = |outlet: &Outlet| {
        let mut sent = 0;
        loop {
            match outlet.deliver(&batch, &which) {
                Ok(()) => sent += BATCH,
                Err((taken, Cause::Congested)) => return sent + taken,
                Err(other) => panic!("{other:?}"),
            }
        }
    };
    // Half, then half of what is left, and so on: the last one has a whole batch at once all the same.
    let sent: Vec<_> = [&far.outlet, &others[0].0, &others[1].0].map(flood).into();
    assert!(sent[0] > 600 && sent[1] > 300 && sent[2] > 150, "{sent:?}");
    assert_eq!(others[2].0.deliver(&batch, &which), Ok(()));
    // More of the first ones is still refused.
    assert_eq!(
        far.outlet.deliver(&batch, &which),
        Err((0, Cause::Congested))
    );
    drop(block);
    let got = [&far.got, &others[0].1, &others[1].1, &others[2].1];
    for (got, sent) in got.into_iter().zip(sent.into_iter().chain([BATCH])) {
        for i in 0..sent {
            let frame = got.recv_timeout(PATIENCE).expect("it arrives");
            assert_eq!(frame.1 as usize, i % BATCH);
        }
    }
}

proptest! {
    /// What waits of each receiver, and what is free, as a model that has all frames in a list.
    #[test]
    fn shares_are_what_waits_and_what_is_free(
        steps in prop::collection::vec((0u32..4, 1usize..3000, 0usize..6), 1..300),
    ) {
        const ROOM: usize = 16 << 10;
        let (mut sender, mut receiver) = mailbox::channel(ROOM);
        let (mut batch, mut out) = (Batch::default(), Batch::default());
        let mut envelopes = [Envelope::default(); BATCH];
        let mut waiting: VecDeque<(u32, usize)> = VecDeque::new();
        for (slot, len, take) in steps {
            let frame = bytes(len as u64, len);
            batch.clear();
            push(&mut batch, &frame, 0);
            let to = Envelope { slot, generation: len as u32 };
            let size = (32 + len).next_multiple_of(16);
            let of = |which: Option<u32>| -> usize {
                let its = waiting.iter().filter(|(s, _)| which.is_none_or(|w| w == *s));
                its.map(|(_, size)| size).sum()
            };
            let free = ROOM - of(None);
            let fits = of(Some(slot)) < free && size <= free;
            let mut share = sender.share(to);
            prop_assert_eq!(sender.put_shared(&batch, 0, to, &mut share), fits);
            if fits {
                waiting.push_back((slot, size));
            }
            let taken = receiver.take(&mut out, &mut envelopes, |_, all| all.len().min(take));
            prop_assert!(taken <= take);
            waiting.drain(..taken);
            prop_assert_eq!(receiver.is_empty(), waiting.is_empty());
        }
    }
}

#[test]
fn what_is_for_one_that_has_gone_reaches_nobody() {
    let far = Far::new();
    far.run(|| HERE.with_borrow_mut(Vec::clear));
    let (next, got) = add(&far.handle);
    assert_ne!(next, far.outlet, "in the same place");
    let mut batch = Batch::default();
    batch.push(&[1; 60]);
    // The mailbox takes it, and its reactor finds nobody.
    far.outlet.deliver(&batch, &[0]).unwrap();
    batch.clear();
    batch.push(&[2; 60]);
    next.deliver(&batch, &[0]).unwrap();
    assert_eq!(got.recv_timeout(PATIENCE).unwrap().0, [2; 60]);
    assert!(far.got.try_recv().is_err());
}

#[test]
fn a_reactor_that_has_ended_takes_nothing() {
    let far = Far::new();
    let outlet = far.outlet.clone();
    let mut batch = Batch::default();
    batch.push(&[1; 60]);
    outlet.deliver(&batch, &[0]).unwrap();
    drop(far);
    let start = Instant::now();
    while outlet.deliver(&batch, &[0]).is_ok() {
        assert!(start.elapsed() < PATIENCE);
    }
    assert_eq!(outlet.deliver(&batch, &[0]), Err((0, Cause::LinkDown)));
}

#[test]
fn a_receiver_here_is_called() {
    std::thread::spawn(|| {
        let mut reactor = Reactor::new(&Options::default()).unwrap();
        let (sender, got) = channel();
        let keeper = Rc::new(RefCell::new(Keeper(sender)));
        let registration = Registration::new(&mut reactor.context(), keeper);
        let mut batch = Batch::default();
        for i in 0..4 {
            batch.push(&[i; 60]);
        }
        registration.outlet().deliver(&batch, &[2, 0]).unwrap();
        let first: Vec<u8> = got.try_iter().map(|g| g.0[0]).collect();
        assert_eq!(first, [2, 0], "no turn was needed");
        let outlet = registration.outlet().clone();
        drop(registration);
        assert_eq!(outlet.deliver(&batch, &[0]), Err((0, Cause::LinkDown)));
    })
    .join()
    .unwrap();
}

#[test]
fn a_pair_carries_both_ways_by_the_hash() {
    let far = Far::new();
    let (second, got_second) = add(&far.handle);
    let (a, b) = Pair::new();
    b.set_receivers(Arc::new(Receivers {
        queues: vec![Some(far.outlet.clone()), Some(second)],
        steering: Steering::Spread(2),
    }));
    let mut reactor = Reactor::new(&Options::default()).unwrap();
    let mut lane = a.open(&mut reactor.context(), 0).unwrap();
    let mut batch = Batch::default();
    for hash in [0, u32::MAX, 1, 0x8000_0000] {
        push(&mut batch, &[7; 60], hash);
    }
    lane.send(Instant::now(), batch.lent());
    let hashes = |got: &std::sync::mpsc::Receiver<Got>| {
        let two = [got.recv_timeout(PATIENCE), got.recv_timeout(PATIENCE)];
        two.map(|g| g.unwrap().1)
    };
    assert_eq!(hashes(&far.got), [0, 1]);
    assert_eq!(hashes(&got_second), [u32::MAX, 0x8000_0000]);
    // Nobody is at the other end.
    let mut lane = b.open(&mut reactor.context(), 0).unwrap();
    lane.send(Instant::now(), batch.lent());
    assert!(far.got.try_recv().is_err() && got_second.try_recv().is_err());
    // To oneself.
    let loopback = Pair::loopback();
    loopback.set_receivers(Arc::new(Receivers {
        queues: vec![Some(far.outlet.clone())],
        steering: Steering::Spread(1),
    }));
    let mut lane = loopback.open(&mut reactor.context(), 0).unwrap();
    lane.send(Instant::now(), batch.lent());
    assert_eq!(far.got.recv_timeout(PATIENCE).unwrap().1, 0);
}

#[test]
fn places_follow_what_is_put_in_front() {
    let mut batch = Batch::default();
    let frame = batch.push(&[9; 100]).unwrap();
    frame.offload = Offload {
        csum: Csum::Partial {
            start: 34,
            offset: 16,
        },
        gso: Some(Gso {
            kind: GsoKind::Tcp4,
            ecn: false,
            size: 10,
            network: 14,
            transport: 34,
            headers: 54,
        }),
    };
    assert_eq!(frame.offload.gso.unwrap().segments(frame.len()), 5);
    frame.prepend(50).fill(1);
    assert_eq!((frame.len(), frame.headroom()), (150, HEADROOM - 50));
    let moved = frame.offload;
    assert_eq!(moved.gso.unwrap().headers, 104);
    assert!(matches!(moved.csum, Csum::Partial { start: 84, .. }));
    frame.strip(50);
    assert!(frame.head() == [9; 100]);
    assert_eq!(frame.offload.gso.unwrap().headers, 54);
    // A tag behind the addresses, and out again.
    let tag = [0x81, 0, 0, 7];
    frame.insert(12, &tag);
    assert_eq!(frame.head()[..16], [[9; 12].as_slice(), &tag].concat());
    assert_eq!(
        (frame.len(), frame.offload.gso.unwrap().transport),
        (104, 38)
    );
    frame.remove(12, 4);
    assert!(frame.head() == [9; 100]);
    let needs = frame.offload.needs(true);
    assert_eq!(needs, Offloads::CSUM | Offloads::TSO4);
}

proptest! {
    /// Any frames, in any portions: out comes what went in.
    #[test]
    fn a_mailbox_gives_back_what_was_put_in(
        script in prop::collection::vec((1usize..70_000, any::<bool>()), 1..60),
    ) {
        let (mut sender, mut receiver) = mailbox::channel(mailbox::SIZE);
        let mut batch = Batch::default();
        let mut out = Batch::default();
        let mut envelopes = [Envelope::default(); BATCH];
        let mut waiting = VecDeque::new();
        let source = bytes(3, 70_000);
        let mut take = |waiting: &mut VecDeque<(u32, usize)>, receiver: &mut mailbox::Receiver| {
            receiver.take(&mut out, &mut envelopes, |batch, envelopes| {
                for (i, to) in envelopes.iter().enumerate() {
                    let (slot, len) = waiting.pop_front().expect("no more than went in");
                    assert_eq!((to.slot, to.generation), (slot, !slot));
                    assert!(whole(&batch, i).0 == source[..len]);
                }
                envelopes.len()
            })
        };
        for (slot, (len, taken)) in script.into_iter().enumerate() {
            let slot = slot as u32;
            batch.clear();
            push(&mut batch, &source[..len], 0);
            let to = Envelope { slot, generation: !slot };
            if sender.put(&batch, 0, to) {
                waiting.push_back((slot, len));
            } else {
                prop_assert!(waiting.iter().map(|w| w.1).sum::<usize>() > 900_000, "it was full");
            }
            if taken {
                take(&mut waiting, &mut receiver);
            }
        }
        while take(&mut waiting, &mut receiver) > 0 {}
        prop_assert!(waiting.is_empty() && receiver.is_empty() && !receiver.is_over());
        drop(sender);
        prop_assert!(receiver.is_over());
    }
}

/// A backlog keeps its order, and what does not fit is refused.
#[test]
fn a_backlog_is_drained_in_portions() {
    let mut backlog = Backlog::default();
    let mut batch = Batch::default();
    let frames: Vec<_> = (0..400).map(|i| bytes(i, 700 + i as usize)).collect();
    let mut kept = 0;
    for frame in &frames {
        batch.clear();
        push(&mut batch, frame, 5);
        if !backlog.push(&batch, 0) {
            break;
        }
        kept += 1;
    }
    assert!((100..frames.len()).contains(&kept), "{kept}");
    let (mut seen, mut portion) = (0, 0);
    while !backlog.is_empty() {
        portion = (portion + 7) % 40;
        let mut left = portion;
        backlog.drain(|batch, i| {
            if left == 0 {
                return false;
            }
            left -= 1;
            assert!(whole(&batch, i).0 == frames[seen] && batch.frames()[i].hash == 5);
            seen += 1;
            true
        });
    }
    assert_eq!(seen, kept);
}

/// Also what they lend, whose pieces are one where they lie one behind the other.
#[test]
fn one_that_is_taken_away_leaves_the_others_as_they_are() {
    let frames: Vec<_> = [60, 1000, 300, 64, 5000]
        .iter()
        .zip(1..)
        .map(|(len, seed)| bytes(seed, *len))
        .collect();
    for gone in 0..frames.len() {
        let mut batch = Batch::default();
        for (frame, hash) in frames.iter().zip(0..) {
            push(&mut batch, frame, hash);
        }
        batch.remove(gone);
        let left = (0..frames.len()).filter(|i| *i != gone);
        assert_eq!(batch.frames().len(), frames.len() - 1);
        for (at, i) in left.enumerate() {
            let (bytes, hash, _) = whole(&batch, at);
            assert!(
                bytes == frames[i] && hash == i as u32,
                "{i} of all but {gone}"
            );
            assert_eq!(batch.tail(at).len(), usize::from(frames[i].len() > HEAD));
        }
        // What comes next begins afresh.
        push(&mut batch, &frames[1], 9);
        assert_eq!(whole(&batch, frames.len() - 1).0, frames[1]);
    }
}
