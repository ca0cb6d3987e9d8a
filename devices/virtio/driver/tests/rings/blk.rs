//! The block load: what it puts into memory, and what it finds wrong.

use std::sync::Arc;

use bluff_virtio_driver::{
    Blk, BlkConfig, BlkError, Buffer, Config, DriverQueue, Features, IdealConfig, IdealDevice,
    Memory, PackedDriver, Pattern, Position, Request, SplitDriver, Status,
};

use crate::packed_device::PackedDevice;
use crate::{BASE, StopOnDrop, guest};

const GUEST_LEN: u64 = 8 << 20;

fn packed(memory: &Arc<Memory>, features: Features) -> (Box<dyn DriverQueue>, PackedDevice) {
    let driver = PackedDriver::new(
        memory,
        &Config {
            indirect_entries: 16,
            ..Config::new(100, features)
        },
    )
    .expect("queue");
    let device = PackedDevice::new(memory, driver.layout(), 100, Position::default());
    (Box::new(driver), device)
}

/// Kind and sector of a request, by its first buffer.
fn header(memory: &Memory, buffers: &[Buffer]) -> (u32, u64) {
    assert_eq!((buffers[0].len, buffers[0].device_writable), (16, false));
    assert_eq!(
        memory.read_u32(buffers[0].addr + 4).expect("inside"),
        0,
        "reserved"
    );
    (
        memory.read_u32(buffers[0].addr).expect("inside"),
        memory.read_u64(buffers[0].addr + 8).expect("inside"),
    )
}

#[test]
fn each_kind_of_request_is_laid_out_as_specified() {
    let memory = guest(GUEST_LEN);
    let (queue, mut device) = packed(&memory, Features::default());
    let config = BlkConfig {
        depth: 8,
        request_len: 4096,
        segments: 3,
        ..BlkConfig::default()
    };
    let mut blk = Blk::new(&memory, queue, config).expect("load");
    let sectors = 9;
    let requests = [
        (
            Request::In { sector: 7 },
            0,
            7,
            vec![(512 * 2, true), (512 * 2, true), (512 * 4, true)],
        ),
        (
            Request::Out { sector: 8 },
            1,
            8,
            vec![(512 * 2, false), (512 * 2, false), (512 * 4, false)],
        ),
        (Request::Flush, 4, 0, vec![]),
        (Request::GetId, 8, 0, vec![(20, true)]),
        (
            Request::Discard { sector: 5, sectors },
            11,
            0,
            vec![(16, false)],
        ),
        (
            Request::WriteZeroes {
                sector: 6,
                sectors,
                unmap: true,
            },
            13,
            0,
            vec![(16, false)],
        ),
    ];
    for (request, ..) in &requests {
        blk.submit(*request).expect("room");
    }
    assert!(blk.publish());
    assert_eq!(device.fetch_all(), requests.len());
    for (i, (request, kind, sector, data)) in requests.iter().enumerate() {
        let chain = device.held[0].clone();
        assert_eq!(
            header(&memory, &chain.buffers),
            (*kind, *sector),
            "{request:?}"
        );
        let (status, middle) = chain.buffers[1..].split_last().expect("a status");
        assert_eq!((status.len, status.device_writable), (1, true));
        assert_eq!(memory.read_u8(status.addr).expect("inside"), 0xff);
        assert_eq!(
            &middle
                .iter()
                .map(|buffer| (buffer.len, buffer.device_writable))
                .collect::<Vec<_>>(),
            data
        );
        if let [range] = middle
            && range.len == 16
        {
            let unmap = u32::from(matches!(request, Request::WriteZeroes { .. }));
            assert_eq!(
                memory.read_u64(range.addr).expect("inside"),
                5 + u64::from(unmap)
            );
            assert_eq!(memory.read_u32(range.addr + 8).expect("inside"), sectors);
            assert_eq!(memory.read_u32(range.addr + 12).expect("inside"), unmap);
        }
        let answer = [Status::Ok, Status::IoErr, Status::Unsupported][i % 3];
        memory.write_u8(status.addr, (i % 3) as u8).expect("inside");
        device.use_chain(0, 1);
        let back = blk.poll().expect("no violation").expect("used");
        assert_eq!(
            (back.request, back.status, back.written),
            (*request, answer, 1)
        );
    }
    assert_eq!(blk.in_flight(), 0);
}

#[test]
fn a_status_that_was_not_written_is_found() {
    let memory = guest(GUEST_LEN);
    let (queue, mut device) = packed(&memory, Features::default());
    let mut blk = Blk::new(&memory, queue, BlkConfig::default()).expect("load");
    blk.step().expect("sent");
    device.fetch_all();
    device.use_chain(0, 0);
    assert!(matches!(
        blk.step(),
        Err(BlkError::BadStatus { status: 0xff, .. })
    ));

    assert_eq!(blk.restart(), 0);
    let mut device = PackedDevice::new(&memory, blk.queue().layout(), 100, Position::default());
    blk.step().expect("sent");
    device.fetch_all();
    let status = device.held[0].buffers[2].addr;
    memory.write_u8(status, 1).expect("inside");
    device.use_chain(0, 1);
    assert!(matches!(
        blk.step(),
        Err(BlkError::Failed {
            status: Status::IoErr,
            ..
        })
    ));
}

#[test]
fn a_load_covers_the_device_and_never_leaves_it() {
    for (pattern, percent, indirect) in [
        (Pattern::Sequential, 100, false),
        (Pattern::Random, 0, true),
        (Pattern::Random, 30, false),
        (Pattern::Random, 30, true),
    ] {
        let memory = guest(GUEST_LEN);
        let (queue, mut device) = packed(
            &memory,
            Features {
                indirect: true,
                ..Features::default()
            },
        );
        let config = BlkConfig {
            depth: 16,
            capacity: 100 * 8 + 5,
            pattern,
            read_percent: percent,
            indirect,
            ..BlkConfig::default()
        };
        let mut blk = Blk::new(&memory, queue, config).expect("load");
        let mut seen = vec![0_u32; 100];
        let (mut reads, mut total, mut next) = (0, 0, 0);
        for _ in 0..500 {
            let step = blk.step().expect("no violation");
            assert_eq!(device.fetch_all() as u32, step.submitted);
            while let Some(chain) = device.held.front() {
                let (kind, sector) = header(&memory, &chain.buffers);
                assert_eq!(
                    (sector % 8, chain.buffers[1].device_writable),
                    (0, kind == 0)
                );
                if pattern == Pattern::Sequential {
                    assert_eq!(sector, next);
                    next = (next + 8) % 800;
                }
                seen[(sector / 8) as usize] += 1;
                reads += u32::from(kind == 0);
                total += 1;
                memory.write_u8(chain.buffers[2].addr, 0).expect("inside");
                device.use_chain(0, 1);
            }
        }
        assert_eq!(total, 500 * 16);
        assert!(
            seen.iter().all(|count| (20..200).contains(count)),
            "{seen:?}"
        );
        assert!(
            (reads * 100 / total).abs_diff(u32::from(percent)) < 4,
            "{reads} reads of {total}"
        );
        assert_eq!(blk.drain().expect("no violation"), 16);
        assert_eq!(blk.in_flight(), 0);
    }
}

#[test]
fn the_ideal_device_on_another_thread() {
    use std::sync::atomic::{AtomicBool, Ordering};
    for (in_order, indirect) in [(false, false), (false, true), (true, false), (true, true)] {
        let memory = guest(GUEST_LEN);
        let features = Features {
            indirect,
            in_order,
            ..Features::default()
        };
        let queue = SplitDriver::new(&memory, &Config::new(128, features)).expect("queue");
        let layout = queue.layout();
        let config = IdealConfig {
            guest: (BASE, GUEST_LEN),
            layout,
            size: 128,
            event_idx: false,
            start: 0,
        };
        let mut device = IdealDevice::new(&memory, &config).expect("device");
        let load = BlkConfig {
            depth: 40,
            indirect,
            ..BlkConfig::default()
        };
        let mut blk = Blk::new(&memory, queue, load).expect("load");
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let stopper = StopOnDrop(&stop);
            let device = scope.spawn(|| {
                let mut served = 0_u64;
                while !stop.load(Ordering::Relaxed) {
                    let count = u64::from(device.poll());
                    if count == 0 {
                        std::thread::yield_now();
                    }
                    served += count;
                }
                served
            });
            let (mut sent, mut back) = (0, 0);
            while back < 200_000 {
                let step = blk.step().expect("every status is right");
                sent += u64::from(step.submitted);
                back += u64::from(step.completed);
                if step.completed == 0 {
                    std::thread::yield_now();
                }
            }
            while blk.in_flight() != 0 {
                back += u64::from(blk.drain().expect("every status is right"));
            }
            drop(stopper);
            assert_eq!((sent, device.join().expect("no panic")), (back, back));
        });
    }
}

#[test]
fn loads_that_make_no_sense_are_refused() {
    let memory = guest(GUEST_LEN);
    let good = BlkConfig {
        depth: 4,
        ..BlkConfig::default()
    };
    for bad in [
        BlkConfig { depth: 0, ..good },
        BlkConfig { depth: 34, ..good },
        BlkConfig {
            request_len: 0,
            ..good
        },
        BlkConfig {
            request_len: 1000,
            ..good
        },
        BlkConfig {
            segments: 9,
            ..good
        },
        BlkConfig {
            segments: 0,
            ..good
        },
        BlkConfig {
            capacity: 7,
            ..good
        },
        BlkConfig {
            read_percent: 101,
            ..good
        },
    ] {
        let (queue, _) = packed(&memory, Features::default());
        assert!(
            matches!(Blk::new(&memory, queue, bad), Err(BlkError::BadConfig)),
            "{bad:?}"
        );
    }
}
