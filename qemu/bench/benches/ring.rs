//! The ring alone: what a chain of three descriptors costs the device, ours and the stock one.

use bluff_bench::ring::{Device, time};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

fn rings(c: &mut Criterion) {
    let mut group = c.benchmark_group("ring alone, 3-descriptor chain");
    group.throughput(Throughput::Elements(1));
    let ours = |packed, indirect| Device::Ours { packed, indirect };
    for (name, device) in [
        ("split", ours(false, false)),
        ("split, indirect", ours(false, true)),
        ("packed", ours(true, false)),
        ("packed, indirect", ours(true, true)),
        ("stock", Device::Stock),
    ] {
        for depth in [1, 32, 128] {
            group.bench_function(BenchmarkId::new(name, depth), |bencher| {
                bencher.iter_custom(|requests| {
                    let (spent, done) = time(device, depth, requests).expect("it works");
                    // Whole turns only, so the time is scaled to what was asked for.
                    spent.mul_f64(requests as f64 / done as f64)
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, rings);
criterion_main!(benches);
