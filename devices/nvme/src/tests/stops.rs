//! Ends, of all kinds, while storage does not answer.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bluff_block::Kind;
use bluff_memory::GuestMemory;
use bluff_pci::Dma;

use crate::fuzzing::host::{
    BASE, DATA, Host, LONG, OK, Plan, Queues, REGION, blocks, code, memory, read, slow, status,
    with_sgl, write,
};
use crate::fuzzing::slow::Desk;
use crate::namespace::{Namespace, Namespaces};
use crate::report::QueueEvent;
use crate::spec::{Status, io};
use crate::worker::Message;

const SIZE: u64 = 4 << 20;

fn rig() -> (Host, Queues, Arc<Desk>) {
    let (volume, desk) = slow(SIZE, |_| {});
    let mut host = Host::new(vec![Namespace::new(1, volume, 9)]);
    let queues = host.create(1, &Plan::default());
    desk.hold(true);
    (host, queues, desk)
}

/// Puts a command and tells; it is begun.
fn begin(host: &mut Host, queues: &mut Queues, command: crate::spec::Command) -> u16 {
    let cid = host.put(queues, 0, command);
    host.tell_tail(queues, 0);
    host.turns(20);
    cid
}

/// Storage answers from now on.
fn release(host: &mut Host, queues: &Queues, desk: &Desk) {
    desk.hold(false);
    queues.worker.ring();
    host.turns(50);
}

fn over(flag: &Mutex<bool>) -> bool {
    *flag.lock().unwrap()
}

#[test]
fn c07_a_stop_ends_commands_of_several_steps() {
    let two = 2 * 128 * 1024 / 512;
    let compare = with_sgl(blocks(io::COMPARE, 1, 0, two, 0), DATA, two * 512);
    let mut copy = blocks(io::COPY, 1, 4096, 1, DATA);
    copy.cdw12 = 0.into();
    for command in [
        compare,
        copy,
        blocks(io::VERIFY, 1, 0, two, 0),
        blocks(io::WRITE_ZEROES, 1, 0, 8192, 0),
    ] {
        for patience in [true, false] {
            let (mut host, mut queues, desk) = rig();
            // One source range of many blocks.
            host.memory.write(DATA, &[0; 32]).unwrap();
            host.memory
                .write(DATA + 16, &1000u16.to_le_bytes())
                .unwrap();
            begin(&mut host, &mut queues, command);
            let first = desk.take();
            assert_eq!(first.len(), 1, "the first step");
            let bound = if patience { LONG } else { Duration::ZERO };
            let flag = host.send(&queues, |done| Message::Stop {
                bound,
                answer: false,
                done,
            });
            host.turns(20);
            if patience {
                assert!(!over(&flag), "it has its time");
                release(&mut host, &queues, &desk);
            }
            host.until(|_| over(&flag).then_some(()));
            assert_eq!(desk.take(), [], "no other step begins");
            assert_eq!(desk.held(), 0);
            assert_eq!(host.reap(&mut queues), [], "and nobody is told");
            assert_eq!(desk.locks.load(Ordering::Relaxed), 0);
        }
    }
}

#[test]
fn commands_that_wait_for_a_buffer_end_too() {
    let (mut host, mut queues, desk) = rig();
    for _ in 0..7 {
        begin(&mut host, &mut queues, blocks(io::VERIFY, 1, 0, 1024, 0));
    }
    assert_eq!(desk.take().len(), 4, "so many buffers there are");
    let flag = host.send(&queues, |done| Message::Stop {
        bound: LONG,
        answer: false,
        done,
    });
    release(&mut host, &queues, &desk);
    host.until(|_| over(&flag).then_some(()));
    assert_eq!(desk.take(), []);
    // They are served one after the other where nothing ends.
    let (mut host, mut queues, desk) = rig();
    for _ in 0..7 {
        begin(&mut host, &mut queues, blocks(io::VERIFY, 1, 0, 1024, 0));
    }
    release(&mut host, &queues, &desk);
    let mut seen = 0;
    host.until(|host| {
        seen += host.reap(&mut queues).len();
        (seen == 7).then_some(())
    });
}

#[test]
fn c17_a_write_that_was_not_submitted_never_is() {
    let (mut host, mut queues, desk) = rig();
    for i in 0..20 {
        host.put(&mut queues, 0, write(100 + i * 8, 8, DATA));
    }
    host.tell_tail(&queues, 0);
    host.turns(20);
    let taken = desk.take();
    assert_eq!(taken.len(), 8, "the channel is busy with these");
    host.stop(&queues, false, Duration::ZERO);
    desk.hold(false);
    // Others begin where these were.
    let mut queues = host.create(1, &Plan::default());
    for i in 0..20 {
        host.put(&mut queues, 0, read(1000 + i, 1, DATA));
    }
    host.tell_tail(&queues, 0);
    host.turns(50);
    assert_eq!(host.reap(&mut queues).len(), 20);
    let asked = desk.take();
    assert_eq!(asked.len(), 20);
    assert!(asked.iter().all(|a| a.0 == Kind::Read && a.1 >= 1000 * 512));
}

#[test]
fn a_stop_that_answers() {
    for patience in [true, false] {
        let (mut host, mut queues, desk) = rig();
        begin(&mut host, &mut queues, write(1, 1, DATA));
        begin(&mut host, &mut queues, blocks(io::VERIFY, 1, 0, 1024, 0));
        let flag = host.send(&queues, |done| Message::Stop {
            bound: if patience { LONG } else { Duration::ZERO },
            answer: true,
            done,
        });
        // What comes now is not taken.
        begin(&mut host, &mut queues, write(2, 1, DATA));
        if patience {
            release(&mut host, &queues, &desk);
        }
        host.until(|_| over(&flag).then_some(()));
        let status: Vec<_> = host.reap(&mut queues).iter().map(status).collect();
        let wanted = match patience {
            true => OK,
            false => code(Status::ABORTED_SQ_DELETION),
        };
        assert_eq!(status, [wanted, wanted]);
    }
}

#[test]
fn a_stop_waits_for_what_cannot_be_cancelled() {
    let (mut host, mut queues, desk) = rig();
    desk.stubborn.store(true, Ordering::Relaxed);
    begin(&mut host, &mut queues, read(1, 1, DATA));
    let flag = host.send(&queues, |done| Message::Stop {
        bound: Duration::ZERO,
        answer: false,
        done,
    });
    host.turns(500);
    assert!(!over(&flag));
    release(&mut host, &queues, &desk);
    host.until(|_| over(&flag).then_some(()));
}

#[test]
fn a_submission_queue_is_deleted() {
    for patience in [true, false] {
        let (volume, desk) = slow(SIZE, |_| {});
        let mut host = Host::new(vec![Namespace::new(1, volume, 9)]);
        let plan = Plan {
            sqs: 2,
            ..Plan::default()
        };
        let mut queues = host.create(1, &plan);
        desk.hold(true);
        begin(&mut host, &mut queues, write(1, 1, DATA));
        host.put(&mut queues, 1, write(2, 1, DATA));
        host.tell_tail(&queues, 1);
        host.turns(20);
        let flag = host.send(&queues, |done| Message::DeleteSq {
            qid: 1,
            bound: if patience { LONG } else { Duration::ZERO },
            done,
        });
        host.turns(5);
        // It is not taken any more.
        begin(&mut host, &mut queues, write(3, 1, DATA));
        if patience {
            assert!(!over(&flag));
            release(&mut host, &queues, &desk);
        }
        host.until(|_| over(&flag).then_some(()));
        let found = host.reap(&mut queues);
        let of = |sq: u16| {
            let of = found.iter().filter(|e| e.sq_id.get() == sq);
            of.map(status).collect::<Vec<_>>()
        };
        match patience {
            true => assert_eq!((of(1), of(2)), (vec![OK], vec![OK])),
            false => {
                assert_eq!(of(1), [code(Status::ABORTED_SQ_DELETION)]);
                assert!(of(2).is_empty());
            }
        }
        release(&mut host, &queues, &desk);
        host.reap(&mut queues);
        // One of the same number begins anew; a queue that is not there is gone.
        queues.sqs.remove(0);
        host.add_sq(&mut queues, 1, 32);
        host.turns(2);
        host.put(&mut queues, 1, write(5, 1, DATA));
        host.tell_tail(&queues, 1);
        let entry = host.until(|host| host.reap(&mut queues).pop());
        assert_eq!((entry.sq_id.get(), entry.sq_head.get()), (1, 1));
        host.tell(&queues, |done| Message::DeleteSq {
            qid: 9,
            bound: LONG,
            done,
        });
    }
}

fn abort(host: &mut Host, queues: &Queues, cid: u16) -> Arc<Mutex<Option<bool>>> {
    let reply = Arc::new(Mutex::new(None));
    let to = reply.clone();
    queues.worker.send(Message::Abort {
        sqid: 1,
        cid,
        reply: Box::new(move |aborted| *to.lock().unwrap() = Some(aborted)),
    });
    host.turns(20);
    reply
}

#[test]
fn aborts() {
    let (mut host, mut queues, desk) = rig();
    let cids: Vec<u16> = (0..12)
        .map(|i| begin(&mut host, &mut queues, write(i, 1, DATA)))
        .collect();
    // In the channel's hands, and in ours.
    for cid in [cids[0], cids[11]] {
        let reply = abort(&mut host, &queues, cid);
        assert_eq!(*reply.lock().unwrap(), Some(true));
        let found = host.reap(&mut queues);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].cid.get(), cid);
        assert_eq!(status(&found[0]), code(Status::ABORT_REQUESTED));
    }
    // Not there any more, or never.
    for cid in [cids[0], 0xffff] {
        let reply = abort(&mut host, &queues, cid);
        assert_eq!(*reply.lock().unwrap(), Some(false));
    }
    // Not to be taken back: that is said at once, and it ends when it ends.
    desk.stubborn.store(true, Ordering::Relaxed);
    let reply = abort(&mut host, &queues, cids[1]);
    assert_eq!(*reply.lock().unwrap(), Some(false));
    assert_eq!(host.reap(&mut queues), []);
    release(&mut host, &queues, &desk);
    let found = host.reap(&mut queues);
    assert!(found.len() == 10 && found.iter().all(|e| status(e) == OK));
    assert!(desk.take().iter().all(|a| a.1 != 11 * 512));
}

#[test]
fn c08_a_format_drains_first() {
    let (mut host, mut queues, desk) = rig();
    begin(&mut host, &mut queues, write(1, 1, DATA));
    host.namespaces[0].block(true);
    let flag = host.send(&queues, |done| Message::Drain {
        nsid: 1,
        bound: LONG,
        done,
    });
    begin(&mut host, &mut queues, write(2, 1, DATA));
    assert!(!over(&flag));
    let found = host.reap(&mut queues);
    assert_eq!(found.len(), 1);
    assert_eq!(status(&found[0]), code(Status::FORMAT_IN_PROGRESS));
    release(&mut host, &queues, &desk);
    assert!(over(&flag));
    assert_eq!(host.reap(&mut queues).len(), 1);
    host.namespaces[0].block(false);
    assert_eq!(host.run(&mut queues, write(2, 1, DATA)), OK);
    // Within a bound.
    desk.hold(true);
    begin(&mut host, &mut queues, write(1, 1, DATA));
    host.tell(&queues, |done| Message::Drain {
        nsid: crate::spec::ALL_NAMESPACES,
        bound: Duration::ZERO,
        done,
    });
    let found = host.reap(&mut queues);
    assert_eq!(status(&found[0]), code(Status::FORMAT_IN_PROGRESS));
}

#[test]
fn namespaces_come_and_go() {
    let (mut host, mut queues, desk) = rig();
    let (other, _) = slow(SIZE, |_| {});
    begin(&mut host, &mut queues, write(1, 1, DATA));
    let table = Namespaces::new(16, vec![Namespace::new(7, other, 12)]);
    let flag = host.send(&queues, |done| Message::Namespaces {
        table,
        bound: LONG,
        done,
    });
    host.turns(20);
    assert!(!over(&flag));
    assert_eq!(
        host.run(&mut queues, write(1, 1, DATA)),
        code(Status::INVALID_FIELD)
    );
    let seven = with_sgl(blocks(io::READ, 7, 0, 1, 0), DATA, 4096);
    assert_eq!(host.run(&mut queues, seven), OK);
    release(&mut host, &queues, &desk);
    assert!(over(&flag));
    assert_eq!(host.reap(&mut queues).len(), 1);
    assert_eq!(desk.locks.load(Ordering::Relaxed), 0, "let go of");
    // Another one in its place; the first is there again; storage that does not answer is given up.
    let table = Namespaces::new(16, host.namespaces.clone());
    host.tell(&queues, |done| Message::Namespaces {
        table,
        bound: LONG,
        done,
    });
    desk.hold(true);
    begin(&mut host, &mut queues, write(1, 1, DATA));
    host.tell(&queues, |done| Message::Namespaces {
        table: Namespaces::new(16, Vec::new()),
        bound: Duration::ZERO,
        done,
    });
    let found = host.reap(&mut queues);
    assert_eq!(status(&found[0]), code(Status::INVALID_NAMESPACE));
    assert_eq!((desk.held(), desk.locks.load(Ordering::Relaxed)), (0, 0));
}

/// Found by the fuzzer: one that is detached and attached again while it has commands in flight.
#[test]
fn a_namespace_comes_back_while_it_goes() {
    let (mut host, mut queues, desk) = rig();
    begin(&mut host, &mut queues, write(1, 1, DATA));
    let mut over_ = Vec::new();
    for namespaces in [Vec::new(), host.namespaces.clone()] {
        let table = Namespaces::new(16, namespaces);
        over_.push(host.send(&queues, |done| Message::Namespaces {
            table,
            bound: LONG,
            done,
        }));
        host.turns(5);
    }
    begin(&mut host, &mut queues, write(2, 1, DATA));
    release(&mut host, &queues, &desk);
    assert!(over_.iter().all(|o| over(o)));
    assert_eq!(host.reap(&mut queues).len(), 2);
    assert_eq!(host.run(&mut queues, write(3, 1, DATA)), OK);
    assert_eq!(desk.locks.load(Ordering::Relaxed), 1);
}

fn set_dma(host: &mut Host, queues: &Queues, dma: Dma, bound: Duration) -> Arc<Mutex<bool>> {
    let flag = host.send(queues, |done| Message::Dma { dma, bound, done });
    host.turns(20);
    flag
}

#[test]
fn memory_that_goes_is_waited_for() {
    for patience in [true, false] {
        let (mut host, mut queues, desk) = rig();
        let far = BASE + REGION;
        let kept = begin(&mut host, &mut queues, read(1, 1, DATA));
        // Over the border.
        let gone = begin(&mut host, &mut queues, read(2, 2, far - 512));
        let old = Arc::downgrade(&host.memory);
        host.memory = memory(&host.memory, 1);
        let bound = if patience { LONG } else { Duration::ZERO };
        let dma = Dma::On(host.memory.clone());
        let flag = set_dma(&mut host, &queues, dma, bound);
        if patience {
            assert!(!over(&flag) && old.strong_count() > 0);
            release(&mut host, &queues, &desk);
        }
        host.until(|_| over(&flag).then_some(()));
        assert_eq!(old.strong_count(), 0, "nothing has it any more");
        if !patience {
            assert_eq!(desk.held(), 1, "the other one goes on");
            release(&mut host, &queues, &desk);
        }
        for entry in host.reap(&mut queues) {
            let wanted = match (patience, entry.cid.get() == gone) {
                (false, true) => code(Status::DATA_TRANSFER_ERROR),
                _ => OK,
            };
            assert_eq!(status(&entry), wanted);
            assert!([kept, gone].contains(&entry.cid.get()));
        }
        let command = read(0, 1, far);
        assert_eq!(
            host.run(&mut queues, command),
            code(Status::DATA_TRANSFER_ERROR)
        );
    }
}

/// A thread that was away finds a deadline and completions at once: what is done by then is done.
#[test]
fn a_deadline_that_is_seen_late() {
    let bound = Duration::from_millis(100);
    let messages: [fn(Duration, bluff_pci::Done) -> Message; 4] = [
        |bound, done| Message::Dma {
            dma: Dma::On(GuestMemory::empty()),
            bound,
            done,
        },
        |bound, done| Message::Drain {
            nsid: 1,
            bound,
            done,
        },
        |bound, done| Message::DeleteSq {
            qid: 1,
            bound,
            done,
        },
        |bound, done| Message::Stop {
            bound,
            answer: true,
            done,
        },
    ];
    for message in messages {
        // Again, where even this took too long.
        while !is_done_in_time(bound, message) {}
    }
}

/// `false`: the deadline was seen before the storage had answered.
fn is_done_in_time(bound: Duration, message: fn(Duration, bluff_pci::Done) -> Message) -> bool {
    let (mut host, mut queues, desk) = rig();
    begin(&mut host, &mut queues, write(1, 1, DATA));
    let start = Instant::now();
    let flag = host.send(&queues, |done| message(bound, done));
    host.rest();
    if start.elapsed() > bound {
        return false;
    }
    assert!(!over(&flag));
    // Nobody is woken by it.
    desk.hold(false);
    std::thread::sleep(2 * bound);
    host.until(|_| over(&flag).then_some(()));
    let memory = host.memory.clone();
    host.send(&queues, |done| Message::Dma {
        dma: Dma::On(memory),
        bound: LONG,
        done,
    });
    let entry = host.until(|host| host.reap(&mut queues).pop());
    assert_eq!(status(&entry), OK);
    true
}

#[test]
fn bus_mastering_goes_and_comes_back() {
    let (mut host, mut queues, desk) = rig();
    begin(&mut host, &mut queues, write(1, 1, DATA));
    begin(&mut host, &mut queues, blocks(io::FLUSH, 1, 0, 1, 0));
    let flag = set_dma(&mut host, &queues, Dma::Off, LONG);
    assert!(!over(&flag));
    release(&mut host, &queues, &desk);
    assert!(over(&flag));
    // What is done is told when it can be; what comes waits.
    host.put(&mut queues, 0, read(1, 1, DATA));
    host.tell_tail(&queues, 0);
    host.turns(20);
    assert_eq!(host.reap(&mut queues), []);
    let memory = host.memory.clone();
    host.tell(&queues, |done| Message::Dma {
        dma: Dma::On(memory),
        bound: LONG,
        done,
    });
    host.turns(20);
    let found = host.reap(&mut queues);
    assert!(found.len() == 3 && found.iter().all(|e| status(e) == OK));
    // Storage that does not answer is given up, and the host may try again.
    desk.hold(true);
    begin(&mut host, &mut queues, read(1, 1, DATA));
    host.tell(&queues, |done| Message::Dma {
        dma: Dma::Off,
        bound: Duration::ZERO,
        done,
    });
    assert_eq!(desk.held(), 0);
    assert_eq!(host.reap(&mut queues), []);
    let memory = host.memory.clone();
    host.tell(&queues, |done| Message::Dma {
        dma: Dma::On(memory),
        bound: LONG,
        done,
    });
    let found = host.until(|host| host.reap(&mut queues).pop());
    assert_eq!(status(&found), code(Status::INTERRUPTED));
    // With nothing there, and then the end.
    host.tell(&queues, |done| Message::Dma {
        dma: Dma::Off,
        bound: LONG,
        done,
    });
    host.stop(&queues, true, LONG);
}

#[test]
fn a_queue_without_memory_waits_a_moment_and_is_broken_then() {
    let (mut host, mut queues, desk) = rig();
    begin(&mut host, &mut queues, read(1, 1, BASE + REGION));
    let both = host.memory.clone();
    let second = both.without(BASE).unwrap();
    host.tell(&queues, |done| Message::Dma {
        dma: Dma::On(second.clone()),
        bound: LONG,
        done,
    });
    release(&mut host, &queues, &desk);
    assert_eq!(host.told(), []);
    // It was only taken away and brought back.
    host.tell(&queues, |done| Message::Dma {
        dma: Dma::On(both.clone()),
        bound: LONG,
        done,
    });
    assert_eq!(status(&host.until(|host| host.reap(&mut queues).pop())), OK);
    assert_eq!(host.run(&mut queues, read(1, 1, DATA)), OK);
    // It does not come back.
    host.tell(&queues, |done| Message::Dma {
        dma: Dma::On(second),
        bound: LONG,
        done,
    });
    let told = loop {
        host.reactor.step(Some(Duration::from_secs(1)));
        if let Some(event) = host.told().pop() {
            break event;
        }
    };
    assert!(matches!(told, QueueEvent::Broken { .. }));
    host.memory = both;
    let memory: Arc<GuestMemory> = host.memory.clone();
    host.tell(&queues, |done| Message::Dma {
        dma: Dma::On(memory),
        bound: LONG,
        done,
    });
    begin(&mut host, &mut queues, read(1, 1, DATA));
    assert_eq!(host.reap(&mut queues), [], "until it is reset");
    host.stop(&queues, false, Duration::ZERO);
}

#[test]
fn nothing_uses_memory_after_the_end() {
    let (mut host, mut queues, _) = rig();
    begin(&mut host, &mut queues, read(1, 1, DATA));
    let held = Arc::strong_count(&host.memory);
    assert!(held > 1);
    host.stop(&queues, false, Duration::ZERO);
    assert_eq!(Arc::strong_count(&host.memory), 1);
    // Who still sends is told by the drop.
    let flag = host.send(&queues, |done| Message::Drain {
        nsid: 1,
        bound: LONG,
        done,
    });
    host.turns(20);
    assert!(!over(&flag) && Arc::strong_count(&flag) == 1);
}
