//! Tests that look at more than one module.

mod answers;
mod differential;
mod frames;
mod hashes;
mod hostile;

use core::net::{Ipv4Addr, Ipv6Addr};

use crate::build::{Ipv4Fields, Ipv6Fields, Writer};
use crate::{EtherType, Frame, IpProto, L2, Mac, Macs, Tags, parse};

const A: Mac = Mac([2, 0, 0, 0, 0, 1]);
const B: Mac = Mac([2, 0, 0, 0, 0, 2]);
const V4_A: Ipv4Addr = Ipv4Addr::new(192, 168, 7, 1);
const V4_B: Ipv4Addr = Ipv4Addr::new(192, 168, 7, 2);
const V6_A: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1);
const V6_B: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2);
/// Ports 1024 and 80, 20 bytes, ACK.
const TCP: [u8; 20] = [
    4, 0, 0, 80, 0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x10, 1, 0, 0, 0, 0, 0,
];

fn l2(ethertype: EtherType) -> L2 {
    L2 {
        macs: Macs { dst: B, src: A },
        tags: Tags::NONE,
        ethertype,
    }
}

/// An Ethernet frame with this ethertype and payload.
fn ethernet(ethertype: EtherType, payload: &[u8]) -> Vec<u8> {
    let mut room = vec![0; 14 + payload.len()];
    Writer::new(&mut room)
        .ethernet(&l2(ethertype))
        .unwrap()
        .bytes(payload)
        .unwrap();
    room
}

/// From A to B over IPv4.
fn v4(proto: IpProto, payload: &[u8]) -> Vec<u8> {
    let mut room = vec![0; 34 + payload.len()];
    let fields = Ipv4Fields {
        src: V4_A,
        dst: V4_B,
        proto,
        tos: 0,
        ttl: 64,
        id: 7,
        dont_fragment: true,
    };
    let mut writer = Writer::new(&mut room);
    writer.ethernet(&l2(EtherType::IPV4)).unwrap();
    writer
        .ipv4(&fields, payload.len())
        .unwrap()
        .bytes(payload)
        .unwrap();
    room
}

/// From A to B over IPv6; `payload` begins with the extension headers, if `next` is one.
fn v6(next: IpProto, payload: &[u8]) -> Vec<u8> {
    let mut room = vec![0; 54 + payload.len()];
    let fields = Ipv6Fields {
        src: V6_A,
        dst: V6_B,
        next,
        traffic_class: 0xb8,
        flow_label: 0xfabcd,
        hop_limit: 255,
    };
    let mut writer = Writer::new(&mut room);
    writer.ethernet(&l2(EtherType::IPV6)).unwrap();
    writer
        .ipv6(&fields, payload.len())
        .unwrap()
        .bytes(payload)
        .unwrap();
    room
}

/// A datagram with these ports.
fn udp(src: u16, dst: u16, payload: &[u8]) -> Vec<u8> {
    let mut room = vec![0; 8 + payload.len()];
    Writer::new(&mut room)
        .udp(src, dst, payload.len(), 0)
        .unwrap()
        .bytes(payload)
        .unwrap();
    room
}

fn parsed(bytes: &[u8]) -> Frame {
    parse(bytes, bytes.len()).unwrap()
}
