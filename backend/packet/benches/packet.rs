//! What a packet costs to read: `cargo bench -p bluff-packet`.

use std::hint::black_box;
use std::net::{Ipv4Addr, Ipv6Addr};

use bluff_packet::build::{Ipv4Fields, Ipv6Fields, Writer};
use bluff_packet::flow::{FlowHasher, FlowKey};
use bluff_packet::toeplitz::{HashTypes, Toeplitz};
use bluff_packet::tunnel::Vxlan;
use bluff_packet::{EtherType, IpProto, L2, Mac, Macs, Tags, checksum, parse, parse_l2};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

const TCP: [u8; 20] = [
    4, 0, 0, 80, 0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x10, 1, 0, 0, 0, 0, 0,
];

fn l2(ethertype: EtherType) -> L2 {
    L2 {
        macs: Macs {
            dst: Mac([2, 0, 0, 0, 0, 2]),
            src: Mac([2, 0, 0, 0, 0, 1]),
        },
        tags: Tags::NONE,
        ethertype,
    }
}

fn v4() -> Vec<u8> {
    let mut room = [0; 64];
    assert!(v4_header(&mut room));
    room.to_vec()
}

fn v4_header(room: &mut [u8]) -> bool {
    let fields = Ipv4Fields {
        src: Ipv4Addr::new(10, 0, 0, 1),
        dst: Ipv4Addr::new(10, 0, 0, 2),
        proto: IpProto::TCP,
        tos: 0,
        ttl: 64,
        id: 1,
        dont_fragment: true,
    };
    Writer::new(room)
        .ethernet(&l2(EtherType::IPV4))
        .and_then(|w| w.ipv4(&fields, 20)?.bytes(&TCP))
        .is_ok()
}

fn v6() -> Vec<u8> {
    let mut room = [0; 74];
    let fields = Ipv6Fields {
        src: Ipv6Addr::LOCALHOST,
        dst: Ipv6Addr::UNSPECIFIED,
        next: IpProto::TCP,
        traffic_class: 0,
        flow_label: 1,
        hop_limit: 64,
    };
    let mut writer = Writer::new(&mut room);
    let built = writer
        .ethernet(&l2(EtherType::IPV6))
        .and_then(|w| w.ipv6(&fields, 20)?.bytes(&TCP));
    assert!(built.is_ok());
    room.to_vec()
}

/// The result is looked at where it lies: a caller that is inlined does not copy it either.
fn packets(c: &mut Criterion) {
    let (v4, v6) = (v4(), v6());
    c.bench_function("parse_l2", |b| {
        b.iter(|| {
            black_box(&parse_l2(black_box(&v4), black_box(64)));
        });
    });
    c.bench_function("parse, IPv4 TCP", |b| {
        b.iter(|| {
            black_box(&parse(black_box(&v4), black_box(64)));
        });
    });
    c.bench_function("parse, IPv6 TCP", |b| {
        b.iter(|| {
            black_box(&parse(black_box(&v6), black_box(74)));
        });
    });
    let datagram = [8, 0, 0, 0, 0, 0, 7, 0]
        .into_iter()
        .chain(v4.clone())
        .collect::<Vec<u8>>();
    c.bench_function("VXLAN header", |b| {
        b.iter(|| Vxlan::parse(black_box(&datagram), black_box(72)));
    });

    let mut room = [0; 64];
    c.bench_function("IPv4 header built", |b| {
        b.iter(|| v4_header(black_box(&mut room)));
    });

    let hasher = FlowHasher::new(&[0x5a; FlowHasher::KEY_LEN]);
    let toeplitz = Toeplitz::new(&[0x6d; 40]);
    for (name, bytes) in [("IPv4 TCP", &v4), ("IPv6 TCP", &v6)] {
        let Ok(frame) = parse(bytes, bytes.len()) else {
            continue;
        };
        c.bench_function(&format!("source port, {name}"), |b| {
            b.iter(|| hasher.source_port(&FlowKey::new(black_box(&frame))));
        });
        c.bench_function(&format!("Toeplitz, {name}"), |b| {
            b.iter(|| toeplitz.frame(black_box(&frame), bytes, HashTypes::ALL));
        });
    }
}

fn sums(c: &mut Criterion) {
    let bytes = vec![0x5a; 65_536];
    let mut group = c.benchmark_group("checksum");
    for len in [20, 64, 1450, 65_536] {
        group.throughput(Throughput::Bytes(len as u64));
        group.bench_function(len.to_string(), |b| {
            b.iter(|| checksum::of(black_box(&bytes[..len])));
        });
    }
}

criterion_group!(benches, packets, sums);
criterion_main!(benches);
