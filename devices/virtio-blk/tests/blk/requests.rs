//! Every request, over every kind of ring, by a driver that was written apart from the device.

use crate::rig::{BASE, FINISH, Kind, Rig, epoch, ram, wait};
use bluff_reactor::Poll;
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
