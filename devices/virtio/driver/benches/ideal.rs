//! What a 3-descriptor chain costs with nothing behind it: our driver and the ideal device, in turn on one thread.

use std::hint::black_box;
use std::time::{Duration, Instant};

use bluff_virtio_driver::ideal::{IdealConfig, IdealDevice};
use bluff_virtio_driver::{Blk, BlkConfig, Config, DriverQueue, Features, Memory, SplitDriver};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

const GUEST: (u64, u64) = (0x10_0000, 16 << 20);

fn requests(c: &mut Criterion) {
    let mut group = c.benchmark_group("3-descriptor chain");
    for (name, depth, indirect, read_percent) in [
        ("fixed", 1, false, 100),
        ("fixed", 32, false, 100),
        ("fixed", 128, false, 100),
        ("fixed indirect", 128, true, 100),
        ("written anew", 128, false, 50),
    ] {
        let memory = Memory::flat(GUEST.0, GUEST.1).expect("memory");
        memory.populate();
        let features = Features {
            indirect,
            ..Features::default()
        };
        let mut queue = SplitDriver::new(&memory, &Config::new(512, features)).expect("queue");
        queue.disable_interrupts();
        let layout = queue.layout();
        let config = IdealConfig {
            guest: GUEST,
            layout,
            size: 512,
            event_idx: false,
            start: 0,
        };
        let mut device = IdealDevice::new(&memory, &config).expect("device");
        device.disarm();
        let load = BlkConfig {
            depth,
            indirect,
            read_percent,
            ..BlkConfig::default()
        };
        let mut blk = Blk::new(&memory, queue, load).expect("load");

        group.throughput(Throughput::Elements(1));
        group.bench_function(BenchmarkId::new(name, depth), |bencher| {
            // Whole turns only, so the time is scaled to the number of requests that was asked for.
            bencher.iter_custom(|requests| {
                let start = Instant::now();
                let mut done = 0;
                while done < requests {
                    done += u64::from(blk.step().expect("every request succeeds").completed);
                    black_box(device.poll());
                }
                Duration::from_secs_f64(
                    start.elapsed().as_secs_f64() * requests as f64 / done as f64,
                )
            });
        });
    }
    group.finish();
}

criterion_group!(benches, requests);
criterion_main!(benches);
