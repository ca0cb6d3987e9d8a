//! Which receive queue a frame comes to, and the hash that comes with it.

use std::sync::Arc;
use std::time::Duration;

use bluff_net::{Pair, Port};
use bluff_overlay::{FdbLimits, Network, NetworkOptions, PortOptions};
use bluff_packet::flow::FlowHasher;
use bluff_packet::toeplitz::{HashTypes, Toeplitz};
use bluff_reactor::Reactor;
use bluff_testing::Chance;
use bluff_virtio_net::spec::{ACK_ERR, Header, command, feature};

use crate::control::{CONTROL, ask, set};
use crate::rig::*;

const PAIRS: u16 = 4;

fn network() -> Arc<Network> {
    let options = NetworkOptions {
        name: "test".into(),
        mtu: 1500,
        fdb: FdbLimits {
            total: 64,
            each: 64,
        },
        age: Duration::from_secs(300),
        flood: None,
    };
    Network::new(options, FlowHasher::new(&[7; FlowHasher::KEY_LEN]), 1)
}

fn join(network: &Arc<Network>) -> Arc<dyn Port> {
    Arc::new(network.join(PortOptions::default()).unwrap())
}

/// Sends one frame and says which queue it comes to.
fn cross(reactor: &mut Reactor, a: &mut Guest, b: &mut Guest, frame: &[u8]) -> (u16, Received) {
    a.send(0, &Header::default(), frame);
    let (queue, got) = until(reactor, || {
        (0..PAIRS).find_map(|queue| Some((queue, b.receive(queue)?)))
    });
    assert!(got.bytes == frame);
    b.offer(queue, &[2048]);
    until(reactor, || (a.sent(0) == 1).then_some(()));
    (queue, got)
}

/// A frame with a whole checksum, so that nothing has to be done to it.
fn whole(v6: bool, tcp: bool, seed: u8) -> Vec<u8> {
    frame(v6, tcp, 100, seed)
}

/// Without RSS the driver says where a flow belongs by sending there itself.
#[test]
fn flows_come_to_the_queue_that_they_are_sent_by() {
    let mut reactor = reactor();
    let network = network();
    let mut a = Guest::new(&mut reactor, join(&network), Kind::SPLIT, ALL, 64);
    let features = ALL | CONTROL | feature::MQ;
    let mut b = Guest::with_pairs(
        &mut reactor,
        join(&network),
        Kind::SPLIT,
        features,
        64,
        PAIRS,
    );
    set(&mut reactor, &mut b, command::MQ_PAIRS_SET, &[4, 0]);
    a.offer(0, &[2048; 32]);
    for queue in 0..PAIRS {
        b.offer(queue, &[2048; 8]);
    }
    let mut spread = [0; PAIRS as usize];
    for seed in 0..16 {
        let there = whole(seed % 2 == 0, seed % 3 == 0, seed);
        let (first, _) = cross(&mut reactor, &mut a, &mut b, &there);
        spread[usize::from(first)] += 1;
        for queue in [3, 1] {
            b.send(queue, &Header::default(), &answer(&there));
            until(&mut reactor, || (b.sent(queue) == 1).then_some(()));
            assert!(until(&mut reactor, || a.receive(0)).bytes == answer(&there));
            a.offer(0, &[2048]);
            let (came, _) = cross(&mut reactor, &mut a, &mut b, &there);
            assert_eq!(came, queue, "flow {seed}");
        }
    }
    assert!(spread.iter().filter(|n| **n > 0).count() > 1, "{spread:?}");
    // A queue that is not used any more gets nothing.
    set(&mut reactor, &mut b, command::MQ_PAIRS_SET, &[1, 0]);
    for seed in 0..16 {
        let there = whole(seed % 2 == 0, seed % 3 == 0, seed);
        assert_eq!(cross(&mut reactor, &mut a, &mut b, &there).0, 0);
    }
}

/// A key, types, a table.
pub fn rss(types: HashTypes, key: &[u8], table: &[u16], unclassified: u16) -> Vec<u8> {
    let mut data = types.0.to_le_bytes().to_vec();
    let rest = [table.len() as u16 - 1, unclassified];
    let words = rest.iter().chain(table).chain(&[PAIRS]);
    data.extend(words.flat_map(|n| n.to_le_bytes()));
    data.push(key.len() as u8);
    data.extend(key);
    data
}

/// The hash of a frame, computed apart from the device.
fn hash(key: &[u8], types: HashTypes, frame: &[u8]) -> (u32, u16) {
    let parsed = bluff_packet::parse(&frame[..frame.len().min(256)], frame.len()).unwrap();
    let rss = Toeplitz::new(key).frame(&parsed, frame, types);
    rss.map_or((0, 0), |rss| (rss.value, rss.report as u16))
}

fn arp() -> Vec<u8> {
    let mut arp = vec![0xff; 6];
    arp.extend([2, 0, 0, 0, 0, 1, 8, 6]);
    arp.resize(60, 0);
    arp
}

#[test]
fn tables_and_pairs_replace_one_another() {
    for kind in [Kind::SPLIT, Kind::PACKED] {
        let mut reactor = reactor();
        let (a, b) = Pair::new();
        let mut a = Guest::new(&mut reactor, Arc::new(a), kind, ALL, 64);
        let features = ALL | CONTROL | feature::MQ | feature::RSS | feature::HASH_REPORT;
        let mut b = Guest::with_pairs(&mut reactor, Arc::new(b), kind, features, 64, PAIRS);
        for queue in 0..PAIRS {
            b.offer(queue, &[2048; 16]);
        }
        let mut chance = Chance::new(3);
        let key = chance.bytes(40);
        let types = HashTypes(HashTypes::TCPV4.0 | HashTypes::IPV4.0 | HashTypes::UDPV6.0);
        let table: Vec<u16> = (0..128).map(|_| chance.below(4) as u16).collect();
        let config = rss(types, &key, &table, 2);
        // At first, and after a table that is replaced, there is no hash on such a port, and so one queue.
        for _ in 0..2 {
            let frames: Vec<_> = (0..12)
                .map(|seed| whole(seed % 2 == 0, seed % 3 == 0, seed))
                .chain([arp()])
                .collect();
            for frame in &frames {
                let (queue, got) = cross(&mut reactor, &mut a, &mut b, frame);
                assert_eq!((queue, got.report), (0, Some((0, 0))));
            }
            set(&mut reactor, &mut b, command::MQ_RSS_CONFIG, &config);
            let mut queues = 0u16;
            for frame in &frames {
                let (queue, got) = cross(&mut reactor, &mut a, &mut b, frame);
                let (value, report) = hash(&key, types, frame);
                let wanted = match report {
                    0 => 2,
                    _ => table[value as usize % 128],
                };
                assert_eq!((queue, got.report), (wanted, Some((value, report))));
                queues |= 1 << queue;
            }
            assert!(queues.count_ones() > 2);
            // What is refused changes nothing.
            let bad = [&[4, 1], &rss(types, &key, &[4], 0)[..]].concat();
            assert_eq!(ask(&mut reactor, &mut b, &bad, &[], 1), [ACK_ERR]);
            assert_eq!(cross(&mut reactor, &mut a, &mut b, &arp()).0, 2);
            set(&mut reactor, &mut b, command::MQ_PAIRS_SET, &[4, 0]);
        }
    }
}

/// Hashes are reported without RSS too, of every frame that is given, whole, cut or after a wait.
#[test]
fn hashes_are_reported() {
    for kind in Kind::all() {
        let mut reactor = reactor();
        let (a, b) = Pair::new();
        let mut a = Guest::new(&mut reactor, Arc::new(a), kind, ALL, 64);
        // It takes no segmentation, so that a long frame is cut for it.
        let features = feature::GUEST_CSUM | feature::MRG_RXBUF | CONTROL | feature::HASH_REPORT;
        let mut b = Guest::new(&mut reactor, Arc::new(b), kind, features, 64);
        let key = Chance::new(9).bytes(40);
        let types = HashTypes::TCPV4;
        let mut config = types.0.to_le_bytes().to_vec();
        config.extend([0; 8]);
        config.push(40);
        config.extend(&key);
        let frame = frame(false, true, 4000, 7);
        let wanted = Some(hash(&key, types, &frame));
        a.send(0, &header(false, true, 1000), &frame);
        until(&mut reactor, || (a.sent(0) == 1).then_some(()));
        // Those wait, as there were no buffers, and are reported as it is when they are given.
        set(&mut reactor, &mut b, command::MQ_HASH_CONFIG, &config);
        b.offer(0, &[300; 30]);
        for _ in 0..4 {
            let got = until(&mut reactor, || b.receive(0));
            assert_eq!(
                (got.bytes.len(), got.report),
                (54 + 1000, wanted),
                "{kind:?}"
            );
        }
        a.send(0, &Header::default(), &arp());
        assert_eq!(until(&mut reactor, || b.receive(0)).report, Some((0, 0)));
    }
}

/// With 128 pairs every queue is there, and the last one is the control queue.
#[test]
fn as_many_pairs_as_there_may_be() {
    const MOST: u16 = 128;
    let mut reactor = reactor();
    let (a, b) = Pair::new();
    let mut a = Guest::new(&mut reactor, Arc::new(a), Kind::SPLIT, ALL, 16);
    let features = ALL | CONTROL | feature::MQ | feature::RSS;
    let mut b = Guest::with_pairs(&mut reactor, Arc::new(b), Kind::SPLIT, features, 16, MOST);
    let key = [0x6d; 40];
    let table: Vec<u16> = (0..MOST).map(|i| MOST - 1 - i).collect();
    let mut config = rss(HashTypes::ALL, &key, &table, 127);
    let transmit = 4 + 2 + 2 + 2 * usize::from(MOST);
    config[transmit..transmit + 2].copy_from_slice(&MOST.to_le_bytes());
    set(&mut reactor, &mut b, command::MQ_RSS_CONFIG, &config);
    for seed in 0..20 {
        let frame = whole(false, true, seed);
        let (value, _) = hash(&key, HashTypes::ALL, &frame);
        let queue = table[value as usize % 128];
        b.offer(queue, &[2048]);
        a.send(0, &Header::default(), &frame);
        assert!(until(&mut reactor, || b.receive(queue)).bytes == frame);
        until(&mut reactor, || (a.sent(0) == 1).then_some(()));
    }
    b.offer(127, &[2048]);
    a.send(0, &Header::default(), &arp());
    assert!(until(&mut reactor, || b.receive(127)).bytes == arp());
}
