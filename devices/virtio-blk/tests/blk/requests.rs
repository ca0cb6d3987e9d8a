//! Every request, over every kind of ring, by a driver that was written apart from the device.

use std::sync::atomic::Ordering;

use crate::rig::{BASE, FINISH, Kind, RESET, Rig, epoch, ram, stall, wait};
use bluff_reactor::Poll;
use bluff_virtio::{Position, VirtioDevice, features};
use bluff_virtio_driver::{Blk, BlkConfig, Completion, DriverQueue, Memory, Request, Status};

type Driver = Blk<Box<dyn DriverQueue>>;

/// A device with one queue, and its driver.
fn pair(kind: Kind, volume: &str, poll: Poll) -> (Rig, std::sync::Arc<Memory>, Driver) {
    let memory = Memory::flat(BASE, 16 << 20).unwrap();
    let mut rig = Rig::new(ram(volume), 1, poll);
    let queue = kind.driver(&memory, 64);
    let setup = rig.setup(0, kind, &*queue, &epoch(&memory));
    rig.start(setup);
    let config = BlkConfig {
        depth: 8,
        request_len: 8192,
        segments: 3,
        capacity: 1 << 15,
        indirect: kind.indirect,
        ..BlkConfig::default()
    };
    let blk = Blk::new(&memory, queue, config).unwrap();
    (rig, memory, blk)
}

fn ask(rig: &Rig, blk: &mut Driver, request: Request) -> Completion {
    blk.submit(request).unwrap();
    if blk.publish() {
        rig.kick();
    }
    wait(|| blk.poll().unwrap())
}

#[test]
fn requests_work_on_every_kind_of_ring() {
    for kind in Kind::all() {
        for poll in [Poll::Always, Poll::Never, Poll::default()] {
            let (mut rig, memory, mut blk) = pair(kind, "size=16MiB", poll);
            let data =
                |seed: u8| -> Vec<u8> { (0..8192u32).map(|i| (i % 251) as u8 ^ seed).collect() };
            // Far more than the ring is long, so that it wraps.
            for round in 0..100u8 {
                let slot = blk.next_slot().unwrap();
                memory.write(blk.data_addr(slot), &data(round)).unwrap();
                let sector = u64::from(round) * 16;
                let done = ask(&rig, &mut blk, Request::Out { sector });
                assert_eq!(
                    (done.status, done.written),
                    (Status::Ok, 1),
                    "{kind:?} {poll:?}"
                );
                let done = ask(&rig, &mut blk, Request::In { sector });
                assert_eq!((done.status, done.written), (Status::Ok, 8193));
                let mut got = vec![0; 8192];
                memory.read(blk.data_addr(done.slot), &mut got).unwrap();
                assert_eq!(got, data(round), "{kind:?} {poll:?}");
            }
            let done = ask(&rig, &mut blk, Request::GetId);
            assert_eq!((done.status, done.written), (Status::Ok, 21));
            let mut id = [0; 20];
            memory.read(blk.data_addr(done.slot), &mut id).unwrap();
            assert_eq!(&id[..4], b"rig\0");
            let zero = Request::WriteZeroes {
                sector: 16,
                sectors: 8,
                unmap: true,
            };
            assert_eq!(ask(&rig, &mut blk, zero).status, Status::Ok);
            let done = ask(&rig, &mut blk, Request::In { sector: 16 });
            let mut got = vec![0; 8192];
            memory.read(blk.data_addr(done.slot), &mut got).unwrap();
            assert_eq!(got[..4096], [0; 4096]);
            assert_eq!(got[4096..], data(1)[4096..]);
            let discard = Request::Discard {
                sector: 0,
                sectors: 8,
            };
            assert_eq!(ask(&rig, &mut blk, discard).status, Status::Ok);
            let past = Request::In {
                sector: (16 << 11) - 8,
            };
            assert_eq!(ask(&rig, &mut blk, past).status, Status::IoErr);
            let stopped = rig.stop(0, FINISH).unwrap();
            assert_eq!(stopped.in_flight, 0);
        }
    }
}

#[test]
fn a_sleeping_driver_and_a_sleeping_device_lose_no_notification() {
    for kind in Kind::all() {
        let (rig, _memory, mut blk) = pair(kind, "size=16MiB", Poll::Never);
        for round in 0..500 {
            blk.submit(Request::In { sector: round % 64 }).unwrap();
            if blk.publish() {
                rig.kick();
            }
            if !blk.queue().enable_interrupts() {
                wait(|| rig.call.read().ok());
            }
            blk.queue().disable_interrupts();
            while blk.in_flight() > 0 {
                wait(|| blk.poll().unwrap());
            }
        }
    }
}

/// A front end that gives no kick descriptor is served all the same (`VHOST_USER_SET_VRING_KICK` without one).
#[test]
fn a_ring_without_a_kick_descriptor_is_looked_at() {
    for kind in Kind::all() {
        let memory = Memory::flat(BASE, 4 << 20).unwrap();
        let mut rig = Rig::new(ram("size=1MiB"), 1, Poll::Never);
        let queue = kind.driver(&memory, 64);
        let mut setup = rig.setup(0, kind, &*queue, &epoch(&memory));
        setup.kick = None;
        rig.start(setup);
        let mut blk = Blk::new(&memory, queue, BlkConfig::default()).unwrap();
        let sleeps = || rig.reactor.counters().sleeps.load(Ordering::Relaxed);
        for _ in 0..3 {
            let before = sleeps();
            wait(|| (sleeps() > before + 2).then_some(()));
            blk.submit(Request::In { sector: 0 }).unwrap();
            blk.publish();
            wait(|| blk.poll().unwrap());
        }
        rig.stop(0, FINISH);
    }
}

/// The cache mode, where the driver chooses it (`VIRTIO_BLK_F_CONFIG_WCE`): a front end that was there before the device
/// tells its driver what it remembers.
#[test]
fn a_device_that_cannot_know_the_mode_writes_through() {
    const WRITEBACK: u32 = 32;
    const FLUSH: u64 = 1 << 9;
    const CONFIG_WCE: u64 = 1 << 11;
    let volume = stall::volume(false);
    let features = |device: &dyn VirtioDevice| {
        let offered = device.features();
        assert_eq!(offered & (FLUSH | CONFIG_WCE), FLUSH | CONFIG_WCE);
        offered & (features::VERSION_1 | FLUSH | CONFIG_WCE)
    };
    let mode = |device: &dyn VirtioDevice| {
        let mut byte = [0xff];
        device.read_config(WRITEBACK, &mut byte);
        byte[0]
    };
    let memory = Memory::flat(BASE, 4 << 20).unwrap();
    let kind = Kind::all().next().unwrap();
    let start = |rig: &mut Rig, position| {
        let queue = kind.driver(&memory, 64);
        let wanted = features(&rig.device);
        rig.device.set_features(wanted);
        let mut setup = rig.setup(0, kind, &*queue, &epoch(&memory));
        (setup.features, setup.position) = (wanted, position);
        rig.start(setup);
        rig.stop(0, RESET);
    };
    let later = Position {
        avail: 5,
        used: 5,
        ..Position::START
    };
    let new = || Rig::new(volume.clone(), 1, Poll::Never);

    // A new driver that has read the mode knows it, and goes on knowing it.
    let mut rig = new();
    assert_eq!(mode(&rig.device), 1);
    start(&mut rig, Position::START);
    start(&mut rig, later);
    assert_eq!(mode(&rig.device), 1);
    // What it sets outlives resets: nobody says it again.
    rig.device.write_config(WRITEBACK, &[0]).unwrap();
    rig.device.reset();
    start(&mut rig, Position::START);
    assert_eq!(mode(&rig.device), 0);
    // And it goes with the state to a new process.
    let saved = rig.device.save();
    let mut rig = new();
    rig.device.load(&saved).unwrap();
    start(&mut rig, later);
    assert_eq!(mode(&rig.device), 0);
    rig.device.write_config(WRITEBACK, &[1]).unwrap();
    start(&mut rig, later);
    assert_eq!(mode(&rig.device), 1);

    // A front end that has been there before, and one whose driver comes from elsewhere.
    let mut rig = new();
    start(&mut rig, Position::START);
    assert_eq!(mode(&rig.device), 0);
    let mut rig = new();
    assert_eq!(mode(&rig.device), 1);
    start(&mut rig, later);
    assert_eq!(mode(&rig.device), 0);

    // Without FLUSH nothing would ever be durable otherwise; but the next driver begins as if that had not been.
    let mut rig = new();
    for firmware in [features::VERSION_1 | CONFIG_WCE, features::VERSION_1] {
        rig.device.set_features(firmware);
        if firmware & CONFIG_WCE != 0 {
            assert_eq!(mode(&rig.device), 0);
        }
        rig.device.reset();
        assert_eq!(mode(&rig.device), 1);
        start(&mut rig, Position::START);
        assert_eq!(mode(&rig.device), 1);
        rig.device.reset();
    }
}
