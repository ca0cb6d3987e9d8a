//! A front end makes its call or error descriptor block: its neighbours on the reactor go on, and so does its own
//! ring. It gets no more notifications until it sends another descriptor.
//!
//! The flag that says whether a write blocks is the open file's, which the front end shares; so it can block our
//! writes at any time, whatever was set when the descriptor came.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use crate::alone;
use crate::rig::{BASE, FINISH, Kind, PATIENCE, Rig, epoch, ram, wait};
use bluff_memory::GuestMemory;
use bluff_reactor::Poll;
use bluff_virtio::{DeviceEvent, Distrust, Notifier, QueueChange, VirtioDevice};
use bluff_virtio_blk::{Blk, BlkOptions};
use bluff_virtio_driver::{Blk as Driver, BlkConfig, DriverQueue, Memory, Request, Status};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// How long a neighbour's request may take.
const BOUND: Duration = Duration::from_secs(1);

/// An eventfd that blocks who writes to it: the front end's, and ours.
fn full() -> (EventFd, EventFd) {
    let event = EventFd::new(0).unwrap();
    event.write(u64::MAX - 1).unwrap();
    (event.try_clone().unwrap(), event)
}

type Queue = Driver<Box<dyn DriverQueue>>;

fn driver(kind: Kind, memory: &Arc<Memory>) -> Queue {
    let queue = kind.driver(memory, 64);
    let config = BlkConfig {
        depth: 8,
        request_len: 4096,
        capacity: 1 << 15,
        ..BlkConfig::default()
    };
    Driver::new(memory, queue, config).unwrap()
}

/// Two functions on one reactor.
struct Pair {
    good: Rig,
    good_queue: Queue,
    hostile: Blk,
    hostile_queue: Queue,
    hostile_kick: EventFd,
    events: Arc<Mutex<Vec<DeviceEvent>>>,
    distrust: Distrust,
    slowest: Duration,
    _memory: [Arc<Memory>; 2],
}

impl Pair {
    fn new(kind: Kind, call: Option<EventFd>, error: Option<EventFd>) -> Self {
        let memory = [(); 2].map(|()| Memory::flat(BASE, 8 << 20).unwrap());
        let mut good = Rig::new(ram("size=16MiB"), 1, Poll::Never);
        let [mut good_queue, mut hostile_queue] = [0, 1].map(|i| driver(kind, &memory[i]));
        let setup = good.setup(0, kind, &**good_queue.queue(), &epoch(&memory[0]));
        good.start(setup);
        let mut hostile = Blk::new(
            ram("size=16MiB"),
            BlkOptions {
                queues: 1,
                serial: "hostile".into(),
                config_wce: true,
                poll: Poll::Never,
                reactors: vec![good.reactor.clone()],
            },
        );
        let events: Arc<Mutex<Vec<DeviceEvent>>> = Arc::default();
        let sink = events.clone();
        hostile.on_event(Arc::new(move |e| sink.lock().unwrap().push(e)));
        let distrust = Distrust::default();
        let notifier = |file: EventFd| Notifier::of(file, &distrust).unwrap();
        let mut setup = good.setup(0, kind, &**hostile_queue.queue(), &epoch(&memory[1]));
        let hostile_kick = EventFd::new(EFD_NONBLOCK).unwrap();
        setup.kick = Some(hostile_kick.try_clone().unwrap());
        setup.call = call.map(notifier);
        setup.error = error.map(notifier);
        hostile.set_features(setup.features);
        hostile.start_queue(setup).unwrap();
        let mut this = Self {
            good,
            good_queue,
            hostile,
            hostile_queue,
            hostile_kick,
            events,
            distrust,
            slowest: Duration::ZERO,
            _memory: memory,
        };
        this.neighbour();
        this
    }

    /// One request of the neighbour.
    fn neighbour(&mut self) {
        let start = Instant::now();
        self.good_queue.submit(Request::In { sector: 0 }).unwrap();
        if self.good_queue.publish() {
            self.good.kick();
        }
        let done = wait(|| self.good_queue.poll().unwrap());
        assert_eq!(done.status, Status::Ok);
        self.slowest = self.slowest.max(start.elapsed());
    }

    /// One request of the hostile front end, which wants to be notified. It is done, and meanwhile so are its
    /// neighbour's.
    fn hostile_request(&mut self) {
        self.hostile_queue.queue().enable_interrupts();
        self.hostile_queue
            .submit(Request::In { sector: 0 })
            .unwrap();
        if self.hostile_queue.publish() {
            self.hostile_kick.write(1).unwrap();
        }
        let start = Instant::now();
        loop {
            self.neighbour();
            if let Some(done) = self.hostile_queue.poll().unwrap() {
                assert_eq!(done.status, Status::Ok);
                return;
            }
            assert!(start.elapsed() < PATIENCE, "the ring does not go on");
        }
    }

    /// The neighbour works until the device has said that a notifier has hung.
    fn until_hung(&mut self) {
        let start = Instant::now();
        while !self.has(|e| *e == DeviceEvent::NotifierHung(0)) {
            assert!(start.elapsed() < PATIENCE, "nobody says so");
            self.neighbour();
        }
        assert!(self.slowest < BOUND, "{:?}", self.slowest);
    }

    fn has(&self, event: impl Fn(&DeviceEvent) -> bool) -> bool {
        self.events.lock().unwrap().iter().any(event)
    }

    fn wait_broken(&self) {
        let broken = |e: &DeviceEvent| matches!(e, DeviceEvent::QueueBroken { queue: 0, .. });
        wait(|| self.has(broken).then_some(()));
    }

    /// Sends another descriptor, and waits until the queue has it.
    fn replace(&mut self, call: EventFd) {
        let call = Notifier::of(call, &self.distrust).unwrap();
        self.hostile.change_queue(0, QueueChange::Call(Some(call)));
        let (tx, rx) = mpsc::channel();
        let done = Box::new(move || tx.send(()).unwrap());
        self.hostile
            .change_queue(0, QueueChange::Log { log: None, done });
        rx.recv_timeout(PATIENCE).unwrap();
    }

    fn end(mut self) {
        let (tx, rx) = mpsc::channel();
        let done = Box::new(move |s| tx.send(s).unwrap());
        self.hostile.stop_queue(0, FINISH, done);
        rx.recv_timeout(PATIENCE).unwrap();
        self.neighbour();
        self.good.stop(0, FINISH).unwrap();
        assert!(self.slowest < BOUND, "{:?}", self.slowest);
    }
}

#[test]
fn a_call_descriptor_that_blocks_holds_nobody_up() {
    let _alone = alone();
    for kind in [Kind::SPLIT, Kind::PACKED] {
        let (front, back) = full();
        let mut pair = Pair::new(kind, Some(back), None);
        pair.hostile_request();
        pair.until_hung();
        // The ring goes on, in silence, also when the descriptor could be written again.
        assert_eq!(front.read().unwrap(), u64::MAX - 1);
        for _ in 0..100 {
            pair.hostile_request();
        }
        let hung = pair.hostile.counters()[0].line.hung.load(Ordering::Relaxed);
        assert_eq!((hung, pair.events.lock().unwrap().len()), (1, 1));
        // Another descriptor is notified at once, as the driver may have missed something.
        let honest = EventFd::new(EFD_NONBLOCK).unwrap();
        pair.replace(honest.try_clone().unwrap());
        wait(|| honest.read().ok());
        pair.hostile_request();
        wait(|| honest.read().ok());
        pair.end();
    }
}

#[test]
fn descriptors_that_block_one_after_the_other_hold_nobody_up() {
    let _alone = alone();
    let (_front, back) = full();
    let mut pair = Pair::new(Kind::SPLIT, Some(back), None);
    pair.hostile_request();
    pair.until_hung();
    let start = Instant::now();
    let fronts: Vec<_> = (0..20)
        .map(|_| {
            let (front, back) = full();
            pair.replace(back);
            pair.hostile_request();
            front
        })
        .collect();
    // Each would take a tenth of a second, were it waited for.
    assert!(start.elapsed() < BOUND, "{:?}", start.elapsed());
    pair.end();
    drop(fronts);
}

#[test]
fn an_error_descriptor_that_blocks_holds_nobody_up() {
    let _alone = alone();
    // Broken while it runs: its memory goes.
    let (_front, back) = full();
    let mut pair = Pair::new(Kind::SPLIT, None, Some(back));
    pair.hostile_request();
    pair.hostile.change_queue(
        0,
        QueueChange::Memory {
            memory: GuestMemory::empty(),
            bound: BOUND,
            done: Box::new(|| {}),
        },
    );
    pair.until_hung();
    pair.wait_broken();
    pair.end();
}

#[test]
fn an_error_descriptor_that_blocks_at_the_start_holds_nobody_up() {
    let _alone = alone();
    let (_front, back) = full();
    let mut pair = Pair::new(Kind::SPLIT, None, None);
    let (tx, rx) = mpsc::channel();
    let done = Box::new(move |s| tx.send(s).unwrap());
    pair.hostile.stop_queue(0, FINISH, done);
    rx.recv_timeout(PATIENCE).unwrap();
    // A ring that lies nowhere.
    let nowhere = GuestMemory::empty();
    let queue = &**pair.hostile_queue.queue();
    let mut setup = pair.good.setup(0, Kind::SPLIT, queue, &nowhere);
    setup.error = Some(Notifier::of(back, &pair.distrust).unwrap());
    pair.hostile.start_queue(setup).unwrap();
    pair.until_hung();
    pair.wait_broken();
    pair.end();
}
