//! What fuzz targets and property tests share: bytes as what a hostile underlay sends, from the link to the tenant's port.
//!
//! Unsafe, because frames longer than a head are lent.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bluff_memory::IoVec;
use bluff_net::{Batch, HEAD, Port, Receive, Receivers, Registration, Steering};
use bluff_packet::build::{Ipv4Fields, Ipv6Fields, Writer};
use bluff_packet::flow::FlowHasher;
use bluff_packet::{EtherType, IpProto, L2, L3, L4, Mac, Macs, Tags, Vni, parse};
use bluff_reactor::{Options, Reactor};

use crate::udp::TunnelKind;
use crate::wire::{WireOptions, WireUnderlay};
use crate::{FdbLimits, Network, NetworkOptions, PortOptions, Rules};

/// The card's address on the link, and that of the other card.
const HERE: Mac = Mac([6, 0, 0, 0, 0, 1]);
const THERE: Mac = Mac([6, 0, 0, 0, 0, 2]);
/// The tenant's station.
const STATION: Mac = Mac([2, 0, 0, 0, 0, 1]);
const VNI: u32 = 5001;
/// Addresses that are learnt behind one VTEP.
const LEARNT: usize = 8;
/// Frames of one input.
const FRAMES: usize = 64;

type Got = Rc<RefCell<Vec<Vec<u8>>>>;

struct Keeper(Got);

impl Receive for Keeper {
    fn receive(&mut self, batch: &Batch, which: &[u8]) {
        for i in which {
            let i = usize::from(*i);
            let mut bytes = vec![0; batch.frames()[i].len()];
            assert_eq!(batch.copy_to(i, 0, &mut bytes), bytes.len());
            self.0.borrow_mut().push(bytes);
        }
    }
}

thread_local! {
    /// One for all inputs: it is never turned.
    static REACTOR: RefCell<Option<Reactor>> = const { RefCell::new(None) };
}

fn receivers(reactor: &mut Reactor) -> (Arc<Receivers>, Got, Registration) {
    let got = Got::default();
    let keeper = Rc::new(RefCell::new(Keeper(got.clone())));
    let registration = Registration::new(&mut reactor.context(), keeper);
    let receivers = Receivers {
        queues: vec![Some(registration.outlet().clone())],
        steering: Steering::Spread(1),
    };
    (Arc::new(receivers), got, registration)
}

/// What came of an input.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Heard {
    /// Frames that the tenant was given.
    pub delivered: usize,
    /// What the card said on the link.
    pub answers: usize,
}

/// Bytes as frames on the link of a card. The first byte says which kind of tunnel and which family of addresses; then follow
/// frames: flags, a place and what is changed there, the length in two bytes, and bytes. With the lowest flag those are
/// put into a good tunnel first.
///
/// # Panics
/// Where a tenant is given what was not in a good tunnel of its network, or the card says what it should not.
pub fn fuzz_wire(data: &[u8]) -> Heard {
    let mut heard = Heard::default();
    let Some((&first, mut rest)) = data.split_first() else {
        return heard;
    };
    let kind = if first & 1 == 0 {
        TunnelKind::Vxlan
    } else {
        TunnelKind::Geneve
    };
    let [local, peer]: [IpAddr; 2] = match first & 2 {
        0 => [[10, 0, 0, 1].into(), [10, 0, 0, 2].into()],
        _ => [[0xfd; 16].into(), [0xfe; 16].into()],
    };
    REACTOR.with_borrow_mut(|reactor| {
        let reactor = reactor.get_or_insert_with(|| {
            Reactor::new(&Options::default()).expect("a machine with descriptors")
        });
        let network = Network::new(
            NetworkOptions {
                name: "blue".into(),
                mtu: 1450,
                fdb: FdbLimits {
                    total: 100,
                    each: LEARNT,
                },
                age: Duration::from_secs(300),
                flood: None,
            },
            FlowHasher::new(&[7; FlowHasher::KEY_LEN]),
            9,
        );
        let vni = Vni::new(VNI).expect("in range");
        let underlay = WireUnderlay::new(WireOptions {
            local,
            mac: HERE,
            gateway: None,
            kind,
            port: kind.port(),
            mtu: 1600,
        });
        network
            .set_tunnel(vni, &[peer], underlay.clone())
            .expect("one VTEP");
        underlay.set_network(vni, Some(network.clone()));
        let (link, said, _link) = receivers(reactor);
        underlay.set_receivers(link);
        let port = network
            .join(PortOptions {
                rules: Rules {
                    mac: Some(STATION),
                    ..Rules::default()
                },
                ..PortOptions::default()
            })
            .expect("the first");
        let (inside, delivered, _inside) = receivers(reactor);
        port.set_receivers(inside);
        let mut lane = Port::open(&*underlay, &mut reactor.context(), 0).expect("it opens");
        let now = Instant::now();
        for _ in 0..FRAMES {
            let Some((&[flags, place, change, high, low], after)) = rest.split_first_chunk() else {
                break;
            };
            let len = usize::from(u16::from_be_bytes([high, low])).min(after.len());
            let (bytes, after) = after.split_at(len);
            rest = after;
            let mut frame = match flags & 1 {
                0 => bytes.to_vec(),
                _ => wrapped(kind, [peer, local], bytes),
            };
            if let Some(byte) = frame.get_mut(usize::from(place)) {
                *byte ^= change;
            }
            if frame.is_empty() {
                continue;
            }
            let (head, tail) = frame.split_at(frame.len().min(HEAD));
            let mut batch = Batch::default();
            batch.push(head).expect("not empty");
            // SAFETY: `frame` outlives the batch.
            unsafe { batch.lend(&[IoVec::new(tail.as_ptr().cast_mut(), tail.len())]) };
            let count = || underlay.drops().received.total() + network.arrived().total();
            let before = count();
            lane.send(now, batch.lent());
            let got: Vec<_> = delivered.borrow_mut().drain(..).collect();
            assert!(got.len() <= 1, "one frame, one port");
            heard.delivered += got.len();
            for inner in &got {
                assert_eq!(count(), before, "delivered, or dropped");
                belongs(kind, [peer, local], &frame, inner);
            }
            for answer in said.borrow_mut().drain(..) {
                heard.answers += 1;
                assert_eq!(count(), before, "answered, or dropped");
                is_answer(local, &frame, &answer);
            }
            assert!(network.fdb().learnt() <= LEARNT);
        }
        // Each of them holds the other.
        underlay.set_network(vni, None);
    });
    heard
}

/// Puts an inner frame into a tunnel.
fn wrapped(kind: TunnelKind, [src, dst]: [IpAddr; 2], inner: &[u8]) -> Vec<u8> {
    let mut room = vec![0; 128];
    let mut writer = Writer::new(&mut room);
    let l2 = L2 {
        macs: Macs {
            dst: HERE,
            src: THERE,
        },
        tags: Tags::NONE,
        ethertype: match src {
            IpAddr::V4(_) => EtherType::IPV4,
            IpAddr::V6(_) => EtherType::IPV6,
        },
    };
    let vni = Vni::new(VNI).expect("in range");
    let len = inner.len() + 8;
    let written = writer
        .ethernet(&l2)
        .and_then(|w| match (src, dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => w.ipv4(
                &Ipv4Fields {
                    src,
                    dst,
                    proto: IpProto::UDP,
                    // There was congestion.
                    tos: 3,
                    ttl: 64,
                    id: 0,
                    dont_fragment: true,
                },
                len + 8,
            ),
            (IpAddr::V6(src), IpAddr::V6(dst)) => w.ipv6(
                &Ipv6Fields {
                    src,
                    dst,
                    next: IpProto::UDP,
                    traffic_class: 0,
                    flow_label: 0,
                    hop_limit: 64,
                },
                len + 8,
            ),
            _ => Ok(w),
        })
        .and_then(|w| w.udp(50_000, kind.port(), len, 0))
        .and_then(|w| match kind {
            TunnelKind::Vxlan => w.vxlan(vni),
            TunnelKind::Geneve => w.geneve(vni, &[], false),
        })
        .map_or(0, |w| w.len());
    room.truncate(written);
    room.extend_from_slice(inner);
    room
}

/// A tenant has been given `inner`: it was in `outer`, in a tunnel from the other card, of its own network.
fn belongs(kind: TunnelKind, [peer, local]: [IpAddr; 2], outer: &[u8], inner: &[u8]) {
    let packet = parse(&outer[..outer.len().min(HEAD)], outer.len()).expect("it was parsed");
    assert_eq!(packet.l2.dst(), HERE);
    let (src, dst): (IpAddr, IpAddr) = match packet.l3 {
        L3::Ipv4(ip) => (ip.src.into(), ip.dst.into()),
        L3::Ipv6(ip) => (ip.src.into(), ip.dst.into()),
        other => panic!("in {other:?}"),
    };
    assert_eq!((src, dst), (peer, local));
    let L4::Udp(udp) = packet.l4 else {
        panic!("in {:?}", packet.l4)
    };
    assert_eq!(udp.dst, kind.port());
    let tunnel = packet.l4_offset().expect("it is UDP") + 8;
    assert_eq!(outer[tunnel + 4..tunnel + 7], VNI.to_be_bytes()[1..]);
    let options = match kind {
        TunnelKind::Vxlan => 0,
        TunnelKind::Geneve => usize::from(outer[tunnel] & 0x3f) * 4,
    };
    let sent = &outer[tunnel + 8 + options..];
    assert_eq!(sent.len(), inner.len());
    // A mark of congestion changes the traffic class and the checksum, and nothing else.
    let differ: Vec<_> = (0..sent.len()).filter(|i| sent[*i] != inner[*i]).collect();
    let l3 = parse(&inner[..inner.len().min(HEAD)], inner.len())
        .expect("it was parsed")
        .l3_offset();
    let may = [l3 + 1, l3 + 10, l3 + 11];
    assert!(differ.iter().all(|i| may.contains(i)), "{differ:?}");
    assert!(!Mac([inner[6], inner[7], inner[8], inner[9], inner[10], inner[11]]).is_multicast());
}

/// The card has said `answer` to `question`: that it has its own address, to who asked.
fn is_answer(local: IpAddr, question: &[u8], answer: &[u8]) {
    let asked = parse(&question[..question.len().min(HEAD)], question.len()).expect("parsed");
    let said = parse(answer, answer.len()).expect("it is a frame");
    assert_eq!(said.l2.src(), HERE);
    match (said.l3, said.l4, local) {
        (L3::Arp(arp), _, IpAddr::V4(local)) => {
            assert_eq!((arp.op, arp.sender_mac, arp.sender_ip), (2, HERE, local));
            let L3::Arp(asked) = asked.l3 else {
                panic!("{asked:?}")
            };
            assert_eq!((asked.op, asked.target_ip), (1, local));
        }
        (L3::Ipv6(ip), L4::Icmpv6(icmp), IpAddr::V6(local)) => {
            assert_eq!((icmp.kind, ip.src), (136, local));
            assert!(matches!(asked.l4, L4::Icmpv6(icmp) if icmp.kind == 135));
        }
        other => panic!("{other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use bluff_testing::times;
    use proptest::prelude::*;

    use super::*;

    fn inner() -> impl Strategy<Value = Vec<u8>> {
        let to = prop_oneof![Just(STATION.0), Just([0xff; 6]), any::<[u8; 6]>()];
        let ethertype = prop_oneof![
            Just(vec![8, 0, 0x45]),
            Just(vec![0x86, 0xdd, 0x60]),
            Just(vec![0x81, 0, 0, 7, 8, 0, 0x45]),
            prop::collection::vec(any::<u8>(), 0..6),
        ];
        let tail = prop_oneof![
            3 => prop::collection::vec(any::<u8>(), 0..80),
            1 => prop::collection::vec(any::<u8>(), 200..700),
        ];
        (to, any::<[u8; 6]>(), ethertype, tail)
            .prop_map(|(to, from, ethertype, tail)| [&to[..], &from, &ethertype, &tail].concat())
    }

    /// Questions and answers of the link.
    fn link() -> impl Strategy<Value = Vec<u8>> {
        let arp = (any::<bool>(), any::<[u8; 6]>(), 1..4u8).prop_map(|(answer, from, target)| {
            let mut frame = [&[0xff; 6][..], &from, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]].concat();
            frame[21] += u8::from(answer);
            frame.extend(from);
            frame.extend([10, 0, 0, 2, 0, 0, 0, 0, 0, 0, 10, 0, 0, target]);
            frame
        });
        let solicitation =
            (any::<[u8; 6]>(), any::<bool>(), 135..138u8).prop_map(|(from, unspecified, kind)| {
                let mut frame = [
                    &HERE.0[..],
                    &from,
                    &[0x86, 0xdd, 0x60, 0, 0, 0, 0, 32, 58, 255],
                ]
                .concat();
                frame.extend(if unspecified { [0; 16] } else { [0xfe; 16] });
                frame.extend([0xfd; 16]);
                frame.extend([kind, 0, 0, 0, 0, 0, 0, 0]);
                frame.extend([0xfd; 16]);
                frame.extend([1, 1]);
                frame.extend(from);
                frame
            });
        prop_oneof![arp, solicitation]
    }

    fn record() -> impl Strategy<Value = Vec<u8>> {
        let bytes = prop_oneof![
            6 => inner().prop_map(|bytes| (1, bytes)),
            2 => link().prop_map(|bytes| (0, bytes)),
            1 => prop::collection::vec(any::<u8>(), 0..100).prop_map(|bytes| (0, bytes)),
        ];
        let change = prop_oneof![Just((0, 0)), (0..100u8, any::<u8>())];
        (bytes, change).prop_map(|((flags, bytes), (place, change))| {
            let len = (bytes.len() as u16).to_be_bytes();
            [&[flags, place, change][..], &len, &bytes].concat()
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(times(300, 30_000) as u32))]

        #[test]
        fn what_an_underlay_may_do(
            first in 0..4u8,
            records in prop::collection::vec(record(), 1..30),
        ) {
            let mut data = vec![first];
            data.extend(records.concat());
            fuzz_wire(&data);
        }

        #[test]
        fn any_bytes(data in prop::collection::vec(any::<u8>(), 0..600)) {
            fuzz_wire(&data);
        }
    }

    /// The properties are about something: a good frame arrives, and a question is answered.
    #[test]
    fn good_ones_arrive() {
        let inner = [&STATION.0[..], &[2, 0, 0, 0, 0, 9], b"\x88\xb5good"].concat();
        let question = [
            &[0xff; 6][..],
            &THERE.0,
            &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1],
            &THERE.0,
            &[10, 0, 0, 2, 0, 0, 0, 0, 0, 0, 10, 0, 0, 1],
        ]
        .concat();
        for first in 0..4 {
            let mut data = vec![first];
            for (flags, bytes) in [(1, &inner), (0, &question)] {
                data.extend([flags, 0, 0, 0, bytes.len() as u8]);
                data.extend(bytes);
            }
            let answers = usize::from(first & 2 == 0);
            let wanted = Heard {
                delivered: 1,
                answers,
            };
            assert_eq!(fuzz_wire(&data), wanted, "{first}");
        }
    }
}
