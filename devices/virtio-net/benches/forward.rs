//! What a frame costs from one driver to another on one reactor, both drivers' work among it.
//!
//! `cargo bench -p bluff-virtio-net`; for figures against others there is `cargo xtask bench`.

#[path = "../tests/net/rig.rs"]
#[allow(dead_code)]
mod rig;

use std::sync::Arc;
use std::time::{Duration, Instant};

use bluff_net::{Pair, Port};
use bluff_overlay::udp::TunnelKind;
use bluff_overlay::wire::{WireOptions, WireUnderlay};
use bluff_overlay::{FdbLimits, Key, Network, NetworkOptions, PortOptions, Rules};
use bluff_packet::flow::FlowHasher;
use bluff_packet::{Mac, Vni};
use bluff_reactor::Reactor;
use bluff_virtio_driver::{Buffer, DriverQueue, Fixed};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rig::{ALL, Guest, Kind};
use zerocopy::IntoBytes;

/// Frames of a round.
const ROUND: u64 = 32;

/// A guest that sends the same frames, or receives, again and again.
struct Load {
    guest: Guest,
    sends: Vec<Fixed>,
    receives: Vec<Fixed>,
    /// Where its buffers begin.
    first: u64,
}

impl Load {
    fn new(reactor: &mut Reactor, port: Arc<dyn Port>, kind: Kind, frames: &[Vec<u8>]) -> Self {
        let mut guest = Guest::new(reactor, port, kind, ALL, 256);
        let at = guest.memory.alloc(8 << 20, 4096).unwrap();
        let header = bluff_virtio_net::spec::Header::default();
        let mut sends = Vec::new();
        for i in 0..ROUND {
            let frame = &frames[i as usize % frames.len()];
            let place = at + i * 4096;
            guest
                .memory
                .write(place, &[header.as_bytes(), frame].concat())
                .unwrap();
            let chain = [Buffer::readable(place, 12 + frame.len() as u32)];
            sends.push(guest.queues[1].fix(&chain, false, i).unwrap());
        }
        let mut receives = Vec::new();
        for i in 0..2 * ROUND {
            let place = at + (4 << 20) + i * 4096;
            let chain = [Buffer::writable(place, 2048)];
            receives.push(guest.queues[0].fix(&chain, false, i).unwrap());
        }
        let mut this = Self {
            guest,
            sends,
            receives,
            first: at,
        };
        for i in 0..this.receives.len() {
            this.guest.queues[0].resubmit(this.receives[i]).unwrap();
        }
        this.guest.queues[0].publish();
        this
    }

    fn send(&mut self) {
        for chain in &self.sends {
            self.guest.queues[1].resubmit(*chain).unwrap();
        }
        self.guest.queues[1].publish();
    }

    fn sent(&mut self) {
        while self.guest.queues[1].pop_used().unwrap().is_some() {}
    }

    /// Steps until all that was sent is taken.
    fn settle(&mut self, reactor: &mut Reactor) {
        while self.guest.queues[1].in_flight() > 0 {
            reactor.step(Some(Duration::ZERO));
            self.sent();
        }
    }

    fn received(&mut self) -> u64 {
        let mut n = 0;
        while let Some(used) = self.guest.queues[0].pop_used().unwrap() {
            self.guest.queues[0]
                .resubmit(self.receives[used.token as usize])
                .unwrap();
            n += 1;
        }
        if n > 0 {
            self.guest.queues[0].publish();
        }
        n
    }
}

/// Rounds from `a` to `b`.
fn rounds(reactor: &mut Reactor, a: &mut Load, b: &mut Load, count: u64) -> Duration {
    let start = Instant::now();
    for _ in 0..count {
        a.send();
        let mut left = ROUND;
        while left > 0 {
            reactor.step(Some(Duration::ZERO));
            left = left.saturating_sub(b.received());
            a.sent();
        }
        a.settle(reactor);
        b.received();
    }
    start.elapsed()
}

fn network() -> Arc<Network> {
    let options = NetworkOptions {
        name: "bench".into(),
        mtu: 1500,
        fdb: FdbLimits {
            total: 65_536,
            each: 65_536,
        },
        age: Duration::from_secs(300),
        flood: None,
    };
    Network::new(options, FlowHasher::new(&[7; FlowHasher::KEY_LEN]), 1)
}

fn join(network: &Arc<Network>, n: u8) -> Arc<dyn Port> {
    let rules = Rules {
        mac: Some(Mac([2, 0, 0, 0, 0, n])),
        ..Rules::default()
    };
    let options = PortOptions {
        rules,
        ..PortOptions::default()
    };
    Arc::new(network.join(options).unwrap())
}

/// UDP from station 1 to station 2, of so many bytes on the wire but for the checksum.
fn frame(len: usize) -> Vec<u8> {
    let mut frame = rig::frame(false, false, len - 42, 1);
    frame[..6].copy_from_slice(&[2, 0, 0, 0, 0, 2]);
    frame
}

fn wire(n: u8, other: u8, network: &Arc<Network>) -> Arc<WireUnderlay> {
    let underlay = WireUnderlay::new(WireOptions {
        local: [10, 0, 0, n].into(),
        mac: Mac([6, 0, 0, 0, 0, n]),
        gateway: None,
        kind: TunnelKind::Vxlan,
        port: 4789,
        mtu: 1600,
    });
    let vni = Vni::new(5001).unwrap();
    network
        .set_tunnel(vni, &[[10, 0, 0, other].into()], underlay.clone())
        .unwrap();
    underlay.set_network(vni, Some(network.clone()));
    underlay
}

fn forward(c: &mut Criterion) {
    let mut group = c.benchmark_group("forward");
    group.throughput(Throughput::Elements(ROUND));
    for (name, kind) in [("split", Kind::SPLIT), ("packed", Kind::PACKED)] {
        for len in [64 - 4, 1450] {
            let mut reactor = rig::reactor();
            let frames = [frame(len)];
            let (x, y) = Pair::new();
            let mut a = Load::new(&mut reactor, Arc::new(x), kind, &frames);
            let mut b = Load::new(&mut reactor, Arc::new(y), kind, &frames);
            group.bench_function(BenchmarkId::new(format!("wire/{name}"), len), |bench| {
                bench.iter_custom(|n| rounds(&mut reactor, &mut a, &mut b, n));
            });
            drop((a, b));
            let network = network();
            let mut a = Load::new(&mut reactor, join(&network, 1), kind, &frames);
            let mut b = Load::new(&mut reactor, join(&network, 2), kind, &frames);
            group.bench_function(BenchmarkId::new(format!("switch/{name}"), len), |bench| {
                bench.iter_custom(|n| rounds(&mut reactor, &mut a, &mut b, n));
            });
            drop((a, b));
        }
    }
    group.finish();
}

/// Frames from a port to the wire of an underlay, and the other way.
fn tunnel(c: &mut Criterion) {
    let mut group = c.benchmark_group("tunnel");
    group.throughput(Throughput::Elements(ROUND));
    for len in [64 - 4, 1450] {
        let mut reactor = rig::reactor();
        let (near, far) = (network(), network());
        let (here, there) = (wire(1, 2, &near), wire(2, 1, &far));
        near.fix(Key::new([2, 0, 0, 0, 0, 2], 0), [10, 0, 0, 2].into())
            .unwrap();
        let frames = [frame(len)];
        let mut a = Load::new(&mut reactor, join(&near, 1), Kind::SPLIT, &frames);
        let mut b = Load::new(&mut reactor, join(&far, 2), Kind::SPLIT, &frames);
        // Both underlays' ports are ends of drivers; what one receives the other one sends.
        let mut x = Load::new(&mut reactor, here, Kind::SPLIT, &frames);
        let mut y = Load::new(&mut reactor, there, Kind::SPLIT, &frames);
        let outer = learn(&mut reactor, &mut a, &mut x, &mut y);
        group.bench_function(BenchmarkId::new("encapsulate", len), |bench| {
            bench.iter_custom(|n| rounds(&mut reactor, &mut a, &mut x, n));
        });
        for i in 0..ROUND {
            y.set(i, &outer);
        }
        group.bench_function(BenchmarkId::new("decapsulate", len), |bench| {
            bench.iter_custom(|n| rounds(&mut reactor, &mut y, &mut b, n));
        });
        drop((a, b, x, y));
    }
    group.finish();
}

impl Load {
    /// The `i`th frame that is sent from now on.
    fn set(&mut self, i: u64, frame: &[u8]) {
        let place = self.guest.memory.alloc(4096, 64).unwrap();
        let header = bluff_virtio_net::spec::Header::default();
        self.guest
            .memory
            .write(place, &[header.as_bytes(), frame].concat())
            .unwrap();
        let chain = [Buffer::readable(place, 12 + frame.len() as u32)];
        self.sends[i as usize] = self.guest.queues[1].fix(&chain, false, i).unwrap();
    }

    /// What was received last, without its header.
    fn take(&mut self) -> Option<Vec<u8>> {
        let used = self.guest.queues[0].pop_used().unwrap()?;
        let mut bytes = vec![0; used.written as usize];
        let place = self.place_of(used.token);
        self.guest.memory.read(place, &mut bytes).unwrap();
        self.guest.queues[0]
            .resubmit(self.receives[used.token as usize])
            .unwrap();
        self.guest.queues[0].publish();
        bytes.drain(..12);
        Some(bytes)
    }
}

/// Has the cards find each other; gives an outer frame.
fn learn(reactor: &mut Reactor, a: &mut Load, x: &mut Load, y: &mut Load) -> Vec<u8> {
    for _ in 0..50 {
        a.send();
        a.settle(reactor);
        while let Some(frame) = x.take() {
            if frame[12..14] == [8, 0] {
                while x.take().is_some() {}
                return frame;
            }
            y.transmit(&frame);
            y.settle(reactor);
            while let Some(answer) = y.take() {
                x.transmit(&answer);
                x.settle(reactor);
            }
        }
    }
    panic!("the cards do not find each other")
}

impl Load {
    fn place_of(&self, token: u64) -> u64 {
        self.first + (4 << 20) + token * 4096
    }

    /// Sends one frame.
    fn transmit(&mut self, frame: &[u8]) {
        let place = self.guest.memory.alloc(4096, 64).unwrap();
        let header = bluff_virtio_net::spec::Header::default();
        self.guest
            .memory
            .write(place, &[header.as_bytes(), frame].concat())
            .unwrap();
        let chain = [Buffer::readable(place, 12 + frame.len() as u32)];
        self.guest.queues[1].add(&chain, false, 0).unwrap();
        self.guest.queues[1].publish();
    }
}

criterion_group!(benches, forward, tunnel);
criterion_main!(benches);
